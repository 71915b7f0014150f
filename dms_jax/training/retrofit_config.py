"""The configuration of a retrofit: every key with its default, its range and its meaning.

Importing this module does not load JAX, so that `--help`, which prints the keys, is instant. The defaults are the
recipe for the embedded default model (docs/experiments.md); configs/train/ holds recipes for larger models.
"""

import contextlib
import dataclasses
from collections.abc import Collection
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from dms_jax.config import DMSConfig, ImplementationName
from dms_jax.config_reader import Above, AtLeast, Between, build, check_ranges, merge, parse_assignment
from dms_jax.errors import ConfigError, naming, shown
from dms_jax.files import read_yaml
from dms_jax.training.data.token_store import DataConfig

Mode = Literal["adapter", "full", "borrowed"]
Remat = Literal["auto", "full", "matmuls", "none"]
Init = Literal["auto", "fisher", "zero"]
RatioControl = Literal["auto", "threshold", "loss"]


@dataclass(frozen=True)
class LossConfig:
    """The loss: loss/total = loss/distill + compression_weight * loss/compression."""

    order: Annotated[
        Literal["student_teacher", "teacher_student"],
        "direction of the distillation loss; student_teacher is KL(student || teacher), as in the reference",
    ] = "student_teacher"
    compression_weight: Annotated[
        float | None, AtLeast(0), "weight of the compression loss; null: 1, or 0 with ratio_control=threshold"
    ] = None
    scope: Annotated[
        Literal["global", "layer", "head"],
        "where the target evict fraction must hold. global: over the whole model; layer: in each layer; head: in "
        "each KV head",
    ] = "global"
    decidable_only: Annotated[
        bool, "exclude decisions that cannot take effect within the row from the compression loss"
    ] = False

    def __post_init__(self):
        check_ranges(self, "loss.")


@dataclass(frozen=True)
class OptimizerConfig:
    """Settings of optax.adamw.

    Betas, decay and clipping are those of the reference (Model-Optimizer `qwen3_8b.yaml`).
    """

    learning_rate: Annotated[
        float | None, Above(0), "peak learning rate; null: 1.5e-5 with init=fisher, 1e-4 with init=zero"
    ] = None
    warmup_steps: Annotated[
        int | None, AtLeast(0), "number of steps of linear warm-up; null: 2 with init=fisher, 0 with init=zero"
    ] = None
    decay_fraction: Annotated[
        float,
        Between(0, 1),
        "fraction of the steps, at the end, over which the rate falls linearly to a tenth of its peak",
    ] = 0.3
    b1: Annotated[float, Between(0, 1, exclusive_max=True), "decay of Adam's first moment"] = 0.9
    b2: Annotated[float, Between(0, 1, exclusive_max=True), "decay of Adam's second moment"] = 0.95
    weight_decay: Annotated[float, AtLeast(0), "decoupled weight decay"] = 0.0
    clip_norm: Annotated[
        float, Above(0), "largest global norm of the gradient; a larger gradient is scaled down to it"
    ] = 1.0

    def __post_init__(self):
        check_ranges(self, "optimizer.")


