"""Plan one retrofit step: its memory, work, communication and time, as figures.

The figures come from the step compiled for its hardware, or from estimates. Begin with `planned`.
"""

import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from dms_jax.errors import ConfigError
from dms_jax.kernels.dispatch import AUTO, GPU, IMPLEMENTATIONS, TPU, XLA, KernelQuery, select_implementation
from dms_jax.kernels.tuned import tuned_entry
from dms_jax.planning import memory_estimate, roofline
from dms_jax.planning.figures import Figure
from dms_jax.planning.flops import step_flops
from dms_jax.planning.hardware import KIND_NAMES
from dms_jax.planning.hlo_collectives import collectives
from dms_jax.planning.memory_estimate import MemoryEstimate, program_bytes, with_compiled
from dms_jax.training.fisher_init import MAX_PAIRS, num_kept
from dms_jax.training.label_file import label_file_bytes
from dms_jax.training.planning import step_program
from dms_jax.training.planning.step_setting import StepSetting
from dms_jax.training.retrofit_config import RetrofitConfig

TOTAL = (
    "if compiled: arguments + outputs - aliased + temporary, where weights are the arguments without the optimizer "
    "state, and activations and logits are estimated parts of temporary; otherwise: the sum of the parts"
)
FLOPS = (
    "tokens x (two forward passes of 2 P + 2 L N H T each, and a backward pass of 2 P, or 4 P if all weights "
    "train, + 5 L N H T)"
)
MOVED = "devices x bf16 weights x passes, plus what the operations between the matrix products read and write per token"
STEPS_PER_CR, TOKENS_PER_STEP = 34, 262144  # Model-Optimizer's recipe for Qwen3-8B, configs/train/qwen3_8b.yaml
RATIOS = (2, 4, 8)


class StepFacts(NamedTuple):
    """The inputs of the figures of a step."""

    implementation: str  # of training attention
    estimate: MemoryEstimate
    memory: MemoryEstimate  # the compiler's figures if the step was compiled, otherwise the estimate
    sent: dict[str, float]  # bytes that each device sends, by kind of collective
    source: Literal["compiled", "analytic"]
    label_bytes: float | None = None  # per device, of the label pass of init=fisher; None without one


class StepPlan(NamedTuple):
    setting: StepSetting
    implementation: str
    figures: list[Figure]

    def value(self, name: str) -> Any:
        return next(figure.value for figure in self.figures if figure.name == name)


def planned(setting: StepSetting, analytic: bool) -> StepPlan:
    """Plan one step; with `analytic`, compile nothing."""
    facts = estimated_facts(setting) if analytic else compiled_facts(setting)
    return StepPlan(setting, facts.implementation, step_figures(setting, facts))


def estimated_facts(setting: StepSetting) -> StepFacts:
    memory = estimate(setting)
    sent, labels = estimated_exchange(setting), estimated_labels(setting) if setting.has_labels else None
    return StepFacts(_implementation(setting, True), memory, memory, sent, "analytic", labels)


def compiled_facts(setting: StepSetting) -> StepFacts:
    mesh = step_program.mesh_of(setting, analytic=False)
    with jax.set_mesh(mesh):
        implementation = _implementation(setting, False)
    compiled = step_program.compiled(setting, mesh)
    analysis: Any = compiled.memory_analysis()
    total, estimated = program_bytes(analysis), estimate(setting)
    temporary = analysis.temp_size_in_bytes
    sent = roofline.sent_bytes(collectives(compiled.as_text() or ""))
    labels = None
    if setting.has_labels:
        of_labels: Any = step_program.compiled_labels(setting, mesh).memory_analysis()
        # The optimizer state and a separate teacher are no arguments of this program, but they are in memory.
        held = estimated.weights + estimated.optimizer + step_program.label_sum_bytes(setting, mesh)
        labels = held + of_labels.temp_size_in_bytes
    memory = with_compiled(estimated, total - temporary, temporary)
    return StepFacts(implementation, estimated, memory, sent, "compiled", labels)


def estimate(setting: StepSetting) -> MemoryEstimate:
    """Estimate the bytes per device by kind. Weights and optimizer state are counted from their shards."""
    trainable, frozen, optimizer = step_program.state_bytes(setting, step_program.mesh_of(setting, analytic=True))
    weights = trainable + frozen
    return memory_estimate.estimated_memory(setting.model, setting.micro_batch, weights, optimizer, trainable)


def estimated_labels(setting: StepSetting) -> float:
    """Estimate the bytes per device of the label pass of init=fisher."""
    mesh = step_program.mesh_of(setting, analytic=True)
    trainable, frozen, optimizer = step_program.state_bytes(setting, mesh)
    sums, weights = step_program.label_sum_bytes(setting, mesh), trainable + frozen
    micro, length = setting.micro_batch, setting.step.length
    pairs = micro.tokens / length * num_kept(setting.model, length)
    return memory_estimate.estimated_label_bytes(setting.model, micro, weights, optimizer, trainable, sums, pairs)


