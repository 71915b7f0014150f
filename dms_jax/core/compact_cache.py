"""A cache of fixed capacity whose freed slots are used again. Slots are unordered: `position` and `expiry` say what each one is.

A slot is live at query t iff its expiry >= t, so the count after token t is that of the mask: #{j <= t : unmarked, or
t - j <= window}. That count never falls while tokens are appended, hence a new pair takes the lowest slot that is free,
live slots stay 0..n-1 of each head, and nothing is ever shifted (arXiv:2506.05345; Model-Optimizer `cache_paged.py`).
The functions here do not know why a pair leaves: a policy hands them a `Expiries`.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Bool, Float, Int

from dms_jax.axes import Array, typed
from dms_jax.config import Overflow
from dms_jax.core.visibility import NEVER, is_outside_window
from dms_jax.errors import ConfigError
from dms_jax.sharding import target_device

EMPTY = NEVER  # position of a slot that holds nothing: later than any query, so the rule alone hides it
GONE = jnp.iinfo(jnp.int32).min  # expiry of such a slot: earlier than any query


class Expiries(NamedTuple):
    """What a policy says about the T pairs of a chunk, and about the pair just before it when its decision was pending."""

    expiry: Int[Array, "B K T"]  # the last query position that sees each pair
    score: Float[Array, "B K T"]  # how much the policy wants each pair gone; a full buffer pushes out the highest
    last_expiry: Int[Array, "B K"] | None  # None: nothing was pending
    last_score: Float[Array, "B K"] | None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LayerCache:
    """One layer. No field is redundant: live, free and pending follow from position, expiry and the tokens seen."""

    k: Float[Array, "B K C H"]  # after RoPE
    v: Float[Array, "B K C H"]
    position: Int[Array, "B K C"]  # token index in its row, or EMPTY
    expiry: Int[Array, "B K C"]
    score: Float[Array, "B K C"]  # fp32
    forced_evictions: Int[Array, "B K"]  # pairs that a full buffer pushed out
    statistic: Float[Array, "B K C F"] | None = None  # what the policy remembers of each pair; None: it needs nothing

    @property
    def capacity(self) -> int:
        return self.k.shape[2]


class Selection(NamedTuple):
    """What a policy that ranks pairs says after a chunk about the slots and the chunk's pairs, in this order."""

    kept: Bool[Array, "B K C+T"]
    statistic: Float[Array, "B K C+T F"] | None


class HostBounds(NamedTuple):
    """Upper bounds that the host keeps without reading the device."""

    seen: int  # of all rows
    live: tuple[int, ...]  # per layer, of all rows and heads


@dataclass(frozen=True)
class CompactCache:
    """All layers, and how many tokens each row has seen. A pytree of fixed shapes; updates return a new one."""

    layers: tuple[LayerCache, ...]  # not stacked: capacities may differ, and a donated buffer is updated in place
    seen: Int[Array, "B"]  # tokens of each row so far; the next one has this position
    policy: Any  # a `CachePolicy`, which this layer does not know; hashable, part of the program
    overflow: Overflow = "evict"
    bounds: HostBounds | None = field(default=None, init=False, compare=False)  # set by `with_bounds`; None: not known

    def with_bounds(self, bounds: HostBounds) -> "CompactCache":
        """Return the same cache with bounds that the host knows. They are not part of the pytree, and `replace` drops them, so they
        never outlive the arrays that they describe."""
        known = replace(self)
        object.__setattr__(known, "bounds", bounds)
        return known

    @property
    def batch_size(self) -> int:
        return self.seen.shape[0]

    @property
    def capacities(self) -> tuple[int, ...]:
        """Slots per row and KV head, layer by layer."""
        return tuple(layer.capacity for layer in self.layers)

    @property
    def live_counts(self) -> Int[Array, "L B K"]:
        """Pairs that the last query of each row could see."""
        return jnp.stack(
            [jnp.sum(layer.expiry >= self.seen[:, None, None] - 1, axis=-1, dtype=jnp.int32) for layer in self.layers]
        )

    @property
    def forced_evictions(self) -> Int[Array, "L B K"]:
        """Pairs that a full buffer pushed out against the policy."""
        return jnp.stack([layer.forced_evictions for layer in self.layers])

    @property
    def bytes(self) -> int:
        """Memory of all arrays, book-keeping included."""
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self))


jax.tree_util.register_dataclass(CompactCache, ["layers", "seen"], ["policy", "overflow"])


