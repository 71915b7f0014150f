"""A tiny retrofit that many tests share: its step, its batches, any mesh of the simulated devices."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from cases import tiny_model, tokens
from jax.sharding import AxisType, Mesh

from dms_jax.config import DMSConfig
from dms_jax.sharding import MESH_AXES
from dms_jax.training.data.rows import Batch
from dms_jax.training.retrofit_config import LossConfig, OptimizerConfig
from dms_jax.training.step import Retrofit, StepConfig

LENGTH, BATCH = 32, 8
# Scale and temperature: at the released 100 and 0.1 the rounding of the residual stream is a thousand times as large in z, and with it
# in the gradients; at 10 and 2 five times. What a mesh could get wrong does not depend on them.
DMS = DMSConfig(window_size=4, target_cr=4.0, evict_logit_bias=1.0, tau=2.0, evict_logit_scale=10.0)
STEP = StepConfig(
    mode="adapter",
    seed=1,
    length=LENGTH,
    steps=10,
    accumulate=1,
    initial_cr=3.0,
    ramp_steps=0,
    cr_steps=5,
    remat="full",
    loss=LossConfig(),
    optimizer=OptimizerConfig(learning_rate=1e-3),
)


def mesh_of(*sizes):
    devices = np.array(jax.devices()[: math.prod(sizes)]).reshape(sizes)
    return Mesh(devices, MESH_AXES[: len(sizes)], axis_types=(AxisType.Auto,) * len(sizes))


def retrofit(mesh=(1, 1), step=STEP, dms=DMS, seed=0, **fields):
    if step.mode == "borrowed":
        dms = dataclasses.replace(dms, variant="borrowed")
    teacher = None if step.mode == "adapter" else tiny_model(None, seed, **fields)
    mesh = mesh if isinstance(mesh, Mesh) else mesh_of(*mesh)
    return Retrofit(tiny_model(dms, seed, evict_scale=1.0, **fields), teacher, step, mesh, jnp.float32)


def step_of(mode):
    """A step of that mode, gates and ramp both within the first three."""
    return dataclasses.replace(STEP, mode=mode, ramp_steps=1 if mode == "borrowed" else 0)


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


def place(run, host):
    return run.place(lambda start, count: Batch(*(x[start : start + count] for x in host)), len(host.tokens))


def train(run, steps=3, packed=False):
    seen = []
    for i in range(steps):
        run.state, metrics = run.step(run.state, run.frozen, place(run, batch(i, packed)))
        seen.append({key: np.asarray(value) for key, value in metrics.items()})
    return seen


def outcome(run, steps=3) -> dict[str, np.ndarray]:
    """All that a run of `steps` says and does, on the host of every process: metrics of each step, and after the first one its gradients
    (as Adam's first moment, of a state that started at 0) and what trains."""
    found = {}
    for i in range(steps):
        run.state, metrics = run.step(run.state, run.frozen, place(run, batch(i, packed=True)))
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
    """To 1e-5, gradients of their largest entry. Adam's first step moves an entry by the learning rate in the direction of its gradient's
    sign, which rounding decides where the gradient is rounding error: such entries are compared as gradients only."""
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        kind = name.split()[0]
        if kind == "updated":
            gradient = np.abs(theirs[name.replace(kind, "gradient")])
            sure = gradient > 1e-3 * gradient.max()
            np.testing.assert_allclose(
                ours[name][sure], expected[sure], rtol=1e-5, atol=1e-5 * STEP.optimizer.learning_rate, err_msg=name
            )
        else:
            scale = np.abs(expected).max() if kind == "gradient" else 0.1
            np.testing.assert_allclose(ours[name], expected, rtol=1e-5, atol=1e-5 * scale, err_msg=name)
