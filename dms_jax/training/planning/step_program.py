"""Build the real retrofit step of a setting from shapes, compile it for its hardware, or time it on this machine's CPU.

Of all planning modules, only this one uses `training.step`.
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

MAX_TIMED_FLOPS = 4e12  # a larger step is timed with shorter rows


def mesh_of(setting: StepSetting, analytic: bool) -> Mesh:
    """Make the mesh to plan on: the devices of this machine or of the target; with `analytic`, an abstract mesh.

    An abstract mesh has no devices, which is enough for counting shards.
    """
    axes = ("data", "model", "context")[: len(setting.mesh)]
    if setting.hardware.kind == "cpu":
        return make_mesh(*setting.mesh)
    if analytic:
        # pyrefly: ignore[bad-return]  # callers use only the shape and the axes of the mesh
        return AbstractMesh(setting.mesh, axes, axis_types=(AxisType.Auto,) * len(axes))
    return target_mesh(setting.hardware.name, setting.mesh, axes)


def program_of(setting: StepSetting, mesh: Mesh, make: Any = abstract_model) -> tuple[StepFunctions, Params, Params]:
    """Build (step functions, parameters that train, frozen parameters) of a setting.

    `make(config, dtype)` builds the models; by default they consist of shapes only.
    """
    dtype, adapter = jnp.dtype(platform_defaults(setting.hardware.platform).dtype), setting.step.mode == "adapter"
    teacher = None if adapter else make(setting.model.with_dms(None), dtype)
    student = make(setting.model, dtype if adapter else jnp.float32)
    mathematics, trainable, frozen = take_apart(student, teacher, setting.step, mesh, dtype)
    return step_functions(mathematics, trainable), trainable, frozen


def compiled(setting: StepSetting, mesh: Mesh) -> jax.stages.Compiled:
    """Compile the step for the devices of `mesh`."""
    steps, _, frozen = program_of(setting, mesh)
    return steps.lower(frozen, setting.step.batch_size).compile()


def compiled_labels(setting: StepSetting, mesh: Mesh) -> jax.stages.Compiled:
    """Compile the label pass of init=fisher for the devices of `mesh`."""
    steps, _, frozen = program_of(setting, mesh)
    return steps.lower_labels(frozen, setting.step.rows_at_once).compile()


def label_sum_bytes(setting: StepSetting, mesh: Mesh) -> float:
    """Count the bytes of the shards of the labels' sums per device."""
    return _shard_bytes(program_of(setting, mesh)[0].abstract_labels)


def state_bytes(setting: StepSetting, mesh: Mesh) -> tuple[float, float, float]:
    """Count the bytes of shards per device: (weights that train, frozen weights, optimizer state)."""
    steps, _, frozen = program_of(setting, mesh)
    state = steps.abstract_state
    return _shard_bytes(state.trainable), _shard_bytes(frozen), _shard_bytes(state.opt_state)


def _shard_bytes(shapes: Any) -> float:
    leaves = jax.tree.leaves(shapes)
    return float(sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves))


def cpu_seconds(setting: StepSetting, mesh: Mesh, labels: bool = False) -> tuple[float, str]:
    """Return the seconds of a step on this machine's CPU, and a description of how they were measured.

    `labels`: of the label pass over the rows that it reads at one time, instead of a step.

    Models with one and with two layers and random weights are timed; the difference is the time of each further layer.
    A step of more than MAX_TIMED_FLOPS is timed with shorter rows and scaled by its FLOPs.
    """
    layers, length, scale = setting.model.num_layers, setting.step.length, 1.0
    how = "measured here: models of 1 and 2 layers with random weights, extrapolated to all layers"

    def flops(length: int) -> float:
        two = dataclasses.replace(setting.model, num_layers=min(2, layers))
        tokens = setting.step.batch_size * length
        return sum(roofline.step_work(two, tokens, length, setting.step.mode, setting.step.remat)[:2])

    def seconds(layers: int) -> float:
        model = dataclasses.replace(setting.model, num_layers=layers)
        return timed(dataclasses.replace(setting, model=model).with_step(length=length), mesh, labels)

    while flops(length) > MAX_TIMED_FLOPS and length > 128:
        length //= 2
    if length < setting.step.length:
        scale = flops(setting.step.length) / flops(length)
        how += f", and from rows of {length} to rows of {setting.step.length} tokens by FLOPs"
    one_layer = seconds(1)
    further = max(seconds(2) - one_layer, 0.0) * (layers - 1) if layers > 1 else 0.0
    return (one_layer + further) * scale, how


def timed(setting: StepSetting, mesh: Mesh, labels: bool = False) -> float:
    """Time a step, or with `labels` the label pass, with random weights on the devices of this process.

    Returns the minimum of at least three runs that take at least one second in all, because other load on the machine
    only adds time.
    """

    def make(config: ModelConfig, dtype: Any) -> Decoder:
        return Decoder(config, rngs=nnx.Rngs(0), dtype=dtype)

    steps, trainable, frozen = program_of(setting, mesh, make)
    rows, length = setting.step.rows_at_once if labels else setting.step.batch_size, setting.step.length
    tokens = np.zeros((rows, length), np.int32)
    host = Batch(tokens, tokens, np.ones(tokens.shape, bool), np.arange(rows, dtype=np.int32))
    batch, seconds, state = place(host, mesh), [], steps.initial_state(trainable)
    sums = steps.no_labels() if labels else None
    while len(seconds) < 4 or sum(seconds[1:]) < 1.0:
        start = time.perf_counter()
        if labels:
            sums = steps.add_labels(sums, state, frozen, batch)
        else:
            state, _ = steps.step(state, frozen, batch)
        jax.block_until_ready(sums if labels else state)
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])  # the first run compiles