def estimated_exchange(setting: StepSetting) -> dict[str, float]:
    c = setting.step
    return roofline.exchanged_bytes(setting.model, setting.mesh_sizes, setting.tokens, c.accumulate, c.mode)


def step_figures(setting: StepSetting, facts: StepFacts) -> list[Figure]:
    """Compute all figures of a step: memory, work, communication and time."""
    return [*_memory_figures(setting, facts), *_work_figures(setting), *_time_figures(setting, facts)]


def _memory_figures(setting: StepSetting, facts: StepFacts) -> list[Figure]:
    memory, source, hardware = facts.memory, facts.source, setting.hardware
    usable = hardware.usable_bytes
    if hardware.platform == "cpu":
        usable /= hardware.count  # simulated devices share the memory of the machine
    parts = [
        Figure(
            f"bytes_per_device.{kind}",
            size,
            "bytes",
            "analytic" if kind in ("activations", "logits") else source,
            memory_estimate.FORMULAS[kind],
        )
        for kind, size in memory._asdict().items()
    ]
    labels, fits = [], "bytes_per_device.total <= memory_per_device"
    if facts.label_bytes is not None:
        labels = [
            Figure("label_bytes_per_device", facts.label_bytes, "bytes", source, memory_estimate.LABELS),
            _label_file_figure(setting),
        ]
        fits += ", and label_bytes_per_device, too"
    return [
        Figure("fits", max(memory.total, facts.label_bytes or 0) <= usable, "", source, fits),
        Figure("bytes_per_device", {}, "bytes", source),
        *parts,
        Figure("bytes_per_device.total", memory.total, "bytes", source, TOTAL),
        *labels,
        Figure("estimated_bytes_per_device", facts.estimate.total, "bytes", "analytic"),
        Figure("memory_per_device", usable, "bytes", "assumed", note=hardware.source),
        Figure("collective_bytes_per_device", facts.sent, "bytes", source, roofline.EXCHANGED),
    ]


def _label_file_figure(setting: StepSetting) -> Figure:
    """Count what the fit of the evict head needs on the disk of the output folder."""
    rows = RetrofitConfig().label_rows
    size = label_file_bytes(setting.model, rows, setting.step.length)
    formula = (
        f"{rows} label_rows x L x pairs that can leave, at most {MAX_PAIRS}, x (2 D + 4 K + 4): a file in the output "
        "folder, removed after the fit, of which the host and one device hold a layer at a time"
    )
    return Figure("label_file_bytes", size, "bytes", "analytic", formula)


def _weight_bytes(setting: StepSetting) -> float:
    """Bytes of weights that each device reads in a step."""
    c = setting.step
    return roofline.weight_bytes(setting.model, setting.mesh_sizes.model, c.mode, c.remat) * c.accumulate


def _step_work(setting: StepSetting) -> roofline.StepWork:
    c = setting.step
    return roofline.step_work(setting.model, setting.tokens, c.length, c.mode, c.remat)


def _model_flops(setting: StepSetting) -> float:
    return step_flops(setting.model, setting.step.length, setting.step.mode) * setting.tokens


def _work_figures(setting: StepSetting) -> list[Figure]:
    work = _step_work(setting)
    executed, moved = work.products + work.attention, work.moved + _weight_bytes(setting) * setting.hardware.count
    recomputed = "flops_per_step plus what remat recomputes"
    return [
        Figure("flops_per_step", _model_flops(setting), "FLOPs", "analytic", FLOPS),
        Figure("flops_executed_per_step", executed, "FLOPs", "analytic", recomputed),
        Figure("bytes_per_step", moved, "bytes", "analytic", MOVED),
    ]


def _time_figures(setting: StepSetting, facts: StepFacts) -> list[Figure]:
    chip, devices = setting.hardware.chip, setting.hardware.count
    if chip is None:
        seconds, how = step_program.cpu_seconds(setting, step_program.mesh_of(setting, analytic=False))
        found = [Figure("seconds_per_step", seconds, "s", "measured", note=how)]
    else:
        rates = roofline.rates_of(chip, facts.implementation)
        times = roofline.step_time(
            _step_work(setting), devices, _weight_bytes(setting), sum(facts.sent.values()), rates
        )
        origins = rates.sources | {"communication": f"{facts.source} bytes; {rates.sources['link']}"}
        found = [
            Figure(f"seconds.{part}", seconds, "s", "analytic", note=origins[part])
            for part, seconds in times._asdict().items()
        ]
        seconds, how = times.total, ""
        mfu, peak = (
            _model_flops(setting) / seconds / devices / rates.peak,
            f"analytic; peak: data sheet ({chip.source})",
        )
        found += [
            Figure("seconds_per_step", seconds, "s", "analytic", roofline.TOTAL_FORMULA),
            Figure(
                "mfu",
                mfu,
                "fraction",
                "analytic",
                "flops_per_step / seconds_per_step / devices / dense bf16 peak",
                peak,
            ),
        ]
    source, formula = found[-1 if chip is None else -2].source, "batch x length / seconds_per_step"
    if setting.has_labels:
        found += _label_figures(setting, facts, next(f for f in found if f.name == "seconds_per_step"))
    return [*found, Figure("tokens_per_second", setting.tokens / seconds, "tokens/s", source, formula, how)]


