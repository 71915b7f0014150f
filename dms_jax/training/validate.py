"""Measure a retrofit: the report on held-out rows, and the threshold that keeps the realised ratio at its target."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from dms_jax.core.cr_schedule import realised_cr
from dms_jax.core.losses import TokenMetrics
from dms_jax.engine.calibration import Scores, threshold_for
from dms_jax.evaluation.held_out import HeldOutReport, RowMetrics, held_out_report
from dms_jax.policies.streaming_llm import StreamingLLM
from dms_jax.training.data.rows import Batch, Rows
from dms_jax.training.placement import place
from dms_jax.training.prepare import PreparedRun
from dms_jax.training.step import TrainState


def validate(run: PreparedRun, state: TrainState, threshold: float = 0.0) -> HeldOutReport:
    """Compare the retrofitted model under `threshold` with the dense model and with StreamingLLM at equal live
    tokens."""

    def streaming_llm(batch: Any, policy: StreamingLLM) -> TokenMetrics:
        return run.steps.evaluate_streaming_llm(state, run.frozen, policy, place(batch, run.mesh))

    batches: list[Any] = first_batches(run, run.held_out, run.config.eval_rows)
    return held_out_report(batches, run.config.length, hard_rows(run, state, threshold), streaming_llm)


def hard_rows(run: PreparedRun, state: TrainState, threshold: float) -> Callable[[Any], RowMetrics]:
    """Return the function that compares rows under hard decisions by `threshold` with the dense model."""
    return lambda batch: run.steps.evaluate(state, run.frozen, place(batch, run.mesh), np.float32(threshold))


def running_threshold(state: TrainState) -> float:
    """Return the threshold of the evict logits in training, which is 0 with ratio_control=loss."""
    return 0.0 if state.threshold is None else float(state.threshold)


def calibrated_threshold(run: PreparedRun, state: TrainState) -> float:
    """Find the threshold at which training rows realise the target ratio.

    With ratio_control=threshold, the search begins at the running threshold of training. With ratio_control=loss, the
    result is at least 0, so the ratio is at most the target. It is needed there because the one-sided loss never pushes
    the ratio down, and because decisions without the noise of training evict more than decisions with it.
    """
    c, dms, start = run.config, run.steps.math.dms, running_threshold(state)
    if not c.calibration_rows:
        return start
    scores = scores_of_rows(run, state, first_batches(run, run.train_rows, c.calibration_rows))
    target = realised_cr(dms.target_cr, c.length, dms.window_size)
    threshold = float(np.float32(threshold_for(scores, dms, target, tolerance=0.02, most_runs=6, start=start)))
    if not c.holds_ratio_by_threshold:
        threshold = max(0.0, threshold)
    if threshold:
        run.say(
            f"threshold {threshold:.3f}: if only evict logits above it evict, training rows realise CR {target:.2f}"
        )
    return threshold


def scores_of_rows(run: PreparedRun, state: TrainState, batches: list[Batch]) -> Scores:
    """Return the function that computes the evict logits of rows when they run with a threshold."""
    placed = [place(batch, run.mesh) for batch in batches]

    def scores(threshold: float) -> np.ndarray:
        logits = [run.steps.scores(state, run.frozen, batch, np.float32(threshold)) for batch in placed]
        return np.concatenate(jax.device_get(logits), axis=1)

    return scores


def first_batches(run: PreparedRun, rows: Rows, count: int) -> list[Batch]:
    """Return batches of one row per data-parallel device, with at least `count` rows in all if `rows` has that many."""
    size = run.mesh.shape["data"]
    num_batches = -(-min(count, max(rows.num_rows, 1)) // size)
    return [rows.batch(i, size, run.config.seed) for i in range(num_batches)]
