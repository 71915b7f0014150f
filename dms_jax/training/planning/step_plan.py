"""What a retrofit step would need and how long it would take: the step compiled for its hardware, or estimated."""

import dataclasses
import functools
import time
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh

from dms_jax.config import ModelConfig
from dms_jax.errors import ConfigError
from dms_jax.kernels.dispatch import AUTO, GPU, IMPLEMENTATIONS, TPU, XLA, KernelQuery, select_implementation
from dms_jax.kernels.tuned import tuned_entry
from dms_jax.models.decoder import Decoder
from dms_jax.models.parameters import Params, abstract_model
from dms_jax.planning import memory_estimate, roofline
from dms_jax.planning.flops import step_flops
from dms_jax.planning.hardware import KIND_NAMES, Hardware, target_mesh
from dms_jax.planning.hlo_collectives import collectives
from dms_jax.sharding import make_mesh
from dms_jax.training.placement import place
from dms_jax.training.retrofit_config import Mode, Remat, RetrofitConfig
from dms_jax.training.step import take_apart
from dms_jax.training.step_functions import StepFunctions, step_functions

FORMULAS = {
    "fits": "bytes_per_device.total <= memory_per_device",
    "bytes_per_device.total": "compiled: arguments + outputs - aliased + temporary (weights: arguments less optimizer; activations and logits: "
    "estimates of their part of temporary); else the sum",
    "flops_per_step": "tokens x (2 forward passes, 2 P + 2 L N H T each, and backward: 2 P, or 4 P where all weights train, + 5 L N H T)",
    "flops_executed_per_step": "flops_per_step and what remat computes again",
    "bytes_per_step": "devices x bf16 weights x passes, and what each token reads and writes between the products",
    "collective_bytes_per_device": roofline.EXCHANGED,
    "seconds_per_step": roofline.FORMULA,
    "mfu": "flops_per_step / seconds_per_step / devices / dense bf16 peak",
    "tokens_per_second": "batch x length / seconds_per_step",
}
CPU_FLOPS = 4e12  # of a step that is run to time it; larger ones are estimated from the machine's rates


@dataclass(frozen=True)
class Setting:
    """What a user chooses."""

    config: ModelConfig  # with its policy
    hardware: Hardware
    mesh: tuple[int, ...]  # data, model[, context]
    mode: Mode
    length: int
    batch: int  # rows of an optimizer step, all devices together
    accumulate: int = 1
    remat: Remat = "full"

    @property
    def split(self) -> memory_estimate.Split:
        return memory_estimate.Split(*self.mesh)

    @property
    def rows(self) -> int:
        """Rows of a micro-batch on each device."""
        return self.batch // (self.split.data * self.accumulate)

    @property
    def described(self) -> dict[str, Any]:
        """What of it may be changed for another that fits."""
        return {
            "mesh": "x".join(map(str, self.mesh)),
            "mode": self.mode,
            "length": self.length,
            "batch": self.batch,
            "accumulate": self.accumulate,
            "remat": self.remat,
        }

    def problem(self) -> str | None:
        """Why this cannot be run at all; None when it can."""
        limit, name = self.config.context_limit()
        if self.length > limit:
            return f"length {self.length} exceeds the model's {name} of {limit}; use length <= {limit}"
        if self.length % self.split.context:
            return f"length {self.length} must be a multiple of {self.split.context}: the mesh splits each row into as many parts"
        least = self.split.data * self.accumulate
        if self.batch % least:
            return f"batch {self.batch} must be a multiple of {least}: {self.split.data} data-parallel devices x {self.accumulate} micro-batches"
        return None


def devices_of(setting: Setting, analytic: bool) -> Mesh:
    """The mesh to plan on: of this machine's devices, of those of the target, or (`analytic`) of none, which is enough to count shards.

    Raises ConfigError when it is of another size than the hardware.
    """
    axes = ("data", "model", "context")[: len(setting.mesh)]
    if setting.hardware.kind == "cpu":
        return make_mesh(*setting.mesh)
    if analytic:
        # pyrefly: ignore[bad-return]  # counting shards asks no more of a mesh
        return AbstractMesh(setting.mesh, axes, axis_types=(AxisType.Auto,) * len(axes))
    return target_mesh(setting.hardware.name, setting.mesh, axes)


def abstract_retrofit(setting: Setting, mesh: Mesh, make: Any = abstract_model) -> tuple[StepFunctions, Params, Params]:
    """(the run's functions, parameters that train, frozen parameters) of models of shapes; with `make` of other models, e.g. random
    ones."""
    dtype = jnp.float32 if setting.hardware.platform == "cpu" else jnp.bfloat16
    config = RetrofitConfig(
        mode=setting.mode,
        length=setting.length,
        steps=100,
        accumulate=setting.accumulate,
        ramp_steps=1 if setting.mode == "borrowed" else 0,
        cr_steps=90,
        remat=setting.remat,
    )
    adapter = setting.mode == "adapter"
    teacher = None if adapter else make(setting.config.with_dms(None), dtype)
    student = make(setting.config, dtype if adapter else jnp.float32)
    math, trainable, frozen = take_apart(student, teacher, config, mesh, dtype)
    return step_functions(math, trainable), trainable, frozen


