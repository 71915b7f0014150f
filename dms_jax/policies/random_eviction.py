"""Keep random pairs: the lower bound for every other method."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Float

from dms_jax.axes import Array
from dms_jax.policies.budget_policy import BudgetPolicy, Pairs


@dataclass(frozen=True)
class RandomEviction(BudgetPolicy):
    """Keep the pairs with the highest random scores, which depend on (seed, KV head, position) only.

    The pairs in the cache are thus always a uniform sample of all pairs so far. Scores are the same in each layer and
    row, so the result of a row does not depend on its neighbors.
    """

    seed: int = 0

    def keep_scores(self, pairs: Pairs) -> Float[Array, "B K S"]:
        heads = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(self.seed), jnp.arange(pairs.k.shape[1]))
        draw = lambda key, position: jax.random.uniform(jax.random.fold_in(key, position))
        head_scores = jax.vmap(draw, (None, 0))
        return jax.vmap(jax.vmap(head_scores), (None, 0))(heads, pairs.position)
