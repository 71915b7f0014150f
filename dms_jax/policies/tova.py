"""Token omission via attention. Oren et al., "Transformers are Multi-State RNNs", arXiv:2401.06104."""

from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Bool, Float

from dms_jax.axes import Array
from dms_jax.policies.budget_policy import BudgetPolicy, Pairs


@dataclass(frozen=True)
class TOVA(BudgetPolicy):
    """Keep the pairs to which the last query attends most, averaged over all query heads of the layer.

    Deviation, as in kvpress: the last pair always stays, whereas the paper lets it leave.
    """

    @property
    def num_observed(self) -> int:
        return 1

    @property
    def features(self) -> int:
        return 1  # attention of the last query

    def observe(
        self,
        statistic: Float[Array, "B K S 1"],
        weights: Float[Array, "B K n S"],
        real: Bool[Array, "B n"],
        alive: Bool[Array, "B K S"],
    ) -> Float[Array, "B K S 1"]:
        return jnp.where(real[:, -1, None, None, None], weights[:, :, -1, :, None], statistic)

    def keep_scores(self, pairs: Pairs) -> Float[Array, "B K S"]:
        # All heads of a layer get the same scores. They therefore keep the same pairs in the same slots, so that a
        # slot's weights can be averaged over heads.
        weights = jnp.mean(jnp.where(pairs.alive, pairs.memory[..., 0], 0.0), axis=1, keepdims=True)
        score = jnp.where(pairs.alive & (pairs.age == 0), jnp.max(weights, axis=-1, keepdims=True) + 1, weights)
        return jnp.broadcast_to(score, pairs.alive.shape)
