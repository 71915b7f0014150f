"""Token omission via attention. Oren et al., "Transformers are Multi-State RNNs", arXiv:2401.06104."""

from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Bool, Float

from dms_jax.axes import Array
from dms_jax.policies.budget_policy import BudgetPolicy, Pairs


@dataclass(frozen=True)
class TOVA(BudgetPolicy):
    """Keep the pairs that the last query attends to most, averaged over all query heads of the layer.

    Deviation, that of kvpress: the last pair always stays (the paper lets it leave).
    """

    @property
    def observed(self) -> int:
        return 1

    @property
    def features(self) -> int:
        return 1  # what the last query paid

    def observe(
        self,
        statistic: Float[Array, "B K S 1"],
        weights: Float[Array, "B K n S"],
        real: Bool[Array, "B n"],
        alive: Bool[Array, "B K S"],
    ) -> Float[Array, "B K S 1"]:
        return jnp.where(real[:, -1, None, None, None], weights[:, :, -1, :, None], statistic)

    def keep_scores(self, pairs: Pairs) -> Float[Array, "B K S"]:
        # All heads of a layer get the same scores, so they keep the same pairs in the same slots: slots may be averaged over.
        weights = jnp.mean(jnp.where(pairs.alive, pairs.memory[..., 0], 0.0), axis=1, keepdims=True)
        score = jnp.where(pairs.alive & (pairs.age == 0), jnp.max(weights, axis=-1, keepdims=True) + 1, weights)
        return jnp.broadcast_to(score, pairs.alive.shape)