def empty_layer(
    batch: int, kv_heads: int, capacity: int, head_dim: int, dtype: jnp.dtype, features: int = 0
) -> LayerCache:
    """A layer that has seen nothing; its policy remembers `features` numbers of each pair."""
    slots = (batch, kv_heads, capacity)
    return LayerCache(
        k=jnp.zeros((*slots, head_dim), dtype),
        v=jnp.zeros((*slots, head_dim), dtype),
        position=jnp.full(slots, EMPTY, jnp.int32),
        expiry=jnp.full(slots, GONE, jnp.int32),
        score=jnp.zeros(slots, jnp.float32),
        forced_evictions=jnp.zeros(slots[:2], jnp.int32),
        statistic=jnp.zeros((*slots, features), jnp.float32) if features else None,
    )


def apply_pending(layer: LayerCache, expiries: Expiries, seen: Int[Array, "B"], count: Int[Array, "B"]) -> LayerCache:
    """Write the decision about the pair before the chunk, which its first token makes; rows with no token decide nothing."""
    if expiries.last_expiry is None:
        return layer
    assert expiries.last_score is not None  # the two come together
    pending = (layer.position == seen[:, None, None] - 1) & (count > 0)[:, None, None]
    expiry = jnp.where(pending, expiries.last_expiry[..., None], layer.expiry)
    return replace(layer, expiry=expiry, score=jnp.where(pending, expiries.last_score[..., None], layer.score))


def write_pairs(
    layer: LayerCache,
    k: Float[Array, "B K T H"],
    v: Float[Array, "B K T H"],
    position: Int[Array, "B K T"],
    expiry: Int[Array, "B K T"],
    score: Float[Array, "B K T"],
    stays: Bool[Array, "B K C"],
    comes: Bool[Array, "B K T"],
) -> LayerCache:
    """Stream compaction: of each head, the r-th pair that `comes` goes into the r-th lowest slot that does not hold one that
    `stays`. There must be enough of those."""
    slot = slots_of(stays, comes)
    return replace(
        layer,
        k=_write(layer.k, k, slot),
        v=_write(layer.v, v, slot),
        position=_write(layer.position, position, slot),
        expiry=_write(layer.expiry, expiry, slot),
        score=_write(layer.score, score, slot),
    )


def slots_of(stays: Bool[Array, "B K C"], comes: Bool[Array, "B K T"]) -> Int[Array, "B K T"]:
    """Where each pair goes; no slot, `C`, for one that does not come."""
    capacity, length = stays.shape[-1], comes.shape[-1]
    free = _lowest(~stays, min(length, capacity))
    rank = jnp.clip(jnp.cumsum(comes, axis=-1) - 1, 0, free.shape[-1] - 1)
    return jnp.where(comes, jnp.take_along_axis(free, rank, axis=-1), capacity)


def _write(old: Array, new: Array, slot: Int[Array, "B K T"]) -> Array:
    rows, heads = (lax.broadcasted_iota(jnp.int32, slot.shape, axis) for axis in (0, 1))
    return jnp.asarray(old).at[rows, heads, slot].set(new.astype(old.dtype), mode="drop")


def append(
    layer: LayerCache,
    k: Float[Array, "B K T H"],
    v: Float[Array, "B K T H"],
    expiries: Expiries,
    seen: Int[Array, "B"],
    count: Int[Array, "B"],
    window_size: int,
    selection: Selection | None = None,
    write_pairs: Callable[..., LayerCache] = write_pairs,
) -> LayerCache:
    """Put the first `count` pairs of a chunk into free slots, but not those that have expired by its last query, nor those
    that a ranking policy's `selection` leaves out.

    When a head wants more than its capacity, `victim` says who goes until the rest fits; each one is counted.
    """
    capacity, length = layer.capacity, k.shape[2]
    now = seen + count - 1  # of each row: the last query
    position = jnp.broadcast_to((seen[:, None] + jnp.arange(length))[:, None], expiries.expiry.shape)
    if selection is None:
        wanted = alive_pairs(layer, expiries.expiry, now, count)
    else:
        wanted = selection.kept
        layer = replace(layer, expiry=jnp.where(wanted[..., :capacity], layer.expiry, GONE))
        if selection.statistic is not None:
            layer = replace(layer, statistic=selection.statistic[:, :, :capacity])
    kept = _push_out(wanted, layer, position, expiries.score, now, window_size)
    forced = jnp.sum(wanted, axis=-1, dtype=jnp.int32) - jnp.sum(kept, axis=-1, dtype=jnp.int32)
    moved = write_pairs(
        layer, k, v, position, expiries.expiry, expiries.score, kept[..., :capacity], kept[..., capacity:]
    )
    statistic = layer.statistic
    if selection is not None and selection.statistic is not None:
        assert statistic is not None  # a policy that remembers something has room for it
        slot = slots_of(kept[..., :capacity], kept[..., capacity:])
        statistic = _write(statistic, selection.statistic[:, :, capacity:], slot)
    return replace(moved, forced_evictions=layer.forced_evictions + forced, statistic=statistic)


