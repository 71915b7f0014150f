"""Keep the pairs whose keys differ most from the others. Park et al., "KeyDiff", arXiv:2504.15364."""

from dataclasses import dataclass

import jax.numpy as jnp
from jax import lax
from jaxtyping import Float

from dms_jax.axes import Array
from dms_jax.policies.budget_policy import BudgetPolicy, Pairs


@dataclass(frozen=True)
class KeyDiff(BudgetPolicy):
    """Keep the pairs whose keys have the lowest cosine similarity to the anchor, the mean of all normalized keys.

    As in the paper, the anchor covers the pairs that are in the cache and in the chunk, and is recomputed after each
    step.

    Deviation: no window of recent pairs is protected, as it is in the paper's "sliding window" variant.
    """

    def keep_scores(self, pairs: Pairs) -> Float[Array, "B K S"]:
        keys = jnp.where(pairs.alive[..., None], pairs.k.astype(jnp.float32), 0.0)
        number = jnp.maximum(jnp.sum(pairs.alive, axis=-1), 1)[..., None]
        anchor = jnp.sum(_unit(keys), axis=2) / number.astype(jnp.float32)
        return -jnp.einsum("bksh,bkh->bks", _unit(keys), _unit(anchor), precision=lax.Precision.HIGHEST)


def _unit(x: Float[Array, "*A H"]) -> Float[Array, "*A H"]:
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)
