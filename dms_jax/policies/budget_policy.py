"""Base of the training-free methods: a budget of live pairs per row and KV head, and a score that ranks pairs.

One score serves two protocols:
- **online** (`BudgetPolicy` itself): after each chunk of a prefill and after each decoded token, the pairs with the
  lowest scores leave until the budget is met. A query sees the pairs that were kept before its chunk, and the chunk up
  to itself. The result of a prefill therefore depends on its chunk size, and a head has at most `budget` pairs whenever
  a call returns.
- **prompt compression** (`prompt_compression.py`): the whole prompt is prefilled and ranked once, and the best `budget`
  pairs stay.

A method declares how many numbers the cache stores for each pair (`features`), and which for each KV head
(`head_state`), and computes its score from them (`keep_scores`).

With `adakv_heads`, the heads of a layer share one budget. Feng et al., "Ada-KV", arXiv:2407.11550, as in kvpress
(`adakv_press.py`): each head keeps its best pairs up to a safeguard, and the best other pairs of all heads fill the
rest. Only methods whose scores have one unit in all heads define it (`compares_heads`).
"""

from abc import abstractmethod
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple

import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from dms_jax.axes import Array, typed
from dms_jax.core.compact_cache import Expiries, LayerCache, Selection, alive_pairs
from dms_jax.core.slot_attention import attention_weights
from dms_jax.errors import ConfigError
from dms_jax.policies.cache_policy import CachePolicy, SlotBounds
from dms_jax.policies.keep_all import unmarked

ALPHA_SAFEGUARD = 0.2  # of the budget, for each head; as in the paper and in kvpress


class Pairs(NamedTuple):
    """The candidates of one layer: its slots, then the chunk's pairs. Dead ones may hold anything, even NaN."""

    k: Float[Array, "B K S H"]  # after RoPE
    position: Int[Array, "B K S"]
    alive: Bool[Array, "B K S"]
    statistic: Float[Array, "B K S features"] | None
    now: Int[Array, "B"]  # position of each row's last query
    head_state: Float[Array, "B K state"] | None = None

    @property
    def memory(self) -> Float[Array, "B K S features"]:
        """The `statistic` of a method that has `features`."""
        assert self.statistic is not None
        return self.statistic

    @property
    def age(self) -> Int[Array, "B K S"]:
        """Queries since each pair was added; 0 for pairs that are not alive."""
        return jnp.where(self.alive, self.now[:, None, None] - self.position, 0)


