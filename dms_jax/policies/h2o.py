"""Heavy hitters and recent pairs. Zhang et al., "H2O: Heavy-Hitter Oracle", arXiv:2306.14048."""

from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Float

from dms_jax.axes import Array
from dms_jax.policies.budget_policy import Pairs
from dms_jax.policies.observed_attention import ObservedAttention


@dataclass(frozen=True)
class H2O(ObservedAttention):
    """Keep the most recent pairs in one half of the budget, and those that received the most attention in the other.

    Deviations: attention is averaged over the query heads that share a KV head (the paper has no shared heads). In a
    chunked prefill, a pair collects attention while it is in the cache, and pairs leave at the end of each chunk; the
    authors' code prefills densely. With an odd budget, the heavy hitters get the larger half.
    """

    def keep_scores(self, pairs: Pairs) -> Float[Array, "B K S"]:
        return jnp.where(pairs.age < self.budget // 2, jnp.inf, pairs.memory[..., 0])
