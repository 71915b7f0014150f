"""Eight simulated devices, before anything starts JAX."""

import gc
import os

os.environ.setdefault(
    "JAX_PLATFORMS", "cpu"
)  # also where there is a GPU, and its plugin without one would not compile for others

import jax

jax.config.update("jax_num_cpu_devices", 8)

import numpy as np  # noqa: E402
import pytest  # noqa: E402


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture(autouse=True, scope="module")
def few_mappings():
    """Each compiled program holds memory mappings, of which a process may have 65530: without this, a worker that runs many files
    is aborted inside the compiler."""
    yield
    jax.clear_caches()
    gc.collect()