@dataclass(frozen=True)
class BudgetPolicy(CachePolicy):
    """Base of the methods. A subclass defines `keep_scores`, or also `num_observed` and `observe`."""

    has_budget: ClassVar[bool] = True
    ranks_pairs: ClassVar[bool] = True
    budget: int  # pairs per KV head; their mean over the heads of a layer if the heads share it
    adakv_heads: int | None = field(default=None, kw_only=True)  # the model's KV heads, if they share the budget

    def __post_init__(self):
        if not isinstance(self.budget, int) or isinstance(self.budget, bool) or self.budget < self.min_budget:
            raise ConfigError(
                f"the budget of {type(self).__name__} must be a whole number >= {self.min_budget}, got {self.budget!r}"
            )
        if (heads := self.adakv_heads) is not None:
            self.check_compares_heads()
            if not isinstance(heads, int) or isinstance(heads, bool) or heads < 1:
                raise ConfigError(f"adakv_heads must be the number of KV heads, a whole number >= 1, got {heads!r}")

    @property
    def min_budget(self) -> int:
        """The smallest budget that the method's other parameters allow."""
        return 1

    @property
    def num_observed(self) -> int:
        """The number of last queries of a chunk whose attention weights are passed to `observe`."""
        return 0

    @property
    def window_size(self) -> int:
        return 0  # unused: `victim()` asks only when a buffer overflows, and capacity >= budget is checked beforehand

    def slot_bounds(self) -> SlotBounds:
        """A head that shares its budget has all pairs of the layer, except what the safeguard leaves to the others."""
        others = (self.adakv_heads or 1) - 1
        most = self.budget + others * (self.budget - safeguard(self.budget))
        return SlotBounds(self.budget, most, f"a budget of {self.budget} pairs")

    def pairs_read(self, live: Float[Array, "*A"]) -> Float[Array, "*A"]:
        """At the budget, a token reads all pairs and its own, budget + 1 in total, before one of them leaves.

        If heads share the budget, the last axis is the heads of a layer, or `live` is their mean.
        """
        if self.adakv_heads is not None:
            mean = jnp.mean(live, axis=-1, keepdims=True) if jnp.ndim(live) else live
            return live + jnp.where(mean > self.budget - 0.5, 1, 0)  # half a pair less: a mean is not exact
        return jnp.where(live >= self.budget, self.budget + 1, live)

    @abstractmethod
    def keep_scores(self, pairs: Pairs) -> Float[Array, "B K S"]:
        """Score the pairs; the `budget` highest stay, the newest among equals. Scores of dead pairs are ignored."""

    def first_statistic(
        self, k: Float[Array, "B K T H"], v: Float[Array, "B K T H"]
    ) -> Float[Array, "B K T features"] | None:
        """Return the initial statistic of new pairs; None for a method without `features`."""
        return jnp.zeros((*k.shape[:3], self.features), jnp.float32) if self.features else None

    def importance(self, weights: Float[Array, "B K G n S"], v: Float[Array, "B K S H"]) -> Float[Array, "B K n S"]:
        """Return what each of n queries says about each pair with value `v`: by default its mean attention weight."""
        return jnp.mean(weights, axis=2)

    def observe(
        self,
        statistic: Float[Array, "B K S features"],
        weights: Float[Array, "B K n S"],
        real: Bool[Array, "B n"],
        alive: Bool[Array, "B K S"],
    ) -> Float[Array, "B K S features"]:
        """Update the statistic with the weights of the last n queries, which `importance` has computed.

        A row may have fewer than n queries; the `real` ones come last.
        """
        return statistic

    def observe_queries(
        self,
        state: Float[Array, "B K state"],
        q: Float[Array, "B T N H"],
        position: Int[Array, "B T"],
        count: Int[Array, "B"],
    ) -> Float[Array, "B K state"]:
        """Update the state of each KV head with the queries of a chunk, of which the first `count` are real."""
        return state

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
        v: Float[Array, "B K T H"],
        expiries: Expiries,
        slots: LayerCache,
        position: Int[Array, "B T"],
        count: Int[Array, "B"],
    ) -> Selection | None:
        pairs = self.pairs_after(q, k, v, expiries, slots, position, count)
        return Selection(self.kept(pairs, max_leaving=k.shape[2]), pairs.statistic, pairs.head_state)

    def kept(self, pairs: Pairs, max_leaving: int | None = None) -> Bool[Array, "B K S"]:
        """Return the pairs that stay; `max_leaving` as in `best`. Raises ConfigError for wrong `adakv_heads`."""
        scores, heads = self.keep_scores(pairs), pairs.k.shape[1]
        if self.adakv_heads is None:
            return best(scores, pairs.alive, pairs.position, self.budget, max_leaving)
        if self.adakv_heads != heads:
            raise ConfigError(f"adakv_heads must be {heads}, the model's KV heads, got {self.adakv_heads}")
        return best_of_layer(scores, pairs.alive, pairs.position, self.budget)

    def pairs_after(self, q, k, v, expiries, slots, position, count) -> Pairs:
        """Return all pairs after a chunk, whose attention has updated the statistic; arguments as in `select`."""
        now, length = position[:, 0] + count - 1, k.shape[2]
        chunk_position = jnp.broadcast_to(position[:, None], expiries.expiry.shape)
        both = lambda slot, new: jnp.concatenate([slot, new.astype(slot.dtype)], axis=2)
        keys, positions = both(slots.k, k), both(slots.position, chunk_position)
        alive = alive_pairs(slots, expiries.expiry, now, count)
        first = self.first_statistic(k, v)
        statistic = None if slots.statistic is None or first is None else both(slots.statistic, first)
        if (number := min(self.num_observed, length)) and statistic is not None:
            # The last queries of each row; a negative index is one that does not exist.
            index = count[:, None] - number + jnp.arange(number)[None]
            real, at = index >= 0, jnp.maximum(index, 0)
            last = jnp.take_along_axis(q, at[..., None, None], axis=1)
            weights = attention_weights(
                last, position[:, :1] + at, keys, positions, both(slots.expiry, expiries.expiry)
            )
            values = jnp.where(alive[..., None], both(slots.v, v), 0)  # a dead slot may hold NaN
            statistic = self.observe(statistic, self.importance(weights, values), real, alive)
        state = None if slots.head_state is None else self.observe_queries(slots.head_state, q, position, count)
        return Pairs(keys, positions, alive, statistic, now, state)


@typed
def best(
    scores: Float[Array, "B K S"],
    alive: Bool[Array, "B K S"],
    position: Int[Array, "B K S"],
    budget: int,
    max_leaving: int | None = None,
) -> Bool[Array, "B K S"]:
    """Return the `budget` alive pairs with the highest scores, the newest among equals.

    The caller guarantees that at most `max_leaving` alive pairs exceed the budget; None makes no such promise.
    """
    scores = jnp.where(alive, scores, -jnp.inf)
    if max_leaving == 1:  # a decoded token: one minimum instead of a sort
        lowest = alive & (scores == jnp.min(jnp.where(alive, scores, jnp.inf), axis=-1, keepdims=True))
        worst = jnp.argmin(jnp.where(lowest, position, jnp.iinfo(jnp.int32).max), axis=-1)[..., None]
        too_many = jnp.sum(alive, axis=-1, keepdims=True) > budget
        return alive & ~(too_many & (jnp.arange(alive.shape[-1])[None, None] == worst))
    order = jnp.lexsort((-jnp.where(alive, position, -1), -scores), axis=-1)  # best first, dead ones last
    rank = jnp.argsort(order, axis=-1)
    return alive & (rank < budget)


def safeguard(budget: int) -> int:
    """Return how many of its best pairs a head always keeps if the heads of a layer share their budgets."""
    return int(ALPHA_SAFEGUARD * budget)


@typed
def best_of_layer(
    scores: Float[Array, "B K S"], alive: Bool[Array, "B K S"], position: Int[Array, "B K S"], budget: int
) -> Bool[Array, "B K S"]:
    """Return the K * `budget` best alive pairs of all heads together, among them each head's safeguard."""
    rows, heads, slots = scores.shape
    safe = best(scores, alive, position, safeguard(budget))
    together = lambda x: x.reshape(rows, 1, heads * slots)
    raised = jnp.where(safe, jnp.inf, scores)
    return best(together(raised), together(alive), together(position), heads * budget).reshape(scores.shape)
