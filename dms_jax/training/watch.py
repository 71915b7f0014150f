"""Eyes on a run: says once, with advice, when the policy collapses or the target cannot be reached, and which batch a loss jumped on."""

import math
import statistics
import sys
from collections import deque
from pathlib import Path

import numpy as np

from dms_jax.config import DMSConfig
from dms_jax.core.cr_schedule import realised_cr
from dms_jax.training.metrics import read_records

MEMORY = 100  # losses that a new one is compared with
LEAST = 20  # of them, before any comparison
SPIKE = 10  # median absolute deviations above the median
STUCK_STEPS = 30  # that a head must do the same in
NOTHING, EVERYTHING = 0.001, 0.999  # fractions of a head's tokens
NAMED = 4  # heads in a line


def target_advice(length: int, dms: DMSConfig) -> str | None:
    """Before the first step: is the target within reach of rows this long?"""
    best = realised_cr(math.inf, length, dms.window_size)
    if dms.target_cr <= best:
        return None
    protected = f"the window of {dms.window_size} protects {min(length, dms.window_size + 1)} tokens, so at most CR {best:.2f} is realised"
    return f"dms.target_cr={dms.target_cr:g} is out of reach in rows of {length}: {protected}; use longer rows or a smaller dms.window_size"


class Watch:
    """Looks at each step's metrics. Every alarm sounds once a run; what an earlier part of a resumed run said is in its metrics."""

    def __init__(self, metrics: Path | None = None):
        self.said = _alarms_of(metrics) if metrics is not None and metrics.exists() else set()
        self._losses: deque[float] = deque(maxlen=MEMORY)
        self._since: dict[str, np.ndarray] = {}

    def look(
        self,
        step: int,
        metrics: dict[str, float],
        per_head: np.ndarray,
        examples: tuple[int, int],
        training_gates: bool,
    ) -> list[dict]:
        """What is to be logged of this step: alarms and spikes. `per_head` [L K]: fraction of each head's tokens that evict; `examples`: first and
        last of the batch."""
        events = self._spike(step, metrics["loss/total"], examples)
        if not training_gates:
            return events
        evicted, wanted = metrics["cache/evict_fraction"], 1 - 1 / metrics["cache/target_cr"]
        if wanted > 0.2 and evicted < 0.01:
            advice = "raise optimizer.learning_rate or loss.compression_weight"
            self._say(events, "keeps", f"step {step}: nothing is evicted although the target is {wanted:.0%}; {advice}")
        if evicted > 0.99:
            self._say(
                events,
                "evicts",
                f"step {step}: everything outside the window is evicted; lower optimizer.learning_rate",
            )
        if wanted > 0.2 and metrics["cache/nominal_cr"] > 2 * metrics["cache/target_cr"]:
            ratios = f"the nominal ratio {metrics['cache/nominal_cr']:.1f} is over twice its target {metrics['cache/target_cr']:.1f}"
            self._say(
                events,
                "overshoots",
                f"step {step}: {ratios}; the loss does not push back, lower optimizer.learning_rate",
            )
        if wanted > 0.2 and 0.05 < evicted < 0.95:  # else it is not one head
            self._stuck(
                events,
                step,
                "head_keeps",
                per_head < NOTHING,
                "evict nothing",
                "right for heads that look far back; else raise loss.compression_weight, or set loss.scope=head",
            )
            self._stuck(
                events,
                step,
                "head_evicts",
                per_head > EVERYTHING,
                "evict everything outside the window",
                "right for local heads; else lower optimizer.learning_rate, or set loss.scope=head",
            )
        return events

    def _stuck(self, events: list[dict], step: int, alarm: str, now: np.ndarray, what: str, advice: str) -> None:
        since = self._since[alarm] = np.where(now, self._since.get(alarm, np.zeros(now.shape, int)) + 1, 0)
        stuck = np.argwhere(since >= STUCK_STEPS)
        if not len(stuck):
            return
        named = ", ".join(f"layer {layer} head {head}" for layer, head in stuck[:NAMED])
        more = f" and {len(stuck) - NAMED} more" if len(stuck) > NAMED else ""
        self._say(
            events, alarm, f"step {step}: {named}{more} of {now.size} KV heads {what} for {STUCK_STEPS} steps; {advice}"
        )

    def _spike(self, step: int, loss: float, examples: tuple[int, int]) -> list[dict]:
        past = list(self._losses)
        self._losses.append(loss)
        if len(past) < LEAST:
            return []
        median = statistics.median(past)
        spread = statistics.median(abs(x - median) for x in past)
        if loss <= median + SPIKE * max(spread, 0.01 * abs(median)):
            return []
        batch = f"examples {examples[0]} to {examples[1]}"
        print(
            f"note: step {step}: the loss {loss:.4f} jumped above its median of {median:.4f}; look at {batch}",
            file=sys.stderr,
        )
        return [
            {
                "watch/spike": loss / median if median else math.inf,
                "watch/first_example": examples[0],
                "watch/last_example": examples[1],
            }
        ]

    def _say(self, events: list[dict], alarm: str, text: str) -> None:
        if alarm not in self.said:
            self.said.add(alarm)
            events.append({"watch/alarm": alarm})
            print(f"warning: {text}", file=sys.stderr)


def _alarms_of(metrics: Path) -> set[str]:
    return {str(record["watch/alarm"]) for record in read_records(metrics) if "watch/alarm" in record}