@dataclass(frozen=True)
class RetrofitConfig:
    """One run of `python -m train.retrofit`."""

    model: Annotated[
        str,
        'folder, .gguf file or hub id; "" is the embedded default, SmolLM2-135M-Instruct',
    ] = ""
    data: DataConfig = DataConfig()
    output: Annotated[str, "folder for metrics, checkpoints, plots and the exported model"] = "runs/retrofit"
    mode: Annotated[
        Mode,
        "what is trained. adapter: only the evict head, while the base stays frozen; full: all weights, against a "
        "separate frozen teacher; borrowed: all weights, after freeing a channel of a query head to carry the "
        "decisions. dms.decision_shift is 0 by default in mode adapter, and 1 in the others",
    ] = "adapter"
    init: Annotated[
        Init,
        "how the evict head starts. fisher: fitted to what each pair is worth to the dense model; zero: "
        "at 0, where nothing is evicted, or as the model's own policy; auto: fisher, but zero in mode borrowed and for "
        "a model that already has a policy",
    ] = "auto"
    label_rows: Annotated[
        int,
        AtLeast(1),
        "number of training rows whose pairs init=fisher fits the head to",
    ] = 20
    steps: Annotated[
        int | None,
        AtLeast(0),
        "number of optimizer steps; 0: export the head as init=fisher fitted it; null: 0 with init=fisher, 100 with "
        "init=zero",
    ] = None
    length: Annotated[int, AtLeast(2), "tokens per row"] = 1024
    batch_size: Annotated[
        int, AtLeast(0), "rows per optimizer step; 0: one row per data-parallel device and micro-batch"
    ] = 0
    accumulate: Annotated[
        int, AtLeast(1), "number of micro-batches per step; their gradients add up to exactly that of the whole batch"
    ] = 1
    seed: Annotated[int, AtLeast(0), "seed of the noise, the order of rows and the held-out split"] = 0
    mesh: Annotated[
        str,
        "devices as DATAxMODEL[xCONTEXT]. DATA splits the batch and shards the parameters, MODEL splits the KV heads, "
        "CONTEXT splits the length of rows; auto: DATA is the number of devices",
    ] = "auto"
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16"],
        "precision of weights and activations; auto: float32 on a CPU, bfloat16 on accelerators. The master copy of "
        "weights that train is always float32",
    ] = "auto"
    remat: Annotated[
        Remat,
        "what the backward pass recomputes. full: whole layers; matmuls: everything but matrix products; none: "
        "nothing; auto: matmuls on a CPU, full on accelerators",
    ] = "auto"
    implementation: Annotated[
        ImplementationName,
        "implementation of training attention; auto: the fastest one measured on this kind of device",
    ] = "auto"
    dms: DMSConfig = DMSConfig(window_size=128, target_cr=2.8, decision_shift=0)
    ratio_control: Annotated[
        RatioControl,
        "what holds the compression ratio at its target. threshold: a running threshold of the evict logits, so that "
        "the ratio is dms.target_cr from the first step on; loss: the compression loss, whose target rises from "
        "initial_cr to dms.target_cr; auto: threshold with init=fisher, loss with init=zero",
    ] = "auto"
    initial_cr: Annotated[
        float | None,
        AtLeast(1),
        "with ratio_control=loss: target of the nominal compression ratio at the first step, from which it rises to "
        "dms.target_cr; null: 1, or dms.target_cr with init=fisher",
    ] = None
    cr_steps: Annotated[
        int,
        AtLeast(0),
        "with ratio_control=loss: number of steps over which the target rises to dms.target_cr; 0: nine tenths of the "
        "steps",
    ] = 0
    ramp_steps: Annotated[
        int, AtLeast(0), "number of first steps in mode borrowed that free the channel; 0: a third of the steps"
    ] = 0
    loss: LossConfig = LossConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    eval_every: Annotated[int, AtLeast(0), "number of steps between validations; 0: validate only at the end"] = 0
    eval_rows: Annotated[int, AtLeast(1), "number of held-out rows per validation"] = 5
    calibration_rows: Annotated[
        int,
        AtLeast(0),
        "number of training rows on which the eviction threshold is set after training, so that their realised "
        "compression ratio is the target; with ratio_control=loss it is only raised. 0: keep the threshold of training",
    ] = 3
    save_every: Annotated[int, AtLeast(1), "number of steps between checkpoints"] = 50
    keep: Annotated[int, AtLeast(1), "number of complete checkpoints to keep"] = 2
    tensorboard: Annotated[bool, 'also write OUTPUT/tensorboard (pip install "dms-jax[log]")'] = False

    def __post_init__(self):
        check_ranges(self)
        if self.initial_cr is not None and self.dms.target_cr < self.initial_cr:
            raise ConfigError(
                f"dms.target_cr must be at least initial_cr ({self.initial_cr:g}), got {self.dms.target_cr:g}; "
                "the target only rises"
            )
        if self.ramp_steps and self.mode != "borrowed":
            raise ConfigError(f"ramp_steps must be 0 unless mode is borrowed; mode is {self.mode}")
        if not self.output:
            raise ConfigError("output must name a folder, got ''")
        if self.mode == "adapter" and self.dms.variant == "borrowed":
            raise ConfigError("dms.variant=borrowed has no adapter to train; use mode=borrowed")
        self._check_start()
        if self.steps is not None and self.cr_steps + self.ramp_steps > self.steps:
            raise ConfigError(
                f"steps must be at least cr_steps + ramp_steps ({self.cr_steps} + {self.ramp_steps}), got {self.steps}"
            )

    def _check_start(self) -> None:
        """Refuse keys that `init` and `ratio_control` leave without a meaning."""
        if self.mode == "borrowed" and self.dms.head_units:
            raise ConfigError(
                f"dms.head_units must be 0 in mode borrowed, whose head is a query channel; got {self.dms.head_units}"
            )
        if self.init == "fisher" and self.dms.head_units and self.label_rows < 2:
            raise ConfigError(
                "label_rows must be at least 2 with init=fisher and dms.head_units, whose fit holds out a row; got "
                f"{self.label_rows}"
            )
        if self.mode == "borrowed" and self.init == "fisher":
            raise ConfigError("init must be zero or auto in mode borrowed, whose head is a query channel; got fisher")
        if self.init == "fisher" and self.dms.target_cr <= 1:
            raise ConfigError("dms.target_cr must be above 1 with init=fisher, got 1, which evicts nothing")
        if self.init == "zero" and self.steps == 0:
            raise ConfigError("steps must be at least 1 with init=zero, which starts from nothing; got 0")
        no_ramp = self.initial_cr in (None, self.dms.target_cr)
        if self.init == "fisher" and self.ratio_control == "loss" and self.cr_steps and no_ramp:
            raise ConfigError(
                f"cr_steps must be 0 with init=fisher unless initial_cr is below dms.target_cr "
                f"({self.dms.target_cr:g}), because the target starts there and does not rise; got {self.cr_steps}; "
                "give an initial_cr, e.g. 1, or drop cr_steps"
            )
        if self.ratio_control != "threshold":
            return
        if self.mode == "borrowed":
            raise ConfigError(
                "ratio_control must be loss or auto in mode borrowed, which evicts nothing while it frees its channel; "
                "got threshold"
            )
        unused = {
            "initial_cr": not no_ramp,
            "cr_steps": self.cr_steps != 0,
            "loss.compression_weight": self.loss.compression_weight not in (None, 0.0),
            "loss.scope": self.loss.scope != "global",
            "loss.decidable_only": self.loss.decidable_only,
        }
        if given := [name for name, is_given in unused.items() if is_given]:
            raise ConfigError(
                f"{' and '.join(given)} must not be given with ratio_control=threshold (the default of init=fisher), "
                "which has neither a ramp nor a compression loss; drop it, or add ratio_control=loss"
            )

    def resolved(self, has_policy: bool = False) -> "RetrofitConfig":
        """Return a copy in which `init`, `ratio_control` and the keys that are null have their values.

        `has_policy`: whether the model already has a learned policy, whose training continues.
        """
        if self.init == "fisher" and has_policy:
            raise ConfigError(
                "init must be zero or auto for a model that already has a policy, whose training continues; got "
                "fisher; use the base model to start from nothing"
            )
        fitted = self.init == "fisher" or (self.init == "auto" and self.mode != "borrowed" and not has_policy)
        control = self.ratio_control
        if control == "auto":
            control = "threshold" if fitted else "loss"
        steps = _default(self.steps, 0 if fitted else 100)
        config = dataclasses.replace(self, init="fisher" if fitted else "zero", steps=steps, ratio_control=control)
        held = control == "threshold"
        return dataclasses.replace(
            config,
            initial_cr=_default(self.initial_cr, self.dms.target_cr if held or fitted else 1.0),
            loss=dataclasses.replace(
                self.loss, compression_weight=_default(self.loss.compression_weight, 0.0 if held else 1.0)
            ),
            optimizer=dataclasses.replace(
                self.optimizer,
                # After the fit, Adam moves a logit by up to about 5e4 times the rate in a step; at 1.5e-5 that is a
                # fifth of the spread of the logits.
                learning_rate=_default(self.optimizer.learning_rate, 1.5e-5 if fitted else 1e-4),
                warmup_steps=_default(self.optimizer.warmup_steps, 2 if fitted else 0),
            ),
        )

    @property
    def num_steps(self) -> int:
        """`steps`, which `resolved` gives a value."""
        assert self.steps is not None, "the configuration is not resolved"
        return self.steps

    @property
    def rows_at_once(self) -> int:
        """The rows that a micro-batch of a step, or of the label pass, reads. Both are as many, so that they fit."""
        return self.batch_size // self.accumulate

    @property
    def holds_ratio_by_threshold(self) -> bool:
        return self.ratio_control == "threshold"

    @property
    def trained_dms(self) -> DMSConfig:
        """The policy to train. Mode `borrowed` implies the variant `borrowed`."""
        return dataclasses.replace(self.dms, variant="borrowed") if self.mode == "borrowed" else self.dms

    @property
    def first_gated_step(self) -> int:
        """The first step at which gates act: 0, or in mode `borrowed` the step after those that free the channel."""
        return (self.ramp_steps or max(1, self.num_steps // 3)) if self.mode == "borrowed" else 0

    @property
    def rising_steps(self) -> int:
        """Number of steps, from the first gated step on, over which the target ratio rises."""
        return self.cr_steps or max(1, (self.num_steps - self.first_gated_step) * 9 // 10)


def _default(value: Any, default: Any) -> Any:
    return default if value is None else value


# Keys that may differ when a run is resumed, because they do not affect the trained weights.
FREE_ON_RESUME = {
    "mesh",
    "output",
    "eval_every",
    "eval_rows",
    "calibration_rows",
    "save_every",
    "keep",
    "tensorboard",
    "remat",
    "implementation",
}


def read_config(
    path: str | None,
    assignments: list[str],
    mesh: str | None,
    defaults: dict[str, Any] | None = None,
    only: Collection[str] | None = None,
) -> RetrofitConfig:
    """Read the YAML file; assignments of `--set` override its keys, and `--mesh` overrides both.

    `defaults`: values of keys of the top level that are not given, in place of those of `RetrofitConfig`. `only`: the
    keys of the top level that count in the file; None stands for all.
    """
    given: dict[str, Any] = {}
    file = read_yaml(path) if path else {}
    for layer in ({key: file[key] for key in file if only is None or key in only}, *map(parse_assignment, assignments)):
        if not isinstance(layer.get("data", {}), dict):
            layer["data"] = {"paths": layer["data"]}  # `data: FILE`
        _refuse_contradiction(given, layer)
        merge(given, layer)
    if mesh is not None:
        given["mesh"] = mesh
    # The defaults of `dms` are those of this recipe, not those of DMSConfig, also if only some of its keys are given.
    merged: dict[str, Any] = {"dms": dataclasses.asdict(RetrofitConfig().dms)} | (defaults or {})
    # On a frozen base, the hidden state of the next token does not know enough about a pair (docs/experiments.md).
    # Where all weights train, attention can carry it there, so NVIDIA's convention holds.
    if given.get("mode", "adapter") != "adapter":
        merged["dms"]["decision_shift"] = 1
    merge(merged, given)
    with naming(path + (" and --set" if assignments else "")) if path else contextlib.nullcontext():
        return build(RetrofitConfig, merged)


def _refuse_contradiction(given: dict, layer: dict, path: str = "") -> None:
    """Refuse `loss=5` beside `loss.scope=layer`, of which `merge` would keep the later one only."""
    for name in given.keys() & layer.keys():
        values = given[name], layer[name]
        if all(isinstance(value, dict) for value in values):
            _refuse_contradiction(*values, f"{path}{name}.")
        elif any(isinstance(value, dict) for value in values) and None not in values:
            (single,) = (value for value in values if not isinstance(value, dict))
            raise ConfigError(f"`{path}{name}` is given both as {shown(single)} and by keys below it; drop one of them")


def differences(old: dict, new: dict, path: str = "") -> list[str]:
    """List what a resumed run would change in the saved configuration, as `key: old -> new`, except for
    FREE_ON_RESUME."""
    found = []
    for key in sorted(old.keys() | new.keys()):
        name, a, b = f"{path}{key}", old.get(key), new.get(key)
        if name in FREE_ON_RESUME:
            continue
        if isinstance(a, dict) and isinstance(b, dict):
            found += differences(a, b, f"{name}.")
        elif a != b and not (isinstance(a, list | tuple) and isinstance(b, list | tuple) and list(a) == list(b)):
            found.append(f"{name}: {a} -> {b}")
    return found
