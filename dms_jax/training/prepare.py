"""Prepare a retrofit: read the models and the data, and build the step functions, before anything is written."""

import dataclasses
import functools
import sys
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from dms_jax.checkpoint import Checkpoints
from dms_jax.config import DMSConfig, ModelConfig
from dms_jax.errors import ConfigError
from dms_jax.hf.folder import base_hash, load, open_source, policy_origin, resolve
from dms_jax.hf.hf_tokenizer import load_tokenizer
from dms_jax.kernels.head_split import uneven_heads
from dms_jax.models.decoder import Decoder
from dms_jax.models.parameters import Params
from dms_jax.platform_defaults import default_dtype
from dms_jax.sharding import make_mesh, parse_mesh, replicated_axes
from dms_jax.training.data.default_assets import default_model, default_text
from dms_jax.training.data.documents import expand_paths
from dms_jax.training.data.rows import Rows
from dms_jax.training.data.token_store import DataSummary, load_rows
from dms_jax.training.metrics import MetricsFile
from dms_jax.training.retrofit_config import RetrofitConfig
from dms_jax.training.run_monitor import target_advice
from dms_jax.training.step import take_apart
from dms_jax.training.step_functions import StepFunctions, step_functions


@dataclass(frozen=True, eq=False)
class PreparedRun:
    """The inputs of a run, its compiled functions, and the files that it writes."""

    config: RetrofitConfig
    mesh: Mesh
    model_path: str
    base_hash: str
    steps: StepFunctions
    trainable: Params  # as loaded; the first step may donate their buffers
    frozen: Params
    train_rows: Rows
    held_out: Rows
    data: DataSummary
    notes: tuple[str, ...]  # lines to print before the first step

    @property
    def output(self) -> Path:
        return Path(self.config.output)

    @property
    def metrics_path(self) -> Path:
        return self.output / "metrics.jsonl"

    @property
    def is_writer(self) -> bool:
        """Whether this process writes files and prints. Only one process does, but all write checkpoints."""
        return jax.process_index() == 0

    # Checkpoints and log are opened on first use, because a dry run must not write anything.

    @functools.cached_property
    def checkpoints(self) -> Checkpoints:
        return Checkpoints(self.output / "checkpoints", self.config.keep)

    @functools.cached_property
    def log(self) -> MetricsFile:
        return MetricsFile(self.metrics_path, self.config.tensorboard)

    def record(self, values: dict) -> None:
        """Append a line to metrics.jsonl."""
        if self.is_writer:
            self.log.append(values)

    def say(self, text: str) -> None:
        """Print a line to stderr."""
        if self.is_writer:
            print(text, file=sys.stderr)


def prepare(config: RetrofitConfig) -> PreparedRun:
    """Read models and data and build the step functions.

    JAX must have been started for `config.mesh`. Nothing is written except to the caches of data and models.
    """
    mesh = make_mesh(*parse_mesh(config.mesh))
    path = resolve(config.model or default_model(config.data.cache_dir))
    base = open_source(path)[1]
    limit, name = base.context_limit()
    if config.length > limit:
        raise ConfigError(f"length must be at most the model's {name} of {limit}, got {config.length}")
    config = config.resolved(has_policy=base.dms is not None)
    dms = trained_policy(config, base, path)
    dtype = jnp.dtype(default_dtype() if config.dtype == "auto" else config.dtype)
    model, teacher = load_models(config, path, dms, mesh, dtype)
    train_rows, held_out, data = read_rows(config, path, base.vocab_size)
    math, trainable, frozen = take_apart(model, teacher, config, mesh, dtype)
    return PreparedRun(
        config=config,
        mesh=mesh,
        model_path=path,
        base_hash=base_hash(model),
        steps=step_functions(math, trainable),
        trainable=trainable,
        frozen=frozen,
        train_rows=train_rows,
        held_out=held_out,
        data=data,
        notes=(*model_notes(config, base, path, dms, mesh), *filter(None, [policy_origin(model)]), str(data)),
    )


def trained_policy(config: RetrofitConfig, base: ModelConfig, path: str) -> DMSConfig:
    """Return the policy to train: that of the configuration, or the one that the model already has.

    A model's own policy gets the window, the target and the temperature of the configuration.
    """
    if base.dms is None:
        return config.trained_dms
    given = config.trained_dms
    if given.head_units not in (0, base.dms.head_units):
        raise ConfigError(
            f"dms.head_units must be {base.dms.head_units}, as in the policy that {path} already has, got "
            f"{given.head_units}; drop it, or use the base model to start from nothing"
        )
    dms = dataclasses.replace(base.dms, window_size=given.window_size, target_cr=given.target_cr, tau=given.tau)
    if config.mode != "full" and (config.mode == "borrowed") != (dms.variant == "borrowed"):
        raise ConfigError(
            f"mode {config.mode} cannot train the {dms.variant} policy that {path} already has; use its base model, "
            "or mode=full"
        )
    return dms


def load_models(
    config: RetrofitConfig, path: str, dms: DMSConfig, mesh: Mesh, dtype: jnp.dtype
) -> tuple[Decoder, Decoder | None]:
    """Load (student, teacher). In mode `adapter` the teacher is None, because the student is its own teacher."""
    options = {"mesh": mesh, "implementation": config.implementation}
    if config.mode == "adapter":
        return load(path, dtype=dtype, dms=dms, **options), None
    teacher = load(path, dtype=dtype, **options)
    # Weights that train are read in fp32, because bf16 could not hold their updates.
    return load(path, dtype=jnp.float32, dms=dms, **options), teacher


def read_rows(config: RetrofitConfig, model_path: str, vocab_size: int) -> tuple[Rows, Rows, DataSummary]:
    """Read (training rows, held-out rows, summary)."""
    data = config.data
    if not data.paths:
        data = dataclasses.replace(data, paths=tuple(str(text) for _, text in default_text(data.cache_dir)))
    # Expand the paths before anything slow, so that a missing file is reported at once.
    files = expand_paths((*data.paths, *data.eval_paths))
    tokenizer = None if all(name.endswith(".npy") for name in files) else load_tokenizer(model_path)
    return load_rows(data, tokenizer, config.length, config.seed, vocab_size)


def model_notes(config: RetrofitConfig, base: ModelConfig, path: str, dms: DMSConfig, mesh: Mesh) -> list[str]:
    """Return sentences about anything unusual in the combination of model, mesh and policy."""
    sizes = {
        "batch": config.batch_size,
        "kv_heads": base.num_kv_heads,
        "q_heads": base.num_q_heads,
        "embed": base.hidden_size,
        "mlp": base.intermediate_size,
        "vocab": base.vocab_size,
        "sequence": config.length,
    }
    notes = [] if base.dms is None else [f"{path} already has a policy ({dms.variant}), whose training continues"]
    if config.mode == "adapter" and base.dms is None and dms.decision_shift:
        notes.append(
            "note: dms.decision_shift=1 lets the next token decide about a pair; on a frozen base, its hidden state "
            "does not know enough about the pair, which costs several times the loss of dms.decision_shift=0"
        )
    notes += [f"note: {sentence}" for sentence in replicated_axes(sizes, mesh)]
    notes += [f"note: {sentence}" for sentence in uneven_heads(base.num_q_heads, base.num_kv_heads, mesh)]
    if (advice := target_advice(config.length, dms)) is not None:
        notes.append(f"warning: {advice}")
    return notes
