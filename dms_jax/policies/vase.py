"""Protect pairs with large values, and sample the others. Chang et al., "VaSE", arXiv:2606.03928."""

from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Bool, Float

from dms_jax.axes import Array
from dms_jax.policies.budget_policy import Pairs, best
from dms_jax.policies.random_eviction import uniform_draws
from dms_jax.policies.snapkv import SnapKV


@dataclass(frozen=True)
class VaSE(SnapKV):
    """Keep recent pairs; a quarter of the remaining budget is for pairs with large values, the rest for a sample.

    A value is as large as its range, the largest channel minus the smallest one. The first `num_sinks` pairs, whose
    values are small, count as the largest. The sample is drawn without replacement, in proportion to the score of
    SnapKV, and anew at each eviction.

    Deviations: pairs leave after each token instead of every 64 tokens, so the window is 16 instead of 64 queries and
    pairs. Scores include the attention within the window. All layers draw alike.
    """

    compares_heads: ClassVar[bool] = False  # a sample is drawn for each head
    observation_window: int = 16
    num_sinks: int = 4
    seed: int = 0

    @property
    def features(self) -> int:
        return super().features + 1  # the last one is the range of the value

    def first_statistic(self, k: Float[Array, "B K T H"], v: Float[Array, "B K T H"]) -> Float[Array, "B K T features"]:
        v = v.astype(jnp.float32)
        size = (jnp.max(v, axis=-1) - jnp.min(v, axis=-1))[..., None]
        return jnp.pad(size, ((0, 0), (0, 0), (0, 0), (self.observation_window, 0)))

    def attention(self, pairs: Pairs) -> Float[Array, "B K S observation_window"]:
        return pairs.memory[..., :-1]

    def observe(
        self,
        statistic: Float[Array, "B K S features"],
        weights: Float[Array, "B K n S"],
        real: Bool[Array, "B n"],
        alive: Bool[Array, "B K S"],
    ) -> Float[Array, "B K S features"]:
        attention = super().observe(statistic[..., :-1], weights, real, alive)
        return jnp.concatenate([attention, statistic[..., -1:]], axis=-1)

    def keep_scores(self, pairs: Pairs) -> Float[Array, "B K S"]:
        old = self.is_old(pairs)
        size = jnp.where(pairs.position < self.num_sinks, jnp.inf, pairs.memory[..., -1])
        large = best(size, old, pairs.position, (self.budget - self.observation_window) // 4)
        # The highest log p + Gumbel noise are a sample without replacement (Kool et al., arXiv:1903.06059).
        noise = -jnp.log(-jnp.log(uniform_draws(self.seed, pairs, anew=True)))
        return jnp.where(old & ~large, jnp.log(self.pooled(pairs, old)) + noise, jnp.inf)
