"""A cache of fixed capacity whose freed slots are reused.

Slots are unordered: `position` and `expiry` say what each one holds.

A slot is live at query t iff its expiry >= t. The number of live slots after token t is thus the number of visible
pairs in the mask, those pairs j <= t that are unmarked or have t - j <= window. It never falls while tokens are
appended. If each new pair takes the lowest free slot, the live slots of a head are therefore always 0..n-1, and nothing
is ever shifted (arXiv:2506.05345; Model-Optimizer `cache_paged.py`). The functions of this module do not know why a
pair leaves: a policy tells them in its `Expiries` and `Selection`.

Each chunk goes through three stages in `slot_attention.extend_layer`. For example, with a window of 2, token 5 arrives:

    slot                  0      1      2      3
    position              0      4      2      3     pairs 1 and 2 are marked: expiry 3 and 4; pair 4 is not decided yet
    1. apply_pending             e=6                 token 5 evicts pair 4 (decision_shift 1): its expiry becomes 4 + 2
    2. attend             live   live   -      live  query 5 sees the slots with expiry >= 5, and its own pair
    3. append                           5            slot 2 is the lowest free one
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
from dms_jax.core.cache_base import Cache, HostBounds, TokenHistory
from dms_jax.core.visibility import NEVER, is_outside_window
from dms_jax.platform_defaults import platform_defaults

EMPTY = NEVER  # position of an empty slot: later than any query, so the rule alone hides it
NEVER_VISIBLE = jnp.iinfo(jnp.int32).min  # expiry of an empty slot: earlier than any query


class Expiries(NamedTuple):
    """A policy's decisions about the T pairs of a chunk, and about the pair just before it if that was pending."""

    expiry: Int[Array, "B K T"]  # the last query position that sees each pair
    score: Float[Array, "B K T"]  # how dispensable each pair is; a full buffer pushes out the highest
    last_expiry: Int[Array, "B K"] | None  # expiry of the pair before the chunk; None if it was not pending
    last_score: Float[Array, "B K"] | None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LayerCache:
    """The slots of one layer. Which of them are live, free or pending follows from position, expiry and tokens seen."""

    k: Float[Array, "B K C H"]  # after RoPE
    v: Float[Array, "B K C H"]
    position: Int[Array, "B K C"]  # token index in its row, or EMPTY
    expiry: Int[Array, "B K C"]
    score: Float[Array, "B K C"]  # fp32
    forced_evictions: Int[Array, "B K"]  # pairs that a full buffer pushed out
    statistic: Float[Array, "B K C features"] | None = None  # numbers that the policy remembers for each pair
    head_state: Float[Array, "B K state"] | None = None  # and for each KV head
    budget: Int[Array, "B K"] | None = None  # live pairs that `core.budget_eviction` keeps; None if nothing is to keep

    @property
    def capacity(self) -> int:
        """Slots per row and KV head."""
        return self.k.shape[2]


class Selection(NamedTuple):
    """The pairs that a ranking policy keeps after a chunk: first the slots, then the chunk's own pairs."""

    kept: Bool[Array, "B K C+T"]
    statistic: Float[Array, "B K C+T features"] | None
    head_state: Float[Array, "B K state"] | None = None


@dataclass(frozen=True, repr=False)
class CompactCache(Cache):
    """The caches of all layers, and the tokens that each row has seen. It is an immutable pytree."""

    layers: tuple[LayerCache, ...]  # not stacked: capacities may differ, and a donated buffer is updated in place
    seen: Int[Array, "B"]  # tokens of each row so far, which is the position of the next one
    policy: Any  # a `policies.CachePolicy`, static under jit; `core` may not import `policies`
    overflow: Overflow = "evict"
    bounds: HostBounds | None = field(default=None, init=False, compare=False)
    history: TokenHistory | None = field(default=None, init=False, compare=False)

    def described_room(self) -> tuple[int, str]:
        least, most = min(self.capacities), max(self.capacities)
        return self.layers[0].k.shape[1], f"{least} slots" if least == most else f"{least} to {most} slots"

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def capacities(self) -> tuple[int, ...]:
        """Slots per row and KV head of each layer."""
        return tuple(layer.capacity for layer in self.layers)

    @property
    def live_counts(self) -> Int[Array, "L B K"]:
        return jnp.stack(
            [jnp.sum(layer.expiry >= self.seen[:, None, None] - 1, axis=-1, dtype=jnp.int32) for layer in self.layers]
        )

    @property
    def staying_counts(self) -> Int[Array, "L B K"]:
        return jnp.stack([jnp.sum(layer.expiry == NEVER, axis=-1, dtype=jnp.int32) for layer in self.layers])

    @property
    def forced_evictions(self) -> Int[Array, "L B K"]:
        return jnp.stack([layer.forced_evictions for layer in self.layers])

    @property
    def pair_bytes(self) -> int:
        return 2 * self.layers[0].k.shape[3] * self.layers[0].k.dtype.itemsize

    def read_bounds(self) -> HostBounds:
        live = tuple(np.asarray(self.live_counts).max(axis=(1, 2)).tolist())
        budgets = [layer.budget for layer in self.layers if layer.budget is not None]
        return HostBounds(int(np.max(self.seen)), live, tuple(int(np.max(b)) for b in budgets) if budgets else None)

    def layer(self, index: int) -> LayerCache:
        return self.layers[index]

    def with_layer(self, index: int, layer: LayerCache) -> "CompactCache":
        return replace(self, layers=(*self.layers[:index], layer, *self.layers[index + 1 :]))

    def repeated(self, chains: int) -> "CompactCache":
        return jax.tree.map(lambda x: jnp.repeat(x, chains, axis=0), self)


