"""Rank pairs by the mean attention that they received: kvpress's variant of H2O (`observed_attention_press.py`)."""

from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Bool, Float

from dms_jax.axes import Array
from dms_jax.policies.budget_policy import BudgetPolicy, Pairs
from dms_jax.policies.cache_policy import UNBOUNDED


@dataclass(frozen=True)
class ObservedAttention(BudgetPolicy):
    """Keep the pairs that received the most attention per query that could see them.

    No pair is protected, not even the newest one.

    Cost: a prefill holds the attention weights of a whole chunk [B N T C+T], so chunks should be short.
    """

    compares_heads: ClassVar[bool] = True

    @property
    def num_observed(self) -> int:
        return UNBOUNDED  # every query of a chunk

    @property
    def features(self) -> int:
        return 1  # attention received so far

    def observe(
        self,
        statistic: Float[Array, "B K S 1"],
        weights: Float[Array, "B K n S"],
        real: Bool[Array, "B n"],
        alive: Bool[Array, "B K S"],
    ) -> Float[Array, "B K S 1"]:
        return statistic + jnp.sum(jnp.where(real[:, None, :, None], weights, 0.0), axis=2)[..., None]

    def keep_scores(self, pairs: Pairs) -> Float[Array, "B K S"]:
        return pairs.memory[..., 0] / (pairs.age + 1).astype(jnp.float32)
