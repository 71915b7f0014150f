"""Keep a uniform sample of all pairs, prompt and attention sinks included: the lower bound for every other method."""

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
        return uniform_draws(self.seed, pairs)


def uniform_draws(seed: int, pairs: Pairs, anew: bool = False) -> Float[Array, "B K S"]:
    """Draw a number in [0, 1) for each pair from (seed, KV head, position), the same in each layer and row.

    `anew` also draws from the position of the row's last query, so that a pair gets another number at each eviction.
    """
    heads = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), jnp.arange(pairs.k.shape[1]))
    draw = lambda key, position: jax.random.uniform(jax.random.fold_in(key, position))
    of_row = jax.vmap(jax.vmap(draw, (None, 0)))  # [K] keys, [K S] positions
    if not anew:
        return jax.vmap(of_row, (None, 0))(heads, pairs.position)
    keys = jax.vmap(jax.vmap(jax.random.fold_in, (0, None)), (None, 0))(heads, pairs.now)
    return jax.vmap(of_row)(keys, pairs.position)