jax.tree_util.register_dataclass(CompactCache, ["layers", "seen"], ["policy", "overflow"])


def empty_layer(
    batch: int,
    kv_heads: int,
    capacity: int,
    head_dim: int,
    dtype: jnp.dtype,
    features: int = 0,
    head_state: Float[Array, "state"] | None = None,
) -> LayerCache:
    """Make a layer that has seen no token.

    Its policy remembers `features` numbers for each pair, and numbers that begin as `head_state` for each KV head.
    """
    slots = (batch, kv_heads, capacity)
    return LayerCache(
        k=jnp.zeros((*slots, head_dim), dtype),
        v=jnp.zeros((*slots, head_dim), dtype),
        position=jnp.full(slots, EMPTY, jnp.int32),
        expiry=jnp.full(slots, NEVER_VISIBLE, jnp.int32),
        score=jnp.zeros(slots, jnp.float32),
        forced_evictions=jnp.zeros(slots[:2], jnp.int32),
        statistic=jnp.zeros((*slots, features), jnp.float32) if features else None,
        head_state=None if head_state is None else jnp.tile(head_state, (*slots[:2], 1)),
    )


def apply_pending(layer: LayerCache, expiries: Expiries, seen: Int[Array, "B"], count: Int[Array, "B"]) -> LayerCache:
    """Apply the first token's decision about the pair before the chunk. A row without tokens decides nothing."""
    if expiries.last_expiry is None:
        return layer
    assert expiries.last_score is not None  # set together with `last_expiry`
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
    keep: Bool[Array, "B K C"],
    new: Bool[Array, "B K T"],
) -> LayerCache:
    """Write pairs into free slots, by stream compaction.

    In each head, the r-th pair of `new` goes into the r-th lowest slot that is not in `keep`. There must be enough such
    slots.
    """
    slot = slots_of(keep, new)
    return replace(
        layer,
        k=_write(layer.k, k, slot),
        v=_write(layer.v, v, slot),
        position=_write(layer.position, position, slot),
        expiry=_write(layer.expiry, expiry, slot),
        score=_write(layer.score, score, slot),
    )


def slots_of(keep: Bool[Array, "B K C"], new: Bool[Array, "B K T"]) -> Int[Array, "B K T"]:
    """Return the slot that `write_pairs` writes each pair to; C, past the last slot, for a pair not in `new`."""
    capacity, length = keep.shape[-1], new.shape[-1]
    free = _lowest(~keep, min(length, capacity))
    rank = jnp.clip(jnp.cumsum(new, axis=-1) - 1, 0, free.shape[-1] - 1)
    return jnp.where(new, jnp.take_along_axis(free, rank, axis=-1), capacity)


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
    """Write the first `count` pairs of a chunk into free slots.

    Pairs that have expired by the chunk's last query, and pairs that the `selection` of a ranking policy leaves out,
    are not written. If a head would then hold more pairs than its capacity, pairs are evicted one by one, as `victim`
    chooses them, until the rest fit; `forced_evictions` counts them.
    """
    capacity, length = layer.capacity, k.shape[2]
    now = seen + count - 1  # position of each row's last query
    position = jnp.broadcast_to((seen[:, None] + jnp.arange(length)[None])[:, None], expiries.expiry.shape)
    if selection is None:
        wanted = alive_pairs(layer, expiries.expiry, now, count)
    else:
        wanted = selection.kept
        layer = replace(layer, expiry=jnp.where(wanted[..., :capacity], layer.expiry, NEVER_VISIBLE))
        if selection.statistic is not None:
            layer = replace(layer, statistic=selection.statistic[:, :, :capacity])
        if selection.head_state is not None:
            layer = replace(layer, head_state=selection.head_state)
    kept = _push_out(wanted, layer, position, expiries.score, now, window_size)
    forced = jnp.sum(wanted, axis=-1, dtype=jnp.int32) - jnp.sum(kept, axis=-1, dtype=jnp.int32)
    moved = write_pairs(
        layer, k, v, position, expiries.expiry, expiries.score, kept[..., :capacity], kept[..., capacity:]
    )
    statistic = layer.statistic
    if selection is not None and selection.statistic is not None:
        assert statistic is not None  # allocated by `empty_layer`, because the policy has `features`
        slot = slots_of(kept[..., :capacity], kept[..., capacity:])
        statistic = _write(statistic, selection.statistic[:, :, capacity:], slot)
    return replace(moved, forced_evictions=layer.forced_evictions + forced, statistic=statistic)


