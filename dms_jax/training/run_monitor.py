"""Warn with advice during a run: the policy collapses, the target is out of reach, or the loss jumps on a batch.

Each alarm is raised once per run.
"""

import math
import statistics
import sys
from collections import deque
from pathlib import Path

import numpy as np

from dms_jax.config import DMSConfig
from dms_jax.core.cr_schedule import realised_cr
from dms_jax.training.metrics import read_records

MAX_LOSSES = 100  # number of past losses that a new loss is compared with
MIN_LOSSES = 20  # number of past losses before the first comparison
SPIKE = 10  # a loss is a spike above this many median absolute deviations over the median
STUCK_STEPS = 30  # number of steps in a row after which a head that keeps all or evicts all is reported
KEEPS_ALL, EVICTS_ALL = 0.001, 0.999  # a head below or above this evicted fraction keeps all or evicts all
MAX_NAMED = 4  # number of heads that one warning names


def target_advice(length: int, dms: DMSConfig) -> str | None:
    """Return a warning if rows of `length` tokens cannot reach the target ratio, else None."""
    best = realised_cr(math.inf, length, dms.window_size)
    if dms.target_cr <= best:
        return None
    protected = min(length, dms.window_size + 1)
    return (
        f"dms.target_cr={dms.target_cr:g} is out of reach in rows of {length} tokens: the window of {dms.window_size} "
        f"protects {protected} tokens, so at most CR {best:.2f} is realised; use longer rows or a smaller "
        "dms.window_size"
    )


class RunMonitor:
    """Check the metrics of each step.

    Earlier alarms are read from the log, so that a resumed run does not repeat them.
    """

    def __init__(self, metrics: Path | None = None):
        """Read the earlier alarms from `metrics`, the log of the run so far."""
        self._raised = _alarms_of(metrics) if metrics is not None and metrics.exists() else set()
        self._losses: deque[float] = deque(maxlen=MAX_LOSSES)
        self._stuck_for: dict[str, np.ndarray] = {}  # alarm -> [L K] number of steps in a row

    def check(
        self,
        step: int,
        metrics: dict[str, float],
        per_head: np.ndarray,
        examples: tuple[int, int],
        gates_act: bool,
    ) -> list[dict]:
        """Print warnings about a step, and return the alarms and spikes to log.

        `per_head` [L K]: evicted fraction of the tokens of each head. `examples`: first and last example of the batch.
        `gates_act`: False while mode `borrowed` frees its channel.
        """
        events = self._spike(step, metrics["loss/total"], examples)
        if gates_act:
            for alarm, text in [*_collapse(metrics), *self._stuck_heads(metrics, per_head)]:
                if alarm not in self._raised:
                    self._raised.add(alarm)
                    events.append({"watch/alarm": alarm})
                    print(f"warning: step {step}: {text}", file=sys.stderr)
        return events

    def _stuck_heads(self, metrics: dict[str, float], per_head: np.ndarray) -> list[tuple[str, str]]:
        """Find heads that evicted nothing, or everything, for STUCK_STEPS steps while the model as a whole did
        neither."""
        if _target_fraction(metrics) <= 0.2 or not 0.05 < metrics["cache/evict_fraction"] < 0.95:
            return []
        keeps = "right for heads that look far back; for others, raise loss.compression_weight, or set loss.scope=head"
        evicts = "right for local heads; for others, lower optimizer.learning_rate, or set loss.scope=head"
        kinds = (
            ("head_keeps", per_head < KEEPS_ALL, "evict nothing", keeps),
            ("head_evicts", per_head > EVICTS_ALL, "evict everything outside the window", evicts),
        )
        found = []
        for alarm, now, what, advice in kinds:
            before = self._stuck_for.get(alarm, np.zeros(now.shape, int))
            self._stuck_for[alarm] = np.where(now, before + 1, 0)
            stuck = np.argwhere(self._stuck_for[alarm] >= STUCK_STEPS)
            if len(stuck):
                named = ", ".join(f"layer {layer} head {head}" for layer, head in stuck[:MAX_NAMED])
                more = f" and {len(stuck) - MAX_NAMED} more" if len(stuck) > MAX_NAMED else ""
                text = f"{named}{more} of {now.size} KV heads {what} for {STUCK_STEPS} steps; {advice}"
                found.append((alarm, text))
        return found

    def _spike(self, step: int, loss: float, examples: tuple[int, int]) -> list[dict]:
        """Report a loss that is far above the median of the losses before it."""
        past = list(self._losses)
        self._losses.append(loss)
        if len(past) < MIN_LOSSES:
            return []
        median = statistics.median(past)
        spread = statistics.median(abs(x - median) for x in past)
        if loss <= median + SPIKE * max(spread, 0.01 * abs(median)):
            return []
        print(
            f"note: step {step}: the loss {loss:.4f} jumped above its median of {median:.4f}; "
            f"check examples {examples[0]} to {examples[1]}",
            file=sys.stderr,
        )
        ratio = loss / median if median else math.inf
        return [{"watch/spike": ratio, "watch/first_example": examples[0], "watch/last_example": examples[1]}]


def _target_fraction(metrics: dict[str, float]) -> float:
    """Return the fraction of decisions that should evict."""
    return 1 - 1 / metrics["cache/target_cr"]


def _collapse(metrics: dict[str, float]) -> list[tuple[str, str]]:
    """Return (alarm, text) if the model as a whole evicts nothing, everything or far too much."""
    target, evicted = _target_fraction(metrics), metrics["cache/evict_fraction"]
    found = []
    if target > 0.2 and evicted < 0.01:
        advice = "raise optimizer.learning_rate or loss.compression_weight"
        found.append(("keeps", f"nothing is evicted although the target is {target:.0%}; {advice}"))
    if evicted > 0.99:
        found.append(("evicts", "everything outside the window is evicted; lower optimizer.learning_rate"))
    if target > 0.2 and metrics["cache/nominal_cr"] > 2 * metrics["cache/target_cr"]:
        ratios = f"{metrics['cache/nominal_cr']:.1f} is over twice its target {metrics['cache/target_cr']:.1f}"
        found.append(
            ("overshoots", f"the nominal ratio {ratios}, and the loss does not lower it; lower optimizer.learning_rate")
        )
    return found


def _alarms_of(metrics: Path) -> set[str]:
    return {str(record["watch/alarm"]) for record in read_records(metrics) if "watch/alarm" in record}
