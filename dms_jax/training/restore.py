"""Find the state that a run continues from, its newest usable checkpoint, and decide whether it belongs to the run."""

import dataclasses
import json
from typing import Any, NamedTuple

from dms_jax.axes import Array
from dms_jax.config_reader import merge
from dms_jax.errors import ConfigError
from dms_jax.models.parameters import Params
from dms_jax.training.metrics import run_header
from dms_jax.training.prepare import PreparedRun
from dms_jax.training.retrofit_config import RetrofitConfig, differences
from dms_jax.training.step import TrainState


class _WithoutThreshold(NamedTuple):
    """A TrainState without a threshold as checkpoints hold it, which is also how they held it before there was one."""

    step: Array
    trainable: Params
    opt_state: Any


def stored(state: TrainState) -> NamedTuple:
    """Return a state, or its shapes, as checkpoints hold it: they cannot hold None."""
    return _WithoutThreshold(*state[:3]) if state.threshold is None else state


def restore(run: PreparedRun, resume: bool, accept_changes: bool) -> TrainState | None:
    """Return the state to continue from, or None if there is none, and begin the log.

    `accept_changes`: continue even if settings or data differ from those of the checkpoint. A different base model is
    always refused.
    """
    found = None
    if resume:
        found = run.checkpoints.restore_latest(
            stored(run.steps.abstract_state), lambda metadata: check_checkpoint(run, metadata, accept_changes)
        )
        if found is None:
            run.say(f"no complete checkpoint in {run.output}: starting at step 0")
        else:
            where = f"resumed at step {found.step} of {run.config.steps}"
            run.say("; skipped checkpoint ".join([where, *found.skipped]))
    if run.is_writer:
        resumed_at = (found.step if found is not None else 0) if resume else None
        hashes = {"base_hash": run.base_hash, "data_hash": run.data.content_hash}
        run.log.begin(run_header(saved_config(run), hashes), resumed_at)
    return None if found is None else TrainState(*found.state)


def checkpoint_metadata(run: PreparedRun) -> dict:
    """Return the metadata that is saved with the arrays of each checkpoint."""
    return {
        "config": saved_config(run),
        "base_hash": run.base_hash,
        "data_hash": run.data.content_hash,
        "format": 1,
    }


def saved_config(run: PreparedRun) -> dict:
    """Return the configuration as plain JSON values."""
    return _plain(run.config)


def _plain(config: RetrofitConfig) -> dict:
    return json.loads(json.dumps(dataclasses.asdict(config)))


def check_checkpoint(run: PreparedRun, metadata: dict, accept_changes: bool) -> None:
    """Refuse a checkpoint whose metadata says that it belongs to another run."""
    where = run.output / "checkpoints"
    if metadata.get("base_hash") != run.base_hash:
        raise ConfigError(f"{where} was trained on another base model; use that model, or another --set output=FOLDER")
    saved = _plain(RetrofitConfig())  # for keys that are newer than the checkpoint
    saved |= {"init": "zero", "ratio_control": "loss"}  # the only ones there were before these keys
    merge(saved, metadata.get("config", {}))
    changed = differences(saved, saved_config(run))
    same_data = metadata.get("data_hash", run.data.content_hash) == run.data.content_hash
    if not changed and not same_data:  # the paths are equal, but the contents differ
        changed = ["data: other data under the same paths"]
    if changed and not accept_changes:
        raise ConfigError(
            f"{where} was saved with different settings ({'; '.join(changed)}); use the same settings, or add "
            "--accept-changes"
        )
