"""Measure a retrofit: the report on held-out rows, and what training rows say about thresholds and budgets."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from dms_jax.core.cr_schedule import realised_cr
from dms_jax.core.losses import TokenMetrics
from dms_jax.engine.calibration import Scores, threshold_for
from dms_jax.engine.head_budgets import shares_of
from dms_jax.evaluation.held_out import HeldOutReport, RowMetrics, held_out_report
from dms_jax.policies.head_shares import HeadShares
from dms_jax.policies.streaming_llm import StreamingLLM
from dms_jax.training.data.rows import Batch, Rows
from dms_jax.training.placement import place
from dms_jax.training.prepare import PreparedRun
from dms_jax.training.step import TrainState


class HeldOutBatch(NamedTuple):
    """Rows on the host, the same rows on the mesh, and the dense model's hidden states, which run once for all."""

    tokens: Any  # int32 [B, T]
    segment_ids: Any  # int32 [B, T]
    loss_mask: Any  # bool [B, T]
    placed: Batch
    dense: Any  # [B T D], on the mesh


class Calibration(NamedTuple):
    """A threshold and shares of heads that were found on training rows."""

    threshold: float  # at which the rows realise the target ratio
    shares: HeadShares | None  # of the pairs that heads keep, for the policy `dms_budget`; None without settled pairs


def validate(run: PreparedRun, state: TrainState, calibration: Calibration) -> HeldOutReport:
    """Compare the retrofitted model, by threshold and within budgets, with the dense model and with StreamingLLM.

    Rows of packed documents have no budget in common, so they are not measured within budgets.
    """
    config, shares, window = run.config, calibration.shares, run.steps.math.dms.window_size

    def budgeted(batch: Any, pairs: int) -> TokenMetrics:
        assert shares is not None
        table = np.array(shares.budgets(max(pairs, window + 1), config.length, window), np.int32)
        return run.steps.evaluate_budgeted(state, run.frozen, batch.placed, batch.dense, table)

    def streaming_llm(batch: Any, policy: StreamingLLM) -> TokenMetrics:
        return run.steps.evaluate_streaming_llm(state, run.frozen, policy, batch.placed, batch.dense)

    batches = on_mesh(run, state, first_batches(run, run.held_out, config.eval_rows))
    one_document = shares is not None and config.data.rows == "contiguous"
    hard = hard_rows(run, state, calibration.threshold)
    return held_out_report(batches, config.length, hard, streaming_llm, budgeted if one_document else None)


def on_mesh(run: PreparedRun, state: TrainState, batches: list[Batch]) -> list[Any]:
    """Place rows on the mesh and run the dense model on them. Returns `HeldOutBatch`es."""
    placed = [place(batch, run.mesh) for batch in batches]
    dense = [run.steps.dense_hidden(state, run.frozen, rows) for rows in placed]
    return [HeldOutBatch(*batch[:3], *rest) for batch, *rest in zip(batches, placed, dense, strict=True)]


def hard_rows(run: PreparedRun, state: TrainState, threshold: float) -> Callable[[Any], RowMetrics]:
    """Return the function that compares a `HeldOutBatch` under hard decisions by `threshold` with the dense model."""
    return lambda batch: run.steps.evaluate(state, run.frozen, batch.placed, batch.dense, np.float32(threshold))


def running_threshold(state: TrainState) -> float:
    """Return the threshold of the evict logits in training, which is 0 with ratio_control=loss."""
    return 0.0 if state.threshold is None else float(state.threshold)


def calibrate(run: PreparedRun, state: TrainState) -> Calibration:
    """Find the threshold at which training rows realise the target ratio, and the pairs that heads then keep.

    With ratio_control=threshold, the search begins at the running threshold of training. With ratio_control=loss, the
    result is at least 0, so the ratio is at most the target. It is needed there because the one-sided loss never pushes
    the ratio down, and because decisions without the noise of training evict more than decisions with it.
    """
    c, dms, start = run.config, run.steps.math.dms, running_threshold(state)
    if not c.calibration_rows:
        return Calibration(start, None)
    scores = scores_of_rows(run, state, first_batches(run, run.train_rows, c.calibration_rows))
    latest: dict[float, np.ndarray] = {}

    def remembered(threshold: float) -> np.ndarray:
        latest.clear()
        latest[threshold] = scores(threshold)
        return latest[threshold]

    threshold = threshold_at_target(run, remembered, tolerance=0.02, most_runs=6, start=start)
    if not c.holds_ratio_by_threshold:
        threshold = max(0.0, threshold)
    if threshold:
        run.say(
            f"threshold {threshold:.3f}: if only evict logits above it evict, training rows realise "
            f"CR {_target_ratio(run):.2f}"
        )
    logits = latest[threshold] if threshold in latest else scores(threshold)
    settled = c.length - dms.window_size - 1
    of_pairs = logits[..., dms.decision_shift :][..., : max(settled, 0)]
    return Calibration(threshold, shares_of(of_pairs) if settled > 0 else None)


def threshold_at_target(
    run: PreparedRun, scores: Scores, *, tolerance: float, most_runs: int, start: float = 0.0
) -> float:
    """Search for the threshold at which the rows behind `scores` realise the target ratio, as `threshold_for` does."""
    dms = run.steps.math.dms
    return float(np.float32(threshold_for(scores, dms, _target_ratio(run), tolerance, most_runs, start)))


def _target_ratio(run: PreparedRun) -> float:
    dms = run.steps.math.dms
    return realised_cr(dms.target_cr, run.config.length, dms.window_size)


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
