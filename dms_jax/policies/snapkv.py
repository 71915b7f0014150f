"""What the last queries look at, smoothed over neighbours. Li et al., "SnapKV", arXiv:2404.14469."""

from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Bool, Float

from dms_jax.axes import Array
from dms_jax.errors import ConfigError
from dms_jax.policies.budget_policy import BudgetPolicy, Pairs


@dataclass(frozen=True)
class SnapKV(BudgetPolicy):
    """Keep the last `observation_window` pairs, and of the others those to which the last `observation_window` queries paid
    the most, averaged over `kernel_size` neighbours.

    Deviations: average pooling over neighbours, as in kvpress (the paper: maximum). Neighbours are the pairs next in position
    among those still in the cache. Online, which the paper does not define, the window moves with each token: of each pair
    the attention of the last `observation_window` queries is remembered.
    """

    observation_window: int = 8
    kernel_size: int = 5  # odd

    def __post_init__(self):
        if self.observation_window < 1 or self.kernel_size < 1 or self.kernel_size % 2 == 0:
            raise ConfigError(
                f"SnapKV wants observation_window >= 1 and an odd kernel_size >= 1; got {self.observation_window} and {self.kernel_size}"
            )
        super().__post_init__()

    @property
    def least_budget(self) -> int:
        return self.observation_window + 1

    @property
    def observed(self) -> int:
        return self.observation_window

    @property
    def features(self) -> int:
        return self.observation_window  # what each of the last queries paid, the latest last

    def observe(
        self,
        statistic: Float[Array, "B K S F"],
        weights: Float[Array, "B K n S"],
        real: Bool[Array, "B n"],
        alive: Bool[Array, "B K S"],
    ) -> Float[Array, "B K S F"]:
        size, number = self.observation_window, weights.shape[2]
        both = jnp.concatenate(
            [statistic, weights.swapaxes(2, 3)], axis=-1
        )  # oldest first; those not real are in between
        new = jnp.sum(real, axis=-1)[:, None]
        back = jnp.arange(size)[::-1]  # how many queries ago
        source = jnp.where(back < new, size + number - 1 - back, size - 1 - (back - new))
        return jnp.take_along_axis(both, source[:, None, None], axis=-1)

    def keep_scores(self, pairs: Pairs) -> Float[Array, "B K S"]:
        settled = pairs.alive & (pairs.age >= self.observation_window)
        paid = jnp.where(settled, jnp.mean(jnp.where(settled[..., None], pairs.memory, 0.0), axis=-1), 0.0)
        order = jnp.argsort(jnp.where(pairs.alive, pairs.position, jnp.iinfo(jnp.int32).max), axis=-1)
        side = self.kernel_size // 2
        padded = jnp.pad(jnp.take_along_axis(paid, order, axis=-1), ((0, 0), (0, 0), (side, side)))
        length = paid.shape[-1]
        pooled = sum(padded[..., i : i + length] for i in range(self.kernel_size)) / self.kernel_size
        score = jnp.take_along_axis(pooled, jnp.argsort(order, axis=-1), axis=-1)
        return jnp.where(settled, score, jnp.max(jnp.where(settled, score, 0.0), axis=(1, 2), keepdims=True) + 1)
