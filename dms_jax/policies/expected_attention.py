"""Keep the pairs to which future queries are expected to attend.

Source: Devoto et al., "Expected Attention", arXiv:2510.00636, as in kvpress (`expected_attention_press.py`).
"""

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from dms_jax.axes import EXACT, Array
from dms_jax.config import ModelConfig
from dms_jax.core.rotary import apply_rope, rope_cos_sin, rope_frequencies
from dms_jax.errors import ConfigError
from dms_jax.policies.budget_policy import BudgetPolicy, Pairs


@dataclass(frozen=True)
class ExpectedAttention(BudgetPolicy):
    """Keep the first `num_sinks` pairs, and those with the largest expected attention times the norm of their value.

    Queries before RoPE are modeled as Gaussian, with the mean and covariance of a query head's queries so far, those of
    the sinks excepted. R is the mean rotation by the next `num_future` positions. The expected attention to a key k is
    the softmax over pairs of k.Rm / sqrt(H) + k.RCR^T.k / 2H, averaged over the query heads that share the key.

    Deviation: kvpress takes mean and covariance from the prompt, or from a buffer of recent tokens when decoding. Here
    they cover all queries of a row, and the score is computed again at each eviction.

    Cost: the cache holds H + H^2 numbers for each query head, and an eviction takes O(H^2) operations per pair.
    """

    compares_heads: ClassVar[bool] = True
    num_future: int = 512
    num_sinks: int = 4

    def __post_init__(self):
        if self.num_future < 1 or self.num_sinks < 0:
            raise ConfigError(
                "ExpectedAttention must have num_future >= 1 and num_sinks >= 0, "
                f"got {self.num_future} and {self.num_sinks}"
            )
        super().__post_init__()

    @property
    def min_budget(self) -> int:
        return self.num_sinks + 1

    @property
    def features(self) -> int:
        return 1  # |v|

    def first_statistic(self, k: Float[Array, "B K T H"], v: Float[Array, "B K T H"]) -> Float[Array, "B K T 1"]:
        return jnp.linalg.norm(v.astype(jnp.float32), axis=-1, keepdims=True)

    def head_state(self, config: ModelConfig) -> Float[Array, "state"]:
        """Return mean and scatter (covariance times number) of no queries, and the rotary frequencies of the model."""
        empty = jnp.zeros(config.group_size * config.head_dim * (config.head_dim + 1), jnp.float32)
        return jnp.concatenate([empty, rope_frequencies(config)])

    def observe_queries(
        self,
        state: Float[Array, "B K state"],
        q: Float[Array, "B T N H"],
        position: Int[Array, "B T"],
        count: Int[Array, "B"],
    ) -> Float[Array, "B K state"]:
        (b, t, _, h), kv_heads = q.shape, state.shape[1]
        mean, scatter, frequency = _parts(state, h)
        cos, sin = rope_cos_sin(position[:, :, None], frequency)
        before_rope = apply_rope(q.astype(jnp.float32), cos, -sin).reshape(b, t, kv_heads, -1, h)
        counted = (jnp.arange(t)[None] < count[:, None]) & (position >= self.num_sinks)
        weight = counted.astype(jnp.float32)
        old, new = self._number(position[:, 0] - 1)[:, None], jnp.sum(weight, axis=1)[:, None, None, None]
        new_mean = jnp.einsum("bt,btkgh->bkgh", weight, before_rope, precision=EXACT) / jnp.maximum(new, 1.0)
        centered = (before_rope - new_mean[:, None]) * weight[..., None, None, None]
        # Two samples are merged as in Chan et al. (1979), which does not lose digits as sums of squares would.
        share = new / jnp.maximum(old + new, 1.0)
        step = new_mean - mean
        scatter += jnp.einsum("btkgh,btkgi->bkghi", centered, centered, precision=EXACT)
        scatter += (old * share)[..., None] * step[..., None] * step[..., None, :]
        flat = [x.reshape(b, kv_heads, -1) for x in (mean + share * step, scatter)]
        return jnp.concatenate([*flat, state[..., -(h // 2) :]], axis=-1)

    def keep_scores(self, pairs: Pairs) -> Float[Array, "B K S"]:
        assert pairs.head_state is not None  # allocated, because the policy has a `head_state`
        h = pairs.k.shape[-1]
        mean, scatter, frequency = _parts(pairs.head_state, h)
        covariance = scatter / jnp.maximum(self._number(pairs.now), 1.0)[..., None, None]
        future = pairs.now[:, None] + 1 + jnp.arange(self.num_future)[None]
        turn = [jnp.mean(x, axis=1)[:, None, None] for x in rope_cos_sin(future, frequency)]  # [B 1 1 half]
        mean, twice = apply_rope(mean, *turn), [x[..., None, :] for x in turn]
        covariance = apply_rope(apply_rope(covariance, *twice).swapaxes(-1, -2), *twice)
        k = jnp.where(pairs.alive[..., None], pairs.k.astype(jnp.float32), 0.0)
        along = jnp.einsum("bksh,bkgh->bkgs", k, mean, precision=EXACT) / h**0.5
        spread = jnp.einsum("bksh,bkghi,bksi->bkgs", k, covariance, k, precision=EXACT) / (2 * h)
        ranked = pairs.alive & (pairs.position >= self.num_sinks)
        attention = jax.nn.softmax(along + spread, axis=-1, where=ranked[:, :, None])
        score = jnp.where(ranked, jnp.mean(attention, axis=2) * pairs.memory[..., 0], 0.0)
        return jnp.where(ranked, score, jnp.max(score, axis=(1, 2), keepdims=True) + 1)

    def _number(self, last: Int[Array, "B"]) -> Float[Array, "B 1 1"]:
        """Return how many queries up to position `last` are counted."""
        return jnp.maximum(last + 1 - self.num_sinks, 0).astype(jnp.float32)[:, None, None]


def _parts(
    state: Float[Array, "B K state"], h: int
) -> tuple[Float[Array, "B K G H"], Float[Array, "B K G H H"], Float[Array, "half"]]:
    """Return mean, scatter and rotary frequencies."""
    groups = (state.shape[-1] - h // 2) // (h * (h + 1))
    mean, scatter = jnp.split(state[..., : groups * h * (h + 1)], [groups * h], axis=-1)
    lead = (*state.shape[:2], groups, h)
    return mean.reshape(lead), scatter.reshape(*lead, h), state[0, 0, -(h // 2) :]
