"""The configuration of a retrofit: every key, its unit and range. Imports no JAX, so `--help` is instant.

The defaults are the embedded default's recipe (docs/experiments.md); configs/train/ holds those of larger models.
"""

import contextlib
import dataclasses
import typing
from dataclasses import dataclass
from typing import Any, Literal

from dms_jax.config import DMSConfig, ImplementationName
from dms_jax.config_reader import MAX_INT, build, merge, override
from dms_jax.errors import ConfigError, naming, shown
from dms_jax.files import read_yaml
from dms_jax.training.data.token_store import DataConfig

Mode = Literal["adapter", "full", "borrowed"]


@dataclass(frozen=True)
class LossConfig:
    """loss/total = loss/distill + compression_weight * loss/compression."""

    order: Literal["student_teacher", "teacher_student"] = (
        "student_teacher"  # KL(student || teacher) is the reference's
    )
    compression_weight: float = 1.0  # >= 0
    scope: Literal["global", "layer", "head"] = "global"  # over what the target fraction has to hold
    decidable_only: bool = False  # leave decisions that cannot take effect within the row out of the compression loss

    def __post_init__(self):
        if self.compression_weight < 0:
            raise ConfigError(f"loss.compression_weight must be >= 0, got {self.compression_weight!r}")


@dataclass(frozen=True)
class OptimizerConfig:
    """optax.adamw; betas, decay and clipping are the reference's (Model-Optimizer `qwen3_8b.yaml`)."""

    learning_rate: float = 1e-4  # > 0
    warmup_steps: int = 0  # linear from 0
    decay_fraction: float = 0.3  # in [0, 1]; over this last part of the steps the rate falls linearly to a tenth
    b1: float = 0.9
    b2: float = 0.95
    weight_decay: float = 0.0
    clip_norm: float = 1.0  # of the global gradient, > 0

    def __post_init__(self):
        for name in ("learning_rate", "clip_norm"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"optimizer.{name} must be > 0, got {getattr(self, name)!r}")
        if self.warmup_steps < 0 or self.weight_decay < 0:
            raise ConfigError("optimizer.warmup_steps and optimizer.weight_decay must be >= 0")
        if not (0 <= self.b1 < 1 and 0 <= self.b2 < 1 and 0 <= self.decay_fraction <= 1):
            raise ConfigError("optimizer.b1 and optimizer.b2 must be in [0, 1), optimizer.decay_fraction in [0, 1]")


