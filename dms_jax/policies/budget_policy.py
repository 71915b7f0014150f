"""What the training-free methods share: a budget of live pairs per row and KV head, and a score by which pairs stay.

Two protocols, one score:
- **online** (`BudgetPolicy` itself): after each chunk of a prefill and each decoded token, the pairs with the lowest scores
  beyond the budget leave. A query sees what stayed before its chunk, and the chunk up to itself; so a prefill's result
  depends on its chunk size, and live pairs are at most the budget whenever a call has returned.
- **prompt compression** (`prompt_compression.py`): all of the prompt is prefilled, ranked once, the best `budget` stay.

A method says which numbers of each pair it remembers (`features`), from which it forms a score (`keep_scores`).
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from dms_jax.axes import Array, typed
from dms_jax.core.compact_cache import Expiries, LayerCache, Selection, alive_pairs
from dms_jax.core.slot_attention import attention_weights
from dms_jax.errors import ConfigError
from dms_jax.policies.cache_policy import CachePolicy, SlotBounds
from dms_jax.policies.keep_all import unmarked


class Pairs(NamedTuple):
    """Candidates of one layer: the slots, then the chunk's pairs. What is not alive holds anything, NaN included."""

    k: Float[Array, "B K S H"]  # after RoPE
    position: Int[Array, "B K S"]
    alive: Bool[Array, "B K S"]
    statistic: Float[Array, "B K S F"] | None
    now: Int[Array, "B"]  # the last query of each row

    @property
    def memory(self) -> Float[Array, "B K S F"]:
        """`statistic`, for a method that has `features`."""
        assert self.statistic is not None
        return self.statistic

    @property
    def age(self) -> Int[Array, "B K S"]:
        """Later queries since each pair came; 0 for what is not alive."""
        return jnp.where(self.alive, self.now[:, None, None] - self.position, 0)


@dataclass(frozen=True)
class BudgetPolicy(CachePolicy):
    """Base of the methods. A subclass gives `keep_scores`, and, where it looks at attention, `observed` and `observe`."""

    ranks_pairs = True
    has_budget = True

    budget: int

    def __post_init__(self):
        if not isinstance(self.budget, int) or isinstance(self.budget, bool) or self.budget < self.least_budget:
            raise ConfigError(
                f"budget of {type(self).__name__} must be a whole number >= {self.least_budget}, got {self.budget!r}"
            )

    @property
    def least_budget(self) -> int:
        """The smallest budget that the method's own parameters leave room in."""
        return 1

    @property
    def observed(self) -> int:
        """How many of a chunk's last queries `observe` wants to see the attention of."""
        return 0

    @property
    def window_size(self) -> int:
        return 0  # never asked: a budget never fills a buffer that has room for it

    def slot_bounds(self) -> SlotBounds:
        return SlotBounds(self.budget, self.budget, f"a budget of {self.budget} pairs")

    def pairs_read(self, live: Float[Array, "*A"]) -> Float[Array, "*A"]:
        """A full cache is ranked after attention: the token that makes one pair too many has read them all."""
        return jnp.where(live >= self.budget, self.budget + 1, live)

    def keep_scores(self, pairs: Pairs) -> Float[Array, "B K S"]:
        """How much each pair deserves to stay; the highest `budget` do, the newest among equals. Arbitrary where not alive."""
        raise NotImplementedError(f"{type(self).__name__} has no keep_scores")

    def arrive(self, k: Float[Array, "B K T H"]) -> Float[Array, "B K T F"] | None:
        """What is remembered of pairs when they come."""
        return jnp.zeros((*k.shape[:3], self.features), jnp.float32) if self.features else None

    def observe(
        self,
        statistic: Float[Array, "B K S F"],
        weights: Float[Array, "B K n S"],
        real: Bool[Array, "B n"],
        alive: Bool[Array, "B K S"],
    ) -> Float[Array, "B K S F"]:
        """What is remembered after the last n queries paid attention `weights` (averaged over the query heads of each KV
        head); of those only the `real` ones exist, which are the last of the n."""
        return statistic

    def mark(
        self,
        logits: Float[Array, "B K T"],
        position: Int[Array, "B T"],
        count: Int[Array, "B"],
        threshold: float | Float[Array, ""],
    ) -> Expiries:
        return unmarked(logits)

    def select(
        self,
        q: Float[Array, "B T N H"],
        k: Float[Array, "B K T H"],
        expiries: Expiries,
        slots: LayerCache,
        position: Int[Array, "B T"],
        count: Int[Array, "B"],
    ) -> Selection | None:
        pairs = self.after(q, k, expiries, slots, position, count)
        return Selection(
            best(self.keep_scores(pairs), pairs.alive, pairs.position, self.budget, leaving=k.shape[2]), pairs.statistic
        )

    def after(self, q, k, expiries, slots, position, count) -> Pairs:
        """All pairs after a chunk, its attention observed."""
        now, length = position[:, 0] + count - 1, k.shape[2]
        chunk_position = jnp.broadcast_to(position[:, None], expiries.expiry.shape)
        both = lambda slot, new: jnp.concatenate([slot, new.astype(slot.dtype)], axis=2)
        keys, positions = both(slots.k, k), both(slots.position, chunk_position)
        alive = alive_pairs(slots, expiries.expiry, now, count)
        coming = self.arrive(k)
        statistic = None if slots.statistic is None or coming is None else both(slots.statistic, coming)
        if (number := min(self.observed, length)) and statistic is not None:
            index = count[:, None] - number + jnp.arange(number)  # of the last `number` queries; below 0 there is none
            real, at = index >= 0, jnp.maximum(index, 0)
            last = jnp.take_along_axis(q, at[..., None, None], axis=1)
            weights = attention_weights(
                last, position[:, :1] + at, keys, positions, both(slots.expiry, expiries.expiry)
            )
            statistic = self.observe(statistic, weights, real, alive)
        return Pairs(keys, positions, alive, statistic, now)


@typed
def best(
    scores: Float[Array, "B K S"],
    alive: Bool[Array, "B K S"],
    position: Int[Array, "B K S"],
    budget: int,
    leaving: int | None = None,
) -> Bool[Array, "B K S"]:
    """The `budget` alive pairs with the highest scores, of equals the newest. At most `leaving` of the alive ones are too many."""
    scores = jnp.where(alive, scores, -jnp.inf)
    if leaving == 1:  # a decoded token: one minimum instead of a sort
        lowest = alive & (scores == jnp.min(jnp.where(alive, scores, jnp.inf), axis=-1, keepdims=True))
        worst = jnp.argmin(jnp.where(lowest, position, jnp.iinfo(jnp.int32).max), axis=-1)[..., None]
        too_many = jnp.sum(alive, axis=-1, keepdims=True) > budget
        return alive & ~(too_many & (jnp.arange(alive.shape[-1]) == worst))
    order = jnp.lexsort((-jnp.where(alive, position, -1), -scores), axis=-1)  # best first, dead ones last
    rank = jnp.argsort(order, axis=-1)
    return alive & (rank < budget)
