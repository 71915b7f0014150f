"""Eight simulated devices and a strict JAX for all tests, and a count of the collected tests, so that none is lost."""

import collections
import gc
import importlib.metadata
import json
import os
import signal
from pathlib import Path

# A shell that starts the suite in the background ignores these signals, and so would the processes that tests signal.
for ignored in (signal.SIGINT, signal.SIGHUP):
    if signal.getsignal(ignored) is signal.SIG_IGN:
        signal.signal(ignored, signal.SIG_DFL if ignored == signal.SIGHUP else signal.default_int_handler)

# Also where there is a GPU; and its plugin on a machine without one would not compile for other hardware.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# No test writes to the user's cache of compiled programs, nor do the commands that tests start.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", "")

# XLA's older code for fused loops compiles twice as fast. Newer versions of jaxlib do not have it.
if os.environ.get("JAX_DISABLE_MOST_OPTIMIZATIONS") and importlib.metadata.version("jaxlib").startswith("0.10."):
    os.environ.setdefault("XLA_FLAGS", "--xla_cpu_use_fusion_emitters=false")

import jax  # noqa: E402

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

import numpy as np  # noqa: E402
import pytest  # noqa: E402

COLLECTED = Path(__file__).parent / "golden" / "collected_tests.json"
counts = pytest.StashKey[dict[str, int]]()


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture(autouse=True, scope="module")
def few_mappings():
    """Drop the compiled programs after each file.

    Every compiled program holds memory mappings, of which a process may have 65530. Otherwise, a worker that runs many
    files would be aborted inside the compiler.
    """
    yield
    jax.clear_caches()
    gc.collect()


@pytest.fixture
def optimized():
    """All of XLA's optimizations, which `make test` switches off, for a test that measures a compiled program or trains
    long enough for rounding to matter."""
    before = jax.config.values["jax_disable_most_optimizations"]
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


# --- the count of collected tests, by directory, against tests/golden/collected_tests.json ---


def pytest_addoption(parser):
    parser.addoption("--write-collected", action="store_true", help=f"update {COLLECTED.name} to what is collected now")


@pytest.hookimpl(tryfirst=True)  # before `-m` deselects: the slow tests count too
def pytest_collection_modifyitems(config, items):
    root = Path(__file__).parent
    if config.args != config.getini("testpaths"):
        return  # somebody runs a part of the suite
    found = collections.Counter(str(item.path.parent.relative_to(root)) for item in items)
    config.stash[counts] = dict(sorted(found.items()))
    if hasattr(config, "workeroutput"):
        config.workeroutput["collected"] = config.stash[counts]


def pytest_testnodedown(node, error):
    """A worker of pytest-xdist hands its count to the process that reports."""
    if found := getattr(node, "workeroutput", {}).get("collected"):
        node.config.stash[counts] = found


def _fewer(found: dict[str, int], golden: dict[str, int]) -> list[str]:
    """Each directory in which fewer tests were collected than there should be."""
    return [f"{name}: {found.get(name, 0)} of {count}" for name, count in golden.items() if found.get(name, 0) < count]


def pytest_sessionfinish(session, exitstatus):
    found = session.config.stash.get(counts, None)
    if found is None or hasattr(session.config, "workeroutput"):
        return
    if session.config.getoption("--write-collected"):
        COLLECTED.write_text(json.dumps(found, indent=1) + "\n")
    if exitstatus == 0 and _fewer(found, json.loads(COLLECTED.read_text())):
        session.exitstatus = 1


def pytest_terminal_summary(terminalreporter, config):
    if (found := config.stash.get(counts, None)) is None:
        return
    terminalreporter.write_line(f"collected, by directory: {', '.join(f'{name} {n}' for name, n in found.items())}")
    if missing := _fewer(found, json.loads(COLLECTED.read_text())):
        terminalreporter.write_line(
            f"fewer tests than {COLLECTED.name} says ({'; '.join(missing)}); if they were removed on purpose, run "
            "once with --write-collected",
            red=True,
        )
