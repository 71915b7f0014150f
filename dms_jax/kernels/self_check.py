"""Check a kernel on the device at hand when it is first needed: is it right, and is it faster than XLA?

A check takes a few seconds. Its result is printed on stderr and kept in the user's cache folder, together with the
device, the driver and the versions that it holds for; another driver or version checks again. The environment variable
DMS_JAX_KERNEL_CHECK=0 switches checks off. Where a check does not run, a kernel without a measurement is not the
default.
"""

import concurrent.futures
import contextlib
import hashlib
import importlib
import json
import os
import statistics
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dms_jax import __version__
from dms_jax.files import user_cache, write_json
from dms_jax.kernels.kernel_table import XLA

VARIABLE = "DMS_JAX_KERNEL_CHECK"
CASES = "dms_jax.kernels.kernel_cases"  # imported at the first check, because it imports what calls the kernels
DRIVER = Path("/proc/driver/nvidia/version")
REPEATS = 5  # timings of each implementation
CALLS = 10  # calls in a timing, so that the time of a launch matters little


class Finding(NamedTuple):
    """The result of a check."""

    refused_because: str | None  # why the kernel is not the default; None if it is
    speed_to_xla: float  # 0 if it was not timed

    @property
    def verdict(self) -> str:
        return self.refused_because or f"right, and {self.speed_to_xla:.2f}x as fast as xla, so it is the default"


_lock = threading.Lock()
_findings: dict[tuple, Finding | None] = {}


def checked(kernel: str, implementation: str, head_dim: int, kv_dtype: str, target: tuple[str, str]) -> Finding | None:
    """Return what the check of a kernel found, now or at an earlier time; None if it cannot be checked here.

    `target` is the platform and the kind of device that the kernel is to run on. It must be that of this process. Of
    several processes, none checks, because all must run the same program.
    """
    device = jax.devices()[0]
    if os.environ.get(VARIABLE) == "0" or target != (device.platform, device.device_kind) or jax.process_count() > 1:
        return None
    key = kernel, implementation, head_dim, kv_dtype
    setup = setup_of(device)
    with _lock:
        if (*key, *setup.values()) not in _findings:
            _findings[*key, *setup.values()] = _kept_or_new(key, setup)
        return _findings[*key, *setup.values()]


def setup_of(device: Any) -> dict[str, str]:
    """Return the device, the driver and the versions that a finding holds for."""
    driver = DRIVER.read_text(encoding="utf-8").splitlines()[0] if DRIVER.exists() else ""
    return {
        "device": device.device_kind,
        "driver": driver,
        "platform": device.client.platform_version,
        "jax": jax.__version__,
        "dms_jax": __version__,
    }


def _kept_or_new(key: tuple, setup: dict[str, str]) -> Finding | None:
    name, path = " ".join(map(str, key)), None
    digest = hashlib.sha256(json.dumps(setup).encode()).hexdigest()[:16]
    with contextlib.suppress(OSError, RuntimeError):  # without a folder, a finding holds for this process only
        path = user_cache("kernels") / f"{digest}.json"
    kept = _read(path)
    if name in kept:
        return kept[name]
    finding = _in_new_thread(lambda: measure(*key))
    where = ""
    if finding is not None and path is not None:
        with contextlib.suppress(OSError):
            record = setup | {"findings": {text: found._asdict() for text, found in (kept | {name: finding}).items()}}
            write_json(path, record)
            where = f", kept in {path}"
    result = "could not be checked for lack of memory, so XLA runs" if finding is None else finding.verdict
    print(f"kernel {name}: {result}{where}; {VARIABLE}=0 switches such checks off", file=sys.stderr)
    return finding


def _read(path: Path | None) -> dict[str, Finding]:
    """Return the findings in a file; none if there is no file, or one of which no sense can be made."""
    try:
        findings = {} if path is None else json.loads(path.read_text(encoding="utf-8"))["findings"]
        return {name: Finding(**fields) for name, fields in findings.items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return {}


def _in_new_thread(work: Callable[[], Any]) -> Any:
    """Run `work` in a thread of its own: this one may be tracing a program, which would record what `work` does."""
    with concurrent.futures.ThreadPoolExecutor(1) as threads:
        return threads.submit(work).result()


def measure(kernel: str, implementation: str, head_dim: int, kv_dtype: str) -> Finding | None:
    """Compare a kernel with the fp32 reference, and its speed with that of XLA; None if there is too little memory."""
    cases = importlib.import_module(CASES)
    cached = jnp.dtype(kv_dtype)
    try:
        case = cases.SUITES[kernel].tuned(head_dim, cached)(dtype=cached if cached == jnp.float32 else cases.BF16)
        with jax.default_matmul_precision("highest"):
            wanted = jax.jit(case.reference)(*cases.in_fp32(case.inputs))
        calls: dict[str, Callable] = {name: jax.jit(case.run(name)) for name in (XLA, implementation)}
        errors = {name: cases.error(case, call(*case.inputs), wanted) for name, call in calls.items()}
        ours, theirs = errors[implementation], errors[XLA]
        if not ours <= max(cases.TOLERANCE, 1.5 * theirs):
            return Finding(f"wrong on this device: its error is {ours:.1e}, and that of xla {theirs:.1e}", 0.0)
        seconds = time_calls(calls, case.inputs)
    except Exception as why:  # a compiler may fail in many ways, and each means that XLA must run
        if "RESOURCE_EXHAUSTED" in str(why):
            return None
        return Finding(f"fails on this device: {' '.join(str(why).split())[:200]}", 0.0)
    speed = round(seconds[XLA] / seconds[implementation], 3)
    return Finding(None if speed >= 1 else f"slower than xla on this device: {speed:.2f}x", speed)


def time_calls(calls: dict[str, Callable], inputs: tuple) -> dict[str, float]:
    """Return the median seconds of each call. The calls alternate, so that a busy machine slows down all of them."""
    found: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(REPEATS):
        for name, call in calls.items():
            start = time.perf_counter()
            jax.block_until_ready([call(*inputs) for _ in range(CALLS)])
            found[name].append((time.perf_counter() - start) / CALLS)
    return {name: statistics.median(times) for name, times in found.items()}