def alive_pairs(
    layer: LayerCache, expiry: Int[Array, "B K T"], now: Int[Array, "B"], count: Int[Array, "B"]
) -> Bool[Array, "B K C+T"]:
    """Which slots, and which of a chunk's pairs after them, the last query of each row could see."""
    coming = (jnp.arange(expiry.shape[-1]) < count[:, None])[:, None] & (expiry >= now[:, None, None])
    return jnp.concatenate([layer.expiry >= now[:, None, None], coming], axis=-1)


@typed
def victim(
    alive: Bool[Array, "B K S"],
    position: Int[Array, "B K S"],
    score: Float[Array, "B K S"],
    now: Int[Array, "B"],
    window_size: int,
) -> Int[Array, "B K"]:
    """THE overflow rule: of the pairs outside the window the one with the highest score, the oldest among equals; only when
    all are inside, the oldest of those."""
    outside = alive & is_outside_window(now[:, None, None], jnp.where(alive, position, 0), window_size)
    score = jnp.where(outside, score, -jnp.inf)
    first = jnp.where(outside.any(-1, keepdims=True), outside & (score == score.max(-1, keepdims=True)), alive)
    return jnp.argmin(jnp.where(first, position, EMPTY), axis=-1)


def _push_out(wanted, layer, position, score, now, window_size):
    """Which of the slots and of the chunk's pairs [B K C+T] stay, so that no head has more than its capacity."""
    positions, scores = (
        jnp.concatenate([layer.position, position], axis=-1),
        jnp.concatenate([layer.score, score], axis=-1),
    )

    def too_many(alive):
        return jnp.sum(alive, axis=-1, keepdims=True) > layer.capacity

    def one_less(alive):
        leaves = jnp.arange(alive.shape[-1]) == victim(alive, positions, scores, now, window_size)[..., None]
        return alive & ~(leaves & too_many(alive))

    if (
        score.shape[-1] == 1 and target_device()[0] == "gpu"
    ):  # at most one too many; a loop would ask the host whether there is
        return one_less(wanted)
    return lax.while_loop(lambda alive: jnp.any(too_many(alive)), one_less, wanted)


def _lowest(free: Bool[Array, "B K C"], number: int) -> Int[Array, "B K number"]:
    """The `number` lowest free slots, in order; what follows the last free one is arbitrary."""
    if number == 1:
        return jnp.argmax(free, axis=-1)[..., None]
    count, rank = jnp.cumsum(free, axis=-1, dtype=jnp.int32), jnp.arange(1, number + 1, dtype=jnp.int32)
    return jax.vmap(jax.vmap(lambda count: jnp.searchsorted(count, rank, method="scan_unrolled")))(
        count
    )  # cheaper than a sort


def grown(layer: LayerCache, capacity: int) -> LayerCache:
    """The same pairs in a larger buffer."""
    batch, kv_heads, old, head_dim = layer.k.shape
    features = 0 if layer.statistic is None else layer.statistic.shape[-1]
    empty = empty_layer(batch, kv_heads, capacity - old, head_dim, layer.k.dtype, features)
    names = ["k", "v", "position", "expiry", "score"] + (["statistic"] if features else [])
    larger = {name: jnp.concatenate([getattr(layer, name), getattr(empty, name)], axis=2) for name in names}
    return replace(layer, **larger)


def fork(cache: CompactCache, chains: int) -> CompactCache:
    """Every row `chains` times over, copies of a row next to each other: one prompt, many continuations."""
    if chains < 1:
        raise ConfigError(f"fork wants at least 1 chain, got {chains}")
    return jax.tree.map(lambda x: jnp.repeat(x, chains, axis=0), cache)


def row_compression_ratios(cache: CompactCache) -> np.ndarray:
    """Per row: tokens seen / mean live pairs over layers and heads; 1 for a row that has seen nothing."""
    live, seen = np.asarray(cache.live_counts, np.float64), np.asarray(cache.seen, np.float64)
    return np.where(seen > 0, seen / np.maximum(live.mean(axis=(0, 2)), 1e-9), 1.0)


def compression_ratio(cache: CompactCache) -> float:
    """Realised compression: mean tokens seen / mean live pairs over layers, rows and heads, a ratio of means, >= 1.
    Model-Optimizer `cache.py`, `get_cr`."""
    live = np.asarray(cache.live_counts, np.float64).mean()
    return float(np.asarray(cache.seen, np.float64).mean() / live) if live else 1.0


def nominal_compression_ratio(cache: CompactCache) -> float:
    """What compression would be without a window: mean tokens seen / mean pairs that are never to leave, >= 1."""
    staying = np.mean([np.asarray(jnp.sum(layer.expiry == NEVER, axis=-1)) for layer in cache.layers])
    return float(np.asarray(cache.seen, np.float64).mean() / staying) if staying else float("inf")