def planned(setting: Setting, analytic: bool) -> dict[str, Any]:
    """Figures of one step by name, in `source` where each is from, and in `formulas` how it was reckoned. With `analytic` nothing is compiled."""
    mesh = devices_of(setting, analytic)
    steps, _, frozen = abstract_retrofit(setting, mesh)
    held = estimated = estimate(setting, steps, frozen)
    if analytic:
        implementation, sent = _implementation(setting, analytic), estimated_exchange(setting)
    else:
        with jax.set_mesh(mesh):
            implementation = _implementation(setting, analytic)
        compiled = steps.lower(frozen, setting.batch).compile()
        analysis: Any = compiled.memory_analysis()
        held = with_compiled(
            estimated, total_bytes(analysis) - analysis.temp_size_in_bytes, analysis.temp_size_in_bytes
        )
        sent = roofline.sent_bytes(collectives(compiled.as_text() or ""))
    usable = setting.hardware.usable_bytes
    if setting.hardware.platform == "cpu":
        usable /= setting.hardware.count  # simulated ones share the machine's memory
    plan: dict[str, Any] = {
        "fits": held.total <= usable,
        "bytes_per_device": held._asdict() | {"total": held.total},
        "estimated_bytes_per_device": estimated.total,
        "memory_per_device": usable,
        "collective_bytes_per_device": sent,
        "implementation": implementation,
        "source": _sources(analytic) | {"memory_per_device": setting.hardware.source},
        "formulas": dict(FORMULAS)
        | {f"bytes_per_device.{kind}": text for kind, text in memory_estimate.FORMULAS.items()},
    }
    add_times(plan, setting)
    return plan


def add_times(plan: dict[str, Any], setting: Setting) -> None:
    """What a plan's step computes and moves, and how long that takes, given what its devices send."""
    how, tokens, devices, source = (
        (setting.mode, setting.remat),
        setting.batch * setting.length,
        setting.hardware.count,
        plan["source"],
    )
    weight_bytes = roofline.weight_bytes(setting.config, setting.split.model, *how) * setting.accumulate
    work = roofline.step_work(setting.config, tokens, setting.length, *how)
    plan["flops_per_step"] = step_flops(setting.config, setting.length, setting.mode) * tokens
    plan["flops_executed_per_step"] = work.products + work.attention
    plan["bytes_per_step"] = work.moved + weight_bytes * devices
    if (chip := setting.hardware.chip) is None:
        plan["seconds_per_step"], source["seconds_per_step"] = cpu_seconds(setting, devices_of(setting, analytic=False))
        del plan["formulas"]["seconds_per_step"], plan["formulas"]["mfu"]
    else:
        rates = roofline.rates_of(chip, plan["implementation"])
        times = roofline.step_time(
            work, devices, weight_bytes, sum(plan["collective_bytes_per_device"].values()), rates
        )
        plan |= {
            "seconds_per_step": times.total,
            "seconds": times._asdict(),
            "mfu": plan["flops_per_step"] / times.total / devices / rates.peak,
        }
        source |= {"seconds_per_step": "analytic", "mfu": f"analytic; peak: data sheet ({chip.source})"}
        source |= {f"seconds.{name}": text for name, text in rates.sources.items() if name != "link"}
        source["seconds.communication"] = f"{source['collective_bytes_per_device']} bytes; {rates.sources['link']}"
    plan["tokens_per_second"], source["tokens_per_second"] = (
        tokens / plan["seconds_per_step"],
        source["seconds_per_step"],
    )


def _sources(analytic: bool) -> dict[str, str]:
    from_compiler = (
        "bytes_per_device",
        "bytes_per_device.weights",
        "bytes_per_device.optimizer",
        "bytes_per_device.temporary",
        "bytes_per_device.total",
        "fits",
        "collective_bytes_per_device",
    )
    counted = (
        "bytes_per_device.activations",
        "bytes_per_device.logits",
        "estimated_bytes_per_device",
        "flops_per_step",
        "flops_executed_per_step",
        "bytes_per_step",
    )
    return dict.fromkeys(from_compiler, "analytic" if analytic else "compiled") | dict.fromkeys(counted, "analytic")


def estimated_exchange(setting: Setting) -> dict[str, float]:
    return roofline.exchanged_bytes(
        setting.config, setting.split, setting.batch * setting.length, setting.accumulate, setting.mode
    )


def estimate_of(setting: Setting) -> memory_estimate.Held:
    """`estimate`, without a mesh of devices."""
    steps, _, frozen = abstract_retrofit(setting, devices_of(setting, analytic=True))
    return estimate(setting, steps, frozen)


