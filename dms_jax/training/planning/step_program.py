"""The real retrofit step of a setting: built from shapes only, compiled for its hardware, or run on this machine's CPU to time it.

This is the only file of the plan that calls `training.step`.
"""

import dataclasses
import math
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AbstractMesh, AxisType, Mesh

from dms_jax.config import ModelConfig
from dms_jax.models.decoder import Decoder
from dms_jax.models.parameters import Params, abstract_model
from dms_jax.planning import roofline
from dms_jax.planning.hardware import target_mesh
from dms_jax.platform_defaults import platform_defaults
from dms_jax.sharding import make_mesh
from dms_jax.training.data.rows import Batch
from dms_jax.training.placement import place
from dms_jax.training.planning.step_setting import StepSetting
from dms_jax.training.step import take_apart
from dms_jax.training.step_functions import StepFunctions, step_functions

MAX_TIMED_FLOPS = 4e12  # of a step that is run to time it; a larger step is run with shorter rows


def mesh_of(setting: StepSetting, analytic: bool) -> Mesh:
    """The mesh to plan on: of this machine's devices, of the target's devices, or, with `analytic`, of no devices, which is enough to
    count shards."""
    axes = ("data", "model", "context")[: len(setting.mesh)]
    if setting.hardware.kind == "cpu":
        return make_mesh(*setting.mesh)
    if analytic:
        # pyrefly: ignore[bad-return]  # an abstract mesh is enough to count shards
        return AbstractMesh(setting.mesh, axes, axis_types=(AxisType.Auto,) * len(axes))
    return target_mesh(setting.hardware.name, setting.mesh, axes)


def program_of(setting: StepSetting, mesh: Mesh, make: Any = abstract_model) -> tuple[StepFunctions, Params, Params]:
    """(functions of the run, parameters that train, frozen parameters) of models of shapes, or of other models that `make` builds."""
    dtype, adapter = jnp.dtype(platform_defaults(setting.hardware.platform).dtype), setting.step.mode == "adapter"
    teacher = None if adapter else make(setting.model.with_dms(None), dtype)
    student = make(setting.model, dtype if adapter else jnp.float32)
    mathematics, trainable, frozen = take_apart(student, teacher, setting.step, mesh, dtype)
    return step_functions(mathematics, trainable), trainable, frozen


def compiled(setting: StepSetting, mesh: Mesh) -> jax.stages.Compiled:
    """The step, compiled for the devices of `mesh`."""
    steps, _, frozen = program_of(setting, mesh)
    return steps.lower(frozen, setting.step.batch_size).compile()


def state_bytes(setting: StepSetting, mesh: Mesh) -> tuple[float, float, float]:
    """Bytes of the shards of one device: weights that train, frozen weights, optimizer state."""
    steps, _, frozen = program_of(setting, mesh)
    state = steps.abstract_state
    return _shard_bytes(state.trainable), _shard_bytes(frozen), _shard_bytes(state.opt_state)


def _shard_bytes(shapes: Any) -> float:
    leaves = jax.tree.leaves(shapes)
    return float(sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves))


def cpu_seconds(setting: StepSetting, mesh: Mesh) -> tuple[float, str]:
    """Seconds of a step on this machine's CPU, and how they were measured.

    Steps of models with 1 and with 2 layers and random weights are run; their difference is the time of each further layer. A step of
    more than MAX_TIMED_FLOPS is run with shorter rows and scaled by its FLOPs.
    """
    layers, length, scale = setting.model.num_layers, setting.step.length, 1.0
    how = "measured here: steps of 1 and 2 layers, random weights, further layers in proportion"

    def flops(length: int) -> float:
        two = dataclasses.replace(setting.model, num_layers=min(2, layers))
        tokens = setting.step.batch_size * length
        return sum(roofline.step_work(two, tokens, length, setting.step.mode, setting.step.remat)[:2])

    def seconds(layers: int) -> float:
        model = dataclasses.replace(setting.model, num_layers=layers)
        return timed(dataclasses.replace(setting, model=model).with_step(length=length), mesh)

    while flops(length) > MAX_TIMED_FLOPS and length > 128:
        length //= 2
    if length < setting.step.length:
        scale = flops(setting.step.length) / flops(length)
        how += f", rows of {length} instead of {setting.step.length}, in proportion to FLOPs"
    one = seconds(1)
    further = max(seconds(2) - one, 0.0) * (layers - 1) if layers > 1 else 0.0
    return (one + further) * scale, how


def timed(setting: StepSetting, mesh: Mesh) -> float:
    """Seconds of a step on the devices of this process, with random weights: the minimum of at least three runs and at least one second
    of runs, because other load on the machine only adds time."""

    def make(config: ModelConfig, dtype: Any) -> Decoder:
        return Decoder(config, rngs=nnx.Rngs(0), dtype=dtype)

    steps, trainable, frozen = program_of(setting, mesh, make)
    rows, length = setting.step.batch_size, setting.step.length
    tokens = np.zeros((rows, length), np.int32)
    host = Batch(tokens, tokens, np.ones(tokens.shape, bool), np.arange(rows, dtype=np.int32))
    batch, seconds, state = place(host, mesh), [], steps.initial_state(trainable)
    while len(seconds) < 4 or sum(seconds[1:]) < 1.0:
        start = time.perf_counter()
        state, _ = steps.step(state, frozen, batch)
        jax.block_until_ready(state)
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])  # the first run compiles
