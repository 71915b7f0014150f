"""A sliding window with attention sinks: the training-free baseline that a retrofit has to beat.

Source: Xiao et al., arXiv:2309.17453.
"""

from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from dms_jax.axes import Array
from dms_jax.core.compact_cache import Expiries
from dms_jax.core.visibility import expiry_of
from dms_jax.errors import ConfigError
from dms_jax.policies.budget_policy import BudgetPolicy, Pairs


@dataclass(frozen=True)
class StreamingLLM(BudgetPolicy):
    """Keep the first `num_sinks` pairs and the most recent ones, `budget` pairs in all.

    In terms of `core.visibility`, every pair except the sinks is marked and leaves after `window_size` steps. This does
    not depend on attention, so no ranking is needed online, and the mask path, chunks and decoding give equal results.

    Deviation: rotary positions are not renumbered.
    """

    num_sinks: int = 4

    def __post_init__(self):
        if self.budget <= self.num_sinks:
            raise ConfigError(
                f"the budget of StreamingLLM must be larger than its {self.num_sinks} sinks, got {self.budget}"
            )
        super().__post_init__()

    @property
    def window_size(self) -> int:
        return self.budget - self.num_sinks - 1  # a pair is visible to its own query and to this many later ones

    def marked(self, position: Int[Array, "*A"]) -> Bool[Array, "*A"]:
        """Return which positions are not sinks."""
        return position >= self.num_sinks

    def mark(
        self,
        logits: Float[Array, "B K T"],
        position: Int[Array, "B T"],
        count: Int[Array, "B"],
        threshold: float | Float[Array, ""],
    ) -> Expiries:
        expiry = expiry_of(self.marked(position), position, self.window_size)[:, None]
        return Expiries(jnp.broadcast_to(expiry, logits.shape), jnp.zeros(logits.shape, jnp.float32), None, None)

    def select(self, q, k, v, expiries, slots, position, count) -> None:
        return None  # `mark` has already decided

    def keep_scores(self, pairs: Pairs) -> Float[Array, "B K S"]:
        """Score 1 for pairs that stay and 0 for those that leave, as kvpress does."""
        return jnp.where(self.marked(pairs.position) & (pairs.age > self.window_size), 0.0, 1.0)
