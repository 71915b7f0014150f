"""Models to measure: one from a folder, or one with the shape of a well-known model and random weights."""

import os
import platform
import time
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import nnx

from dms_jax.config import DMSConfig
from dms_jax.errors import ConfigError
from dms_jax.hf.folder import open_source, read_config, resolve
from dms_jax.kernels.dispatch import KernelQuery, select_implementation
from dms_jax.models.decoder import Decoder
from dms_jax.models.parameters import ModelStructure, flatten
from dms_jax.platform_defaults import platform_defaults
from dms_jax.provenance import versions

WINDOW = 128
CONFIGS = Path(__file__).parent.parent / "configs" / "models"  # a config.json for each named shape


def default_window(context: int) -> int:
    """Return the window size of the policy that is added to a model without one, for rows of `context` tokens."""
    return min(WINDOW, context // 8)


def load(name: str, layers: int, context: int, implementation: str = "auto", dtype: jnp.dtype | None = None, mesh=None):
    """Load or make a model with a learned policy. Returns it, and where its weights are from: the folder, or "random".

    `layers` is the number of layers of a random model; 0 keeps that of the named shape.
    """
    policy = DMSConfig(window_size=default_window(context))
    dtype = dtype or jnp.dtype(platform_defaults().dtype)
    if not (named := CONFIGS / f"{name}.json").exists():
        import dms_jax

        if layers:
            shapes = ", ".join(sorted(path.stem for path in CONFIGS.glob("*.json")))
            raise ConfigError(f"--layers has no effect with the folder {name}; leave it out, or use a shape ({shapes})")
        has_policy = open_source(path := resolve(name))[1].dms is not None
        return dms_jax.load(
            path, dtype=dtype, implementation=implementation, mesh=mesh, dms=None if has_policy else policy
        ), name
    config = replace(read_config(named), max_position_embeddings=1 << 20, dms=policy, implementation=implementation)
    if layers:
        config = replace(config, num_layers=layers)
    # This refuses an implementation that cannot run.
    select_implementation("train_attention", KernelQuery(config.head_dim, jnp.bfloat16), implementation)
    model = Decoder(config, rngs=nnx.Rngs(0), dtype=dtype)
    if mesh is not None:
        template, params = ModelStructure(model), flatten(model)
        model = template.build(jax.device_put(params, template.shardings(list(params), mesh)))
    return model, "random"


def provenance() -> dict:
    """Return versions, device, commit and time, and also the model of the CPU, because much is measured on one."""
    return versions() | {
        "cpu": cpu_model(),
        "cores": cpu_cores(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def cpu_model() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(
                (line.partition(":")[2].strip() for line in file if line.startswith("model name")), platform.processor()
            )
    except OSError:
        return platform.processor()


def cpu_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
