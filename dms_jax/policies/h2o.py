"""Heavy hitters and recent pairs. Zhang et al., "H2O: Heavy-Hitter Oracle", arXiv:2306.14048."""

from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Float

from dms_jax.axes import Array
from dms_jax.policies.budget_policy import Pairs
from dms_jax.policies.observed_attention import ObservedAttention


@dataclass(frozen=True)
class H2O(ObservedAttention):
    """Half of the budget holds the most recent pairs, the rest those with the largest attention received in all.

    Deviations: attention is averaged over the query heads that share a KV head (the paper has no shared heads). In a chunked
    prefill, attention to a pair counts while it is in the cache, and pairs leave at the end of each chunk; the authors' code
    prefills densely. An odd budget gives the spare pair to the heavy hitters.
    """

    def keep_scores(self, pairs: Pairs) -> Float[Array, "B K S"]:
        return jnp.where(pairs.age < self.budget // 2, jnp.inf, pairs.memory[..., 0])
