"""Eyes on a run: says once, with advice, when the policy collapses or the target cannot be reached."""

import math
import sys

from dms_jax.config import DMSConfig
from dms_jax.core.cr_schedule import realised_cr


def target_advice(length: int, dms: DMSConfig) -> str | None:
    """Before the first step: is the target within reach of rows this long?"""
    best = realised_cr(math.inf, length, dms.window_size)
    if dms.target_cr <= best:
        return None
    protected = f"the window of {dms.window_size} protects {min(length, dms.window_size + 1)} tokens, so at most CR {best:.2f} is realised"
    return f"dms.target_cr={dms.target_cr:g} is out of reach in rows of {length}: {protected}; use longer rows or a smaller dms.window_size"


class Watch:
    """Looks at each step's metrics. Every alarm sounds once."""

    def __init__(self):
        self.said: set[str] = set()

    def look(self, step: int, metrics: dict[str, float], training_gates: bool) -> None:
        if not training_gates:
            return
        evicted, wanted = metrics["cache/evict_fraction"], 1 - 1 / metrics["cache/target_cr"]
        if wanted > 0.2 and evicted < 0.01:
            self._say(
                "keeps",
                f"step {step}: nothing is evicted although the target is {wanted:.0%}; raise optimizer.learning_rate or loss.compression_weight",
            )
        if evicted > 0.99:
            self._say("evicts", f"step {step}: everything outside the window is evicted; lower optimizer.learning_rate")
        if wanted > 0.2 and metrics["cache/nominal_cr"] > 2 * metrics["cache/target_cr"]:
            ratios = f"the nominal ratio {metrics['cache/nominal_cr']:.1f} is over twice its target {metrics['cache/target_cr']:.1f}"
            self._say("overshoots", f"step {step}: {ratios}; the loss does not push back, lower optimizer.learning_rate")

    def _say(self, alarm: str, text: str) -> None:
        if alarm not in self.said:
            self.said.add(alarm)
            print(f"warning: {text}", file=sys.stderr)