def alive_pairs(
    layer: LayerCache, expiry: Int[Array, "B K T"], now: Int[Array, "B"], count: Int[Array, "B"]
) -> Bool[Array, "B K C+T"]:
    """Return which slots, and after them which of a chunk's pairs, the last query of each row sees."""
    new = (jnp.arange(expiry.shape[-1])[None] < count[:, None])[:, None] & (expiry >= now[:, None, None])
    return jnp.concatenate([layer.expiry >= now[:, None, None], new], axis=-1)


@typed
def victim(
    alive: Bool[Array, "B K S"],
    position: Int[Array, "B K S"],
    score: Float[Array, "B K S"],
    now: Int[Array, "B"],
    window_size: int,
) -> Int[Array, "B K"]:
    """Return which of S pairs an overflowing head evicts: THE overflow rule.

    It is the pair outside the window with the highest score, and the oldest among equals. If all pairs are inside the
    window, it is the oldest of all.
    """
    outside = alive & is_outside_window(now[:, None, None], jnp.where(alive, position, 0), window_size)
    score = jnp.where(outside, score, -jnp.inf)
    first = jnp.where(outside.any(-1, keepdims=True), outside & (score == score.max(-1, keepdims=True)), alive)
    return jnp.argmin(jnp.where(first, position, EMPTY), axis=-1)


def _push_out(wanted, layer, position, score, now, window_size):
    """Return which of the `wanted` slots and chunk pairs [B K C+T] stay, so that no head exceeds its capacity."""
    positions = jnp.concatenate([layer.position, position], axis=-1)
    scores = jnp.concatenate([layer.score, score], axis=-1)

    def too_many(alive):
        return jnp.sum(alive, axis=-1, keepdims=True) > layer.capacity

    def one_less(alive):
        leaves = (
            jnp.arange(alive.shape[-1])[None, None] == victim(alive, positions, scores, now, window_size)[..., None]
        )
        return alive & ~(leaves & too_many(alive))

    if score.shape[-1] == 1 and platform_defaults().loop_free_decode:  # one token adds at most one pair too many
        return one_less(wanted)
    return lax.while_loop(lambda alive: jnp.any(too_many(alive)), one_less, wanted)


def _lowest(free: Bool[Array, "B K C"], number: int) -> Int[Array, "B K number"]:
    """Return the `number` lowest free slots in order; entries after the last free slot are arbitrary."""
    if number == 1:
        return jnp.argmax(free, axis=-1)[..., None]
    count, rank = jnp.cumsum(free, axis=-1, dtype=jnp.int32), jnp.arange(1, number + 1, dtype=jnp.int32)
    search = lambda count: jnp.searchsorted(count, rank, method="scan_unrolled")  # cheaper than a sort
    return jax.vmap(jax.vmap(search))(count)


def grown(layer: LayerCache, capacity: int) -> LayerCache:
    """Copy a layer into a larger buffer of `capacity` slots."""
    batch, kv_heads, old, head_dim = layer.k.shape
    features = 0 if layer.statistic is None else layer.statistic.shape[-1]
    empty = empty_layer(batch, kv_heads, capacity - old, head_dim, layer.k.dtype, features)
    names = ["k", "v", "position", "expiry", "score"] + (["statistic"] if features else [])
    larger = {name: jnp.concatenate([getattr(layer, name), getattr(empty, name)], axis=2) for name in names}
    return replace(layer, **larger)
