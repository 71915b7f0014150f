"""The floor: pairs that stay by lot. A method that does not beat it has learned nothing."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Float

from dms_jax.axes import Array
from dms_jax.policies.budget_policy import BudgetPolicy, Pairs


@dataclass(frozen=True)
class RandomEviction(BudgetPolicy):
    """Each pair draws a number from (seed, KV head, position), and the highest stay: at any time a uniform sample of what has
    come. The draw is the same in each layer and row, so a row's result does not depend on its neighbours."""

    seed: int = 0

    def keep_scores(self, pairs: Pairs) -> Float[Array, "B K S"]:
        heads = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(self.seed), jnp.arange(pairs.k.shape[1]))
        draw = lambda key, position: jax.random.uniform(jax.random.fold_in(key, position))
        of_head = jax.vmap(draw, (None, 0))
        return jax.vmap(jax.vmap(of_head), (None, 0))(heads, pairs.position)
