"""Keep the prompt, and of the generated pairs random ones. Wang et al., "Random Attention", arXiv:2609.03430."""

from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from dms_jax.axes import Array
from dms_jax.core.compact_cache import LayerCache
from dms_jax.errors import ConfigError
from dms_jax.policies.budget_policy import BudgetPolicy, Pairs
from dms_jax.policies.random_eviction import uniform_draws


@dataclass(frozen=True)
class RandomAttention(BudgetPolicy):
    """Keep the whole prompt and the last `num_recent` pairs; fill the budget with the other pairs at random.

    The prompt is what a row reads before its first single token, in chunks of at least two tokens. Later turns of a
    chat count as generated. As in the paper, each KV head draws for itself, and draws anew at each eviction, so old
    pairs become rare. A prompt that leaves no room for recent pairs is refused.

    Deviations: pairs leave after each token instead of every 64 tokens, so fewer recent pairs are kept than the 64 of
    the paper, and they count toward the budget. All layers draw alike. The paper needs a prompt; given text, which is
    read in chunks, has none: when its first chunks exceed the budget, all pairs but the recent ones leave at random.
    """

    keeps_prompt: ClassVar[bool] = True
    num_recent: int = 16
    seed: int = 0

    def __post_init__(self):
        if self.num_recent < 1:
            raise ConfigError(f"RandomAttention must keep at least 1 recent pair, got {self.num_recent}")
        super().__post_init__()

    @property
    def min_budget(self) -> int:
        return self.num_recent + 1

    @property
    def features(self) -> int:
        return 1  # 1 for a pair of the prompt, else 0

    def check_prompt(
        self, slots: LayerCache, seen: Int[Array, "B"], count: Int[np.ndarray, "B"], chunk_size: int | None
    ) -> None:
        length, largest = np.asarray(seen) + count, self.budget - self.num_recent
        in_prompt = np.asarray(_prompt_length(slots))[:, 0] == np.asarray(seen)
        if chunk_size == 1 and (in_prompt & (count > 0)).any():
            raise ConfigError(
                "random_attention keeps the prompt, which it tells from generated tokens by its chunks; "
                "use a chunk_size of at least 2, got 1"
            )
        if (too_long := np.flatnonzero(in_prompt & (length > largest))).size:
            row = too_long[0]
            raise ConfigError(
                f"random_attention:{self.budget} keeps the prompt and {self.num_recent} recent pairs, so a prompt must "
                f"have at most {largest} tokens, got {length[row]} in row {row}; "
                f"use a budget of at least {length.max() + self.num_recent}"
            )

    def pairs_after(self, q, k, v, expiries, slots, position, count) -> Pairs:
        pairs, end = super().pairs_after(q, k, v, expiries, slots, position, count), position[:, 0] + count
        if k.shape[2] == 1:
            return pairs
        # A chunk continues the prompt if all pairs before it belong to it. What exceeds the budget is no prompt.
        reading = _prompt_length(slots) == position[:, :1]
        fits = (end <= self.budget)[:, None]
        new = (jnp.arange(pairs.k.shape[2]) >= slots.capacity)[None, None]
        flag = jnp.where(new, 1.0, pairs.memory[..., 0])
        stays = jnp.where(reading[..., None], fits[..., None], ~new)
        return pairs._replace(statistic=jnp.where(stays, flag, 0.0)[..., None])

    def keep_scores(self, pairs: Pairs) -> Float[Array, "B K S"]:
        draws = jnp.where(pairs.age < self.num_recent, 1.0, uniform_draws(self.seed, pairs, anew=True))
        return jnp.where(pairs.memory[..., 0] > 0, 2.0, draws)


def _prompt_length(slots: LayerCache) -> Int[Array, "B K"]:
    """Return how many pairs of each head belong to the prompt, none of which ever leaves."""
    assert slots.statistic is not None  # allocated, because the policy has `features`
    used: Bool[Array, "B K C"] = slots.expiry > 0
    return jnp.sum(jnp.where(used, slots.statistic[..., 0], 0), axis=-1).astype(jnp.int32)