def estimate(setting: Setting, steps: StepFunctions, frozen: Params) -> memory_estimate.Held:
    """Bytes of a device by kind; weights and optimizer are those of the shards."""
    trainable = _shard_bytes(steps.abstract_state.trainable)
    shape = memory_estimate.Shape(
        setting.split,
        setting.rows,
        setting.length,
        setting.mode,
        setting.remat,
        setting.hardware.platform,
        setting.accumulate > 1,
    )
    weights, optimizer = trainable + _shard_bytes(frozen), _shard_bytes(steps.abstract_state.opt_state)
    return memory_estimate.held(setting.config, shape, weights, optimizer, trainable)


def _shard_bytes(shapes: Any) -> float:
    return float(sum(_size(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(shapes)))


def _size(shape: tuple[int, ...]) -> int:
    return functools.reduce(lambda a, b: a * b, shape, 1)


def total_bytes(analysis: Any) -> float:
    """Of a device, by a compiled program's `memory_analysis()`. Raises ConfigError when there is none."""
    if analysis is None:
        raise ConfigError("this compiler reports no memory; use --analytic")
    return (
        analysis.argument_size_in_bytes
        + analysis.output_size_in_bytes
        - analysis.alias_size_in_bytes
        + analysis.temp_size_in_bytes
    )


def with_compiled(held: memory_estimate.Held, arguments: float, temporary: float) -> memory_estimate.Held:
    """The compiler knows arguments and temporary memory; what of the latter are activations and logits it does not say."""
    part = min(1.0, temporary / (held.activations + held.logits))
    activations, logits = held.activations * part, held.logits * part
    weights = arguments - held.optimizer  # and the batch
    return held._replace(
        weights=weights, activations=activations, logits=logits, temporary=temporary - activations - logits
    )


def _implementation(setting: Setting, analytic: bool) -> str:
    """Of training attention on the target: what `dispatch` takes there, told without its devices where nothing is compiled."""
    named, head_dim, platform = setting.config.implementation, setting.config.head_dim, setting.hardware.platform
    if not analytic or platform == "cpu":
        return select_implementation("train_attention", KernelQuery(head_dim, jnp.bfloat16), named).name
    kind = KIND_NAMES[setting.hardware.kind]
    if named != AUTO:
        found = IMPLEMENTATIONS[named]
        if found.platform not in (None, platform) or found.refuses(KernelQuery(head_dim, jnp.bfloat16), kind):
            raise ConfigError(
                f"implementation {named} does not run on {setting.hardware.name} with head size {head_dim}; use {XLA} or {AUTO}"
            )
        return named
    kernel = GPU if platform == "gpu" else TPU
    entry = tuned_entry("train_attention", kernel, kind, head_dim, "bfloat16")
    return kernel if entry is not None and entry.speed_to_xla >= 1 else XLA


# --- a CPU: run it ---


def cpu_seconds(setting: Setting, mesh: Mesh) -> tuple[float, str]:
    """Seconds of a step here: one of 1 layer and one of 2, random weights, are run, and the others added. Steps that would take minutes are
    run with shorter rows and scaled by their FLOPs."""
    layers = setting.config.num_layers
    length, scale, how = (
        setting.length,
        1.0,
        "measured here: steps of 1 and 2 layers, random weights, the rest in proportion",
    )

    def flops(length: int) -> float:
        two = dataclasses.replace(setting.config, num_layers=min(2, layers))
        return sum(roofline.step_work(two, setting.batch * length, length, setting.mode, setting.remat)[:2])

    while flops(length) > CPU_FLOPS and length > 128:
        length //= 2
    if length < setting.length:
        scale = flops(setting.length) / flops(length)
        how += f", rows of {length} instead of {setting.length}, in proportion to FLOPs"
    one = timed(
        dataclasses.replace(setting, config=dataclasses.replace(setting.config, num_layers=1), length=length), mesh
    )
    if layers == 1:
        return one * scale, how
    two = timed(
        dataclasses.replace(setting, config=dataclasses.replace(setting.config, num_layers=2), length=length), mesh
    )
    return (one + max(two - one, 0.0) * (layers - 1)) * scale, how


def timed(setting: Setting, mesh: Mesh) -> float:
    """Seconds of a step on the devices of this process, random weights: the least of three, or of a second, since what else runs
    here only adds."""
    from flax import nnx

    from dms_jax.training.data.rows import Batch

    def make(config: ModelConfig, dtype: Any) -> Decoder:
        return Decoder(config, rngs=nnx.Rngs(0), dtype=dtype)

    steps, trainable, frozen = abstract_retrofit(setting, mesh, make)
    tokens = np.zeros((setting.batch, setting.length), np.int32)
    rows = Batch(tokens, tokens, np.ones(tokens.shape, bool), np.arange(setting.batch, dtype=np.int32))
    batch, seconds, state = place(rows, mesh), [], steps.initial_state(trainable)
    while len(seconds) < 4 or sum(seconds[1:]) < 1.0:
        start = time.perf_counter()
        state, _ = steps.step(state, frozen, batch)
        jax.block_until_ready(state)
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])  # the first one compiles
