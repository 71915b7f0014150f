"""A tiny retrofit that many tests share: its step, its batches, and any mesh of the simulated devices."""

import dataclasses
import functools
import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
from cases import tiny_model, tokens
from jax.sharding import AxisType, Mesh

from dms_jax.config import DMSConfig
from dms_jax.sharding import MESH_AXES
from dms_jax.training.data.rows import Batch
from dms_jax.training.placement import place
from dms_jax.training.retrofit_config import OptimizerConfig, RetrofitConfig
from dms_jax.training.step import take_apart
from dms_jax.training.step_functions import step_functions

LENGTH, BATCH = 32, 8
# At the released scale of 100 and temperature of 0.1, the rounding of the residual stream is a thousand times as large
# in the gate logits, and with them in the gradients; at 10 and 2 it is five times as large. The faults of a mesh do not
# depend on these values.
DMS = DMSConfig(window_size=4, target_cr=4.0, evict_logit_bias=1.0, tau=2.0, evict_logit_scale=10.0)
CONFIG = RetrofitConfig(
    seed=1,
    length=LENGTH,
    steps=10,
    initial_cr=3.0,
    cr_steps=5,
    remat="full",
    dms=DMS,
    optimizer=OptimizerConfig(learning_rate=1e-3),
    init="zero",
).resolved()


def mesh_of(*sizes):
    devices = np.array(jax.devices()[: math.prod(sizes)]).reshape(sizes)
    return Mesh(devices, MESH_AXES[: len(sizes)], axis_types=(AxisType.Auto,) * len(sizes))


def retrofit(mesh=(1, 1), config=CONFIG, dms=DMS, seed=0, **fields):
    """The run of a tiny model; `fields` change its shape. Equal runs share compiled functions, but no state."""
    run = _retrofit(mesh, config, dms, seed, **fields)
    state = jax.tree.map(lambda x: jax.device_put(x, x.sharding, may_alias=False), run.state)  # a step donates it
    return SimpleNamespace(**vars(run) | {"state": state})


@functools.cache
def _retrofit(mesh, config, dms, seed, **fields):
    if config.mode == "borrowed":
        dms = dataclasses.replace(dms, variant="borrowed")
    teacher = None if config.mode == "adapter" else tiny_model(None, seed, **fields)
    return run_of(tiny_model(dms, seed, evict_scale=1.0, **fields), teacher, config, mesh)


def run_of(model, teacher, config, mesh, dtype=jnp.float32):
    """The step functions of a run and its state, which `train` replaces."""
    mesh = mesh if isinstance(mesh, Mesh) else mesh_of(*mesh)
    math, trainable, frozen = take_apart(model, teacher, config, mesh, dtype)
    steps = step_functions(math, trainable)
    return SimpleNamespace(steps=steps, math=math, mesh=mesh, frozen=frozen, state=steps.initial_state(trainable))


def config_of(mode):
    """The configuration of a mode, with the ramp and the first gates within three steps."""
    return dataclasses.replace(CONFIG, mode=mode, ramp_steps=1 if mode == "borrowed" else 0)


def batch(first_step=0, packed=False):
    rng = np.random.default_rng(first_step)
    segments = (
        np.sort(rng.integers(1, 3, (BATCH, LENGTH)), axis=1).astype(np.int32)
        if packed
        else np.zeros((BATCH, LENGTH), np.int32)
    )
    mask = np.ones((BATCH, LENGTH), bool)
    mask[0, 20:] = False
    return Batch(
        tokens(rng, BATCH, LENGTH),
        segments,
        mask,
        np.arange(first_step * BATCH, (first_step + 1) * BATCH, dtype=np.int32),
    )


def advance(run, host):
    """One step of `run` on a host batch. Returns its metrics."""
    run.state, metrics = run.steps.step(run.state, run.frozen, place(host, run.mesh))
    return metrics


def train(run, steps=3, packed=False):
    """Metrics of `steps` steps, on the host."""
    return [jax.tree.map(np.asarray, advance(run, batch(i, packed))) for i in range(steps)]


def outcome(run, steps=3) -> dict[str, np.ndarray]:
    """Return all results of a run of `steps` steps, on the host of every process.

    These are the metrics of each step, and, after the first step, the gradients (as Adam's first moment, which starts
    at 0) and the updated parameters.
    """
    found = {}
    for i in range(steps):
        metrics = advance(run, batch(i, packed=True))
        found |= {f"metrics {i} {key}": value for key, value in metrics.items()}
        if i == 0:
            first = next(
                part
                for part in jax.tree.leaves(run.state.opt_state, is_leaf=lambda x: hasattr(x, "mu"))
                if hasattr(part, "mu")
            )
            with jax.set_mesh(run.mesh):
                everywhere = jax.jit(
                    lambda x: x, out_shardings=jax.sharding.NamedSharding(run.mesh, jax.sharding.PartitionSpec())
                )
                found |= {f"gradient {name}": everywhere(a) for name, a in first.mu.items()}
                found |= {f"updated {name}": everywhere(a) for name, a in run.state.trainable.items()}
    return {name: np.asarray(value) for name, value in found.items()}


def same_outcome(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> None:
    """Compare outcomes to 1e-5, and gradients relative to their largest entry.

    Adam's first step moves an entry by the learning rate, in the direction of the sign of its gradient. If the gradient
    is only rounding error, rounding decides the sign, so only the gradients of such entries are compared.
    """
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        kind = name.split()[0]
        if kind == "updated":
            gradient = np.abs(theirs[name.replace(kind, "gradient")])
            sure = gradient > 1e-3 * gradient.max()
            np.testing.assert_allclose(
                ours[name][sure], expected[sure], rtol=1e-5, atol=1e-5 * CONFIG.optimizer.learning_rate, err_msg=name
            )
        else:
            scale = np.abs(expected).max() if kind == "gradient" else 0.1
            np.testing.assert_allclose(ours[name], expected, rtol=1e-5, atol=1e-5 * scale, err_msg=name)
