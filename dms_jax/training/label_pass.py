"""The start of a run with init=fisher: labels of pairs from rows of the training data, and the head fitted to them.

Sums over the rows (`LabelSums`) are saved in `checkpoints/labels` every few rows, and the pairs themselves beside them
(`HeadFit`), so that a stopped run goes on from there. Both are removed once the state with the fitted head is the
checkpoint of step 0. Begin with `first_state`.
"""

import contextlib
import shutil
import signal
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from tqdm import tqdm

from dms_jax.checkpoint import Checkpoints
from dms_jax.errors import ConfigError
from dms_jax.training.data.rows import PADDING, Batch
from dms_jax.training.fisher_init import MIN_QUERIES, LabelSums
from dms_jax.training.head_fit import HeadFit
from dms_jax.training.placement import local_rows, place
from dms_jax.training.prepare import PreparedRun
from dms_jax.training.restore import check_checkpoint, checkpoint_metadata, stored
from dms_jax.training.step import TrainState
from dms_jax.training.stop_signal import StopSignal
from dms_jax.training.validate import scores_of_rows, threshold_at_target

SAVE_ROWS = 8  # rows between two checkpoints of the sums, which hold D x D numbers per layer
ORDER_SEED = 2**31  # added to the seed of a run, so that its labels come from other rows than its first steps


def first_state(run: PreparedRun, stop: StopSignal, resume: bool, accept_changes: bool) -> tuple[TrainState, int]:
    """Make the state before the first step.

    Returns it, and the number of the signal that stopped the label pass early, or 0. `resume` continues a label pass
    that was stopped.
    """
    state = run.steps.initial_state(run.trainable)
    if run.config.init == "zero":
        return state, 0
    folder = run.output / "checkpoints" / "labels"
    if not resume:
        _remove(run, folder)
    with (
        contextlib.closing(Checkpoints(folder, keep=1)) as checkpoints,
        contextlib.closing(HeadFit(run, folder)) as kept,
    ):
        sums, number = _labels(run, state, checkpoints, kept, stop, resume, accept_changes)
        if number:
            return state, number
        check_counted(sums, run.steps.math.dms.window_size)
        head, units, number = kept.fit(state, sums, stop)
        if number:
            return state, number
    state = run.steps.fitted_state(state, head, units)
    if run.config.holds_ratio_by_threshold:
        state = _with_threshold(run, state)
    run.checkpoints.save(0, stored(state), checkpoint_metadata(run), wait=True)
    _remove(run, folder)
    return state, 0


def _labels(
    run: PreparedRun,
    state: TrainState,
    checkpoints: Checkpoints,
    kept: HeadFit,
    stop: StopSignal,
    resume: bool,
    accept_changes: bool,
) -> tuple[LabelSums, int]:
    """Return the sums over `label_rows` rows, and the number of the signal that stopped the pass early, or 0."""
    c, steps, done = run.config, run.steps, 0
    sums = steps.no_labels()
    if resume:
        found = checkpoints.restore_latest(
            steps.abstract_labels, lambda metadata: check_checkpoint(run, metadata, accept_changes)
        )
        if found is not None and not kept.holds(found.step):
            run.say(f"{checkpoints.folder} lacks the pairs of its rows, so the labels begin at row 0")
        elif found is not None:
            done, sums = found.step, found.state
            where = f"resumed at row {done} of the {c.label_rows} label rows"
            run.say("; skipped checkpoint ".join([where, *found.skipped]))
    size, number = c.rows_at_once, 0
    with tqdm(total=c.label_rows, initial=done, unit="row", desc="labels", disable=not run.is_writer) as bar:
        while done < c.label_rows and not number:
            rows = place_rows(run, done, size)
            sums, pairs = jax.block_until_ready(steps.add_labels(sums, state, run.frozen, rows))
            before, done = done, min(done + size, c.label_rows)
            kept.keep(pairs, before, done)
            number = stop.agreed()
            if number or done == c.label_rows or done // SAVE_ROWS > before // SAVE_ROWS:
                check_finite(sums, before, done)
                kept.flush()
                checkpoints.save(done, sums, checkpoint_metadata(run), wait=bool(number))
            bar.update(done - before)
    if number:
        name = signal.Signals(number).name
        run.say(f"{name}: saved at row {done} of the {c.label_rows} label rows; continue with --resume")
    return sums, number


def _with_threshold(run: PreparedRun, state: TrainState) -> TrainState:
    """Set the threshold of a fitted head so that a batch of label rows realises the target ratio.

    The head alone evicts too much or too little, since its logits are not normally distributed. Steps at a wrong ratio
    would be wasted, and runs have few.
    """
    c = run.config
    rows = run.train_rows.batch(0, c.rows_at_once, c.seed + ORDER_SEED)
    threshold = threshold_at_target(run, scores_of_rows(run, state, [rows]), tolerance=0.05, most_runs=3)
    assert state.threshold is not None, "a run that holds its ratio by a threshold has one"
    return state._replace(threshold=state.threshold + np.float32(threshold))  # 0 so far; keeps its sharding


def place_rows(run: PreparedRun, start: int, size: int) -> Batch:
    """Return `size` label rows on the mesh, beginning with row `start`. Rows after the last one are padding."""
    c = run.config
    first, count = local_rows(size, run.mesh)
    host = run.train_rows.batch(0, size, c.seed + ORDER_SEED, start + first, count)
    is_label = start + first + np.arange(count) < c.label_rows
    return place(
        host._replace(segment_ids=np.where(is_label[:, None], host.segment_ids, PADDING)), run.mesh, size, first
    )


def check_finite(sums: LabelSums, first: int, end: int) -> None:
    """Refuse sums that became NaN or infinite with the label rows `first` to `end` - 1."""
    if not all(np.isfinite(jax.device_get(jnp.sum(array))) for array in sums):
        raise ConfigError(
            f"the labels of rows {first} to {end - 1} of the label rows are not finite, so the head cannot be fitted; "
            "check the weights of the model and the data (a retrofit with init=zero needs no labels)"
        )


def check_counted(sums: LabelSums, window_size: int) -> None:
    """Refuse sums over no pair at all, to which no head can be fitted."""
    if not float(sums.weight) > 0:
        least = window_size + MIN_QUERIES + 1
        raise ConfigError(
            f"the head cannot be fitted, because the label rows have no pair that {MIN_QUERIES} queries beyond a "
            f"window of {window_size} could miss; use documents and a length of at least {least} tokens, or a smaller "
            "dms.window_size"
        )


def _remove(run: PreparedRun, folder: Path) -> None:
    """Remove the checkpoints of the sums; `checkpoints/` is a folder of the run alone."""
    if run.is_writer:
        shutil.rmtree(folder, ignore_errors=True)
    multihost_utils.sync_global_devices("the checkpoints of the labels are removed")