@dataclass(frozen=True)
class RetrofitConfig:
    """One run of `python -m train.retrofit`."""

    model: str = ""  # folder, .gguf file or hub id; "" is the embedded default, SmolLM2-135M-Instruct
    data: DataConfig = DataConfig()  # `data=FILE` is short for data.paths; no paths: the embedded default's text
    output: str = "runs/retrofit"
    mode: Mode = (
        "adapter"  # base frozen | all weights, separate teacher | a query channel, freed first, then all weights
    )
    steps: int = 55  # optimizer steps in all, >= 1
    length: int = 1024  # tokens of a row, >= 2
    batch_size: int = 0  # rows of an optimizer step; 0: one per data-parallel device
    accumulate: int = 1  # micro-batches a step is computed in; equal to the whole batch
    seed: int = 0
    mesh: str = "auto"  # data (batch, fully sharded parameters) x model (KV heads) [x context (length of rows)]; auto: all accelerators as data
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of weights and activations; auto: fp32 on a CPU, else bf16
    remat: Literal["auto", "full", "matmuls", "none"] = (
        "auto"  # recomputed backwards: auto (CPU: matmuls, else full) | layers | no product | nothing
    )
    implementation: ImplementationName = "auto"  # of attention; auto: the fastest that was measured on the device
    dms: DMSConfig = DMSConfig(window_size=128, target_cr=2.8)
    initial_cr: float = 1.0  # >= 1; nominal ratio at the first step
    cr_steps: int = 0  # steps from initial_cr to dms.target_cr; 0: nine tenths of the steps
    ramp_steps: int = 0  # `borrowed` only: steps that free the channel; 0: a third of the steps
    loss: LossConfig = LossConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    eval_every: int = 0  # steps between validations; 0: at the end only
    eval_rows: int = 10  # held-out rows of a validation
    calibration_rows: int = (
        4  # after training, training rows on which the threshold is raised until CR is not above target; 0: none
    )
    save_every: int = 50  # steps between checkpoints
    keep: int = 2  # checkpoints that stay
    tensorboard: bool = False  # also write OUTPUT/tensorboard (pip install "dms-jax[log]")

    def __post_init__(self):
        at_least = {
            "steps": 1,
            "length": 2,
            "batch_size": 0,
            "accumulate": 1,
            "initial_cr": 1,
            "cr_steps": 0,
            "ramp_steps": 0,
            "eval_every": 0,
            "eval_rows": 1,
            "calibration_rows": 0,
            "save_every": 1,
            "keep": 1,
            "seed": 0,
        }
        for name, least in at_least.items():
            if not least <= getattr(self, name) <= MAX_INT:
                raise ConfigError(f"{name} must be >= {least} and below 2**31, got {shown(getattr(self, name))}")
        if self.dms.target_cr < self.initial_cr:
            raise ConfigError(
                f"dms.target_cr ({self.dms.target_cr:g}) is below initial_cr ({self.initial_cr:g}); the ratio only rises"
            )
        if max(self.cr_steps, self.ramp_steps) + (self.ramp_steps if self.cr_steps else 0) > self.steps:
            raise ConfigError(
                f"cr_steps ({self.cr_steps}) and ramp_steps ({self.ramp_steps}) do not fit into steps ({self.steps})"
            )
        if self.ramp_steps and self.mode != "borrowed":
            raise ConfigError(f"ramp_steps belongs to mode borrowed; mode is {self.mode}")
        if not self.output:
            raise ConfigError("output is empty; name a folder")

        if self.mode == "adapter" and self.dms.variant == "borrowed":
            raise ConfigError("the borrowed variant has no adapter to train; use mode=borrowed")

    @property
    def trained_dms(self) -> DMSConfig:
        """The policy that is trained: mode `borrowed` means its variant."""
        return dataclasses.replace(self.dms, variant="borrowed") if self.mode == "borrowed" else self.dms

    @property
    def first_gated_step(self) -> int:
        """Steps of `borrowed` before any gate acts."""
        return (self.ramp_steps or max(1, self.steps // 3)) if self.mode == "borrowed" else 0

    @property
    def rising_steps(self) -> int:
        """Steps, after the ramp, in which the nominal ratio rises."""
        return self.cr_steps or max(1, (self.steps - self.first_gated_step) * 9 // 10)


# The embedded default's run is so short that it learns with shift 0 only: a token then decides about itself, so the attention sink,
# which every head needs, is kept by its own unmistakable hidden state. With shift 1 the token after it has to know
# (docs/experiments.md). Models of your own get 1, NVIDIA's convention, unless they say otherwise.
EMBEDDED_DEFAULT = {"decision_shift": 0}

# Keys that may change when a run is resumed: they do not change what is trained.
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


def read_config(path: str | None, assignments: list[str], mesh: str | None) -> RetrofitConfig:
    """YAML file, then `--set`, then `--mesh`; strict."""
    raw = read_yaml(path) if path else {}
    # The nested defaults are this recipe's, not the classes': a key that is given must not reset its neighbours.
    merged: dict[str, Any] = {"dms": dataclasses.asdict(RetrofitConfig().dms)}
    if not raw.get("model") and not any(a.partition("=")[0].strip() == "model" for a in assignments):
        merged["dms"] |= EMBEDDED_DEFAULT
    merge(merged, raw)
    for assignment in assignments:
        if assignment.partition("=")[0].strip().startswith("data.") and not isinstance(merged.get("data", {}), dict):
            merged["data"] = {"paths": merged["data"]}
        override(merged, assignment)
    if mesh is not None:
        merged["mesh"] = mesh
    if not isinstance(merged.get("data", {}), dict):
        merged["data"] = {"paths": merged["data"]}
    with naming(path + (" and --set" if assignments else "")) if path else contextlib.nullcontext():
        return build(RetrofitConfig, merged)


def differences(old: dict, new: dict, path: str = "") -> list[str]:
    """What of a saved config a resumed run would change, as `key: old -> new`, without the keys that are free to."""
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


def keys_help() -> str:
    """Every key with its default, for --help."""
    lines = []

    def add(config, path: str) -> None:
        for f in dataclasses.fields(config):
            value = getattr(config, f.name)
            if dataclasses.is_dataclass(value):
                add(value, f"{path}{f.name}.")
            else:
                kind = typing.get_type_hints(type(config))[f.name]
                choices = (
                    f"  ({' | '.join(map(str, typing.get_args(kind)))})" if typing.get_origin(kind) is Literal else ""
                )
                lines.append(f"  {path}{f.name} = {value!r}{choices}")

    add(RetrofitConfig(), "")
    return "\n".join(lines)