def _label_seconds(setting: StepSetting, facts: StepFacts) -> tuple[float, str]:
    """Return the seconds of the label pass over the rows that it reads at one time, and where they are from."""
    chip, c = setting.hardware.chip, setting.step
    if chip is None:
        return step_program.cpu_seconds(setting, step_program.mesh_of(setting, analytic=False), labels=True)
    rates = roofline.rates_of(chip, facts.implementation)
    tokens = setting.step.rows_at_once * c.length
    work = roofline.label_work(setting.model, tokens, c.length, c.remat, chip.platform)
    weights, sent = _weight_bytes(setting) / c.accumulate, sum(facts.sent.values()) / c.accumulate
    seconds = roofline.step_time(work, setting.hardware.count, weights, sent, rates).total
    return seconds, "it reads weights and communicates as much as a micro-batch of a step"


def _label_figures(setting: StepSetting, facts: StepFacts, seconds_per_step: Figure) -> list[Figure]:
    """Predict the time of the label pass of init=fisher, and of a retrofit with the default numbers of rows and steps.

    Validation, checkpoints and compilation are not included.
    """
    default, at_once = RetrofitConfig().resolved(), setting.step.rows_at_once
    rows, steps = default.label_rows, default.num_steps
    seconds, note = _label_seconds(setting, facts)
    seconds *= math.ceil(rows / at_once)
    source = seconds_per_step.source
    formula = f"{rows} label_rows, {at_once} at a time: a forward pass, a backward pass and fp32 products each"
    whole = seconds + steps * seconds_per_step.value
    total = f"seconds_of_labels + {steps} steps x seconds_per_step, the default of a retrofit"
    return [
        Figure("seconds_of_labels", seconds, "s", source, formula, note),
        Figure("seconds_of_retrofit", whole, "s", source, total),
    ]


def ramp_figures(setting: StepSetting, seconds_per_step: Figure, steps_per_cr: float) -> list[Figure]:
    """Compute the steps and hours from CR 1 to each of RATIOS by the recipe of the paper, which needs no labels.

    Validation and checkpoints are not included. `steps_per_cr` 0 stands for the recipe of the reference.
    """
    given = "given" if steps_per_cr else ""
    recipe = f"{STEPS_PER_CR} x max(1, {TOKENS_PER_STEP} / tokens of a step), Model-Optimizer's recipe"
    steps_per_cr = steps_per_cr or STEPS_PER_CR * max(1.0, TOKENS_PER_STEP / setting.tokens)
    found = [
        Figure("steps_per_cr", steps_per_cr, "steps", "assumed" if given else "analytic", given or recipe, note=given)
    ]
    ramp = 1.0
    formula = "(CR - 1) x steps_per_cr x seconds_per_step / 3600; the recipe of the paper: the ratio rises from 1"
    if (
        setting.step.mode == "borrowed"
    ):  # by default, 1/3 of the steps free the channel and 9/10 of the others raise the ratio
        ramp += (1 / 3) / (0.9 * 2 / 3)
        formula += f", x {ramp:.2f} because the channel is freed first"
    for ratio in RATIOS:
        hours = (ratio - 1) * ramp * steps_per_cr * seconds_per_step.value / 3600
        found.append(Figure(f"hours_to_cr{ratio}", hours, "h", seconds_per_step.source, formula, seconds_per_step.note))
    return found


def _implementation(setting: StepSetting, analytic: bool) -> str:
    """Find the implementation of training attention that `dispatch` selects on hardware that need not be at hand."""
    named, head_dim, platform = setting.model.implementation, setting.model.head_dim, setting.hardware.platform
    if not analytic or platform == "cpu":
        return select_implementation("train_attention", KernelQuery(head_dim, jnp.bfloat16), named).name
    kind = KIND_NAMES[setting.hardware.kind]
    if named != AUTO:
        found = IMPLEMENTATIONS[named]
        if found.platform not in (None, platform) or found.refuses(KernelQuery(head_dim, jnp.bfloat16), kind):
            raise ConfigError(
                f"implementation {named} does not run on {setting.hardware.name} with head size {head_dim}; use "
                f"{XLA} or {AUTO}"
            )
        return named
    kernel = GPU if platform == "gpu" else TPU
    entry = tuned_entry("train_attention", kernel, kind, head_dim, "bfloat16")
    return kernel if entry is not None and entry.speed_to_xla >= 1 else XLA
