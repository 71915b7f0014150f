"""Keep the pairs that the last queries attend to, smoothed over neighboring pairs.

Source: Li et al., "SnapKV", arXiv:2404.14469.
"""

from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Bool, Float

from dms_jax.axes import Array
from dms_jax.errors import ConfigError
from dms_jax.policies.budget_policy import BudgetPolicy, Pairs


@dataclass(frozen=True)
class SnapKV(BudgetPolicy):
    """Keep the last `observation_window` pairs, and fill the rest of the budget with the most attended older pairs.

    The score of an older pair is the attention that it got from the last `observation_window` queries, averaged over
    `kernel_size` neighbors.

    Deviations: neighbors are pooled by their mean, as in kvpress, instead of the paper's maximum. Neighbors are
    adjacent in position among the pairs that are still in the cache. The paper does not define an online version; here
    the window moves with each token, so each pair remembers the attention of the last `observation_window` queries.
    """

    compares_heads: ClassVar[bool] = True
    observation_window: int = 8
    kernel_size: int = 5  # odd

    def __post_init__(self):
        if self.observation_window < 1 or self.kernel_size < 1 or self.kernel_size % 2 == 0:
            raise ConfigError(
                f"{type(self).__name__} must have an observation_window >= 1 and an odd kernel_size >= 1, "
                f"got {self.observation_window} and {self.kernel_size}"
            )
        super().__post_init__()

    @property
    def min_budget(self) -> int:
        return self.observation_window + 1

    @property
    def num_observed(self) -> int:
        return self.observation_window

    @property
    def features(self) -> int:
        return self.observation_window  # attention of each of the last queries, from oldest to newest

    def observe(
        self,
        statistic: Float[Array, "B K S features"],
        weights: Float[Array, "B K n S"],
        real: Bool[Array, "B n"],
        alive: Bool[Array, "B K S"],
    ) -> Float[Array, "B K S features"]:
        size, number = self.observation_window, weights.shape[2]
        both = jnp.concatenate(
            [statistic, weights.swapaxes(2, 3)], axis=-1
        )  # oldest first, with the padding in the middle
        new = jnp.sum(real, axis=-1)[:, None]
        back = jnp.arange(size)[None, ::-1]  # queries ago
        source = jnp.where(back < new, size + number - 1 - back, size - 1 - (back - new))
        return jnp.take_along_axis(both, source[:, None, None], axis=-1)

    def keep_scores(self, pairs: Pairs) -> Float[Array, "B K S"]:
        return self.with_window(pairs, self.pooled(pairs, self.is_old(pairs)))

    def is_old(self, pairs: Pairs) -> Bool[Array, "B K S"]:
        """Return which pairs are older than the window."""
        return pairs.alive & (pairs.age >= self.observation_window)

    def attention(self, pairs: Pairs) -> Float[Array, "B K S observation_window"]:
        """Return the attention of each of the last queries, from oldest to newest."""
        return pairs.memory

    def pooled(self, pairs: Pairs, among: Bool[Array, "B K S"]) -> Float[Array, "B K S"]:
        """Return the mean attention, averaged over neighbors; pairs that are not `among` those counted add 0."""
        attention = jnp.where(among, jnp.mean(jnp.where(among[..., None], self.attention(pairs), 0.0), axis=-1), 0.0)
        order = jnp.argsort(jnp.where(pairs.alive, pairs.position, jnp.iinfo(jnp.int32).max), axis=-1)
        side = self.kernel_size // 2
        padded = jnp.pad(jnp.take_along_axis(attention, order, axis=-1), ((0, 0), (0, 0), (side, side)))
        length = attention.shape[-1]
        pooled = sum(padded[..., i : i + length] for i in range(self.kernel_size)) / self.kernel_size
        return jnp.take_along_axis(pooled, jnp.argsort(order, axis=-1), axis=-1)

    def with_window(self, pairs: Pairs, score: Float[Array, "B K S"]) -> Float[Array, "B K S"]:
        """Return the scores of old pairs, and higher ones for the pairs of the window."""
        old = self.is_old(pairs)
        return jnp.where(old, score, jnp.max(jnp.where(old, score, 0.0), axis=(1, 2), keepdims=True) + 1)
