"""A chunk of tokens, or one, against the pages of a layer: attention over survivors, ring and chunk, then the append.

It is `slot_attention.extend_layer` for a `paged_cache`, under the same rule and with the same results.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Bool, Float, Int

from dms_jax.axes import Array, typed
from dms_jax.core import page_arena
from dms_jax.core.budget_eviction import keep_budgets
from dms_jax.core.compact_cache import EMPTY, NEVER_VISIBLE, Expiries, slots_of
from dms_jax.core.page_arena import NOBODY, Arena
from dms_jax.core.paged_cache import HeadPages, holds_pair, pages_in_use, pages_of
from dms_jax.core.slot_attention import (
    Chunk,
    KeyBlocks,
    SoftmaxPart,
    attend_rows,
    blocks_of,
    empty_part,
    fold_queries,
    merge_parts,
    unfold_queries,
)
from dms_jax.core.visibility import MASKED, NEVER, expiry_of
from dms_jax.platform_defaults import platform_defaults

# A decode step reads as many groups of as many pairs at a time; on a CPU, their keys and values fit into its cache.
GROUPS, GROUP_PAIRS = 6, 128
FEW_ROWS = 64  # query rows of a head up to which a group of pages takes a copy of its rows


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PageSlots:
    """The logical slots of a layer under the rule: first the ring, rounded up to pages, then the survivors."""

    position: Int[Array, "B K C"]  # 0 for a survivor, which every query may see
    expiry: Int[Array, "B K C"]
    score: Float[Array, "B K C"] | None
    budget: Int[Array, "B K"] | None


class PageOps(NamedTuple):
    """The functions that attend to the pages of a layer, chosen for one model: plain XLA or kernels."""

    attend_pages: Callable[..., SoftmaxPart]  # arguments of `attend_pages`
    attend_pairs: Callable[..., SoftmaxPart]  # arguments of `attend_pairs`


def extend_pages(
    arena: Arena,
    heads: HeadPages,
    q: Float[Array, "B T N H"],
    k: Float[Array, "B K T H"],
    v: Float[Array, "B K T H"],
    expiries: Expiries,
    chunk: Chunk,
    ops: PageOps,
) -> tuple[Float[Array, "B T N H"], Arena, HeadPages]:
    """Attend from a chunk to a layer's pages and to the chunk itself; return the output and the updated pages.

    `arena` is that of one device, and `heads` are those of one layer.
    """
    seen, count = chunk.position[:, 0], chunk.count
    # 1. The chunk's first token decides about the pair before the chunk.
    with jax.named_scope("apply_pending"):
        arena, heads = _apply_pending(arena, heads, expiries, seen, count)
        slots = None
        if q.shape[1] > 1 or heads.budget is not None:
            slots = _slots(arena, heads, seen)
            slots, expiries = keep_budgets(slots, expiries, seen, count, heads.ring - 1)
    ring_pages, rows = heads.ring_pages(arena.page_size), fold_queries(q, k.shape[1])
    if q.shape[1] == 1:
        # A single token is written before it attends. The pair that leaves the ring is just the one that its query no
        # longer sees, unless it becomes a survivor. So the query sees all pairs.
        with jax.named_scope("append"):
            arena, heads = append(arena, heads, k, v, expiries, slots, None, seen, count)
        in_ring = jnp.broadcast_to(jnp.minimum(seen + count, heads.ring)[:, None], heads.survivors.shape)
        with jax.named_scope("attention"):
            part = ops.attend_pages(
                rows, arena.k, arena.v, heads.table, in_ring, heads.survivors, ring_slots=ring_pages * arena.page_size
            )
    else:
        # 2. The pairs that the chunk may replace are copied out of their pages: of the ring, and under budgets all.
        assert slots is not None
        with jax.named_scope("gather"):
            old = _gathered(arena, heads.table if heads.budget is not None else heads.table[..., :ring_pages])
        size, own_position = old["k"].shape[2], jnp.broadcast_to(chunk.position[:, None], k.shape[:3])
        pairs = [
            (k, v, own_position, expiries.expiry),
            (old["k"], old["v"], slots.position[..., :size], slots.expiry[..., :size]),
        ]
        # 3. The chunk takes its places. XLA copies no page, because whatever is read afterwards stays where it is.
        survivors = heads.survivors
        with jax.named_scope("append"):
            arena, heads = append(arena, heads, k, v, expiries, slots, old, seen, count)
        with jax.named_scope("attention"):
            part = ops.attend_pairs(rows, chunk.position, pairs)
            if heads.budget is None:
                behind = heads.table[..., ring_pages:]
                survived = ops.attend_pages(
                    rows, arena.k, arena.v, behind, jnp.zeros_like(survivors), survivors, ring_slots=0
                )
                part = merge_parts(jax.tree.map(lambda *x: jnp.stack(x), part, survived))
    return unfold_queries(part.normalized().astype(q.dtype), q.shape[1]), arena, heads


def _apply_pending(arena, heads, expiries, seen, count) -> tuple[Arena, HeadPages]:
    if expiries.last_expiry is None:
        return arena, heads
    slot = (seen - 1) % heads.ring
    pending = ((count > 0) & (seen > 0))[:, None]
    at = (jnp.arange(heads.ring)[None] == slot[:, None])[:, None] & pending[..., None]
    heads = replace(heads, marked=jnp.where(at, (expiries.last_expiry != NEVER)[..., None], heads.marked))
    if arena.score is not None:
        page, offset = _place(
            heads.table, jnp.broadcast_to(slot[:, None, None], (*pending.shape[:1], *at.shape[1:2], 1)), arena
        )
        target = jnp.where(pending[..., None] & (page != NOBODY), page, arena.num_pages)
        arena = replace(
            arena, score=jnp.asarray(arena.score).at[target, offset].set(expiries.last_score[..., None], mode="drop")
        )
    return arena, heads


def _place(table: Int[Array, "B K P"], slot: Int[Array, "B K T"], arena: Arena) -> tuple[Array, Array]:
    """Return page and offset of logical slots."""
    column = jnp.broadcast_to(slot, (*table.shape[:2], slot.shape[-1])) // arena.page_size
    return jnp.take_along_axis(table, column, axis=-1), jnp.broadcast_to(slot % arena.page_size, column.shape)


def _ring_positions(ring: int, seen: Int[Array, "B"]) -> Int[Array, "B R"]:
    """Return which pair each ring slot holds after `seen` tokens; negative for none."""
    newest = seen[:, None] - 1
    return newest - (newest - jnp.arange(ring)[None]) % ring


def _slots(arena: Arena, heads: HeadPages, seen: Int[Array, "B"]) -> PageSlots:
    """Return the logical slots of a layer as the rule sees them."""
    ring, ring_slots = heads.ring, heads.ring_pages(arena.page_size) * arena.page_size
    shape = (*heads.table.shape[:2], heads.table.shape[2] * arena.page_size)
    position = jnp.broadcast_to(_ring_positions(ring, seen)[:, None], heads.marked.shape)
    filled = position >= 0
    expiry = jnp.where(filled, expiry_of(heads.marked, position, ring - 1), NEVER_VISIBLE)
    position = jnp.where(filled, position, EMPTY)
    is_survivor = jnp.arange(shape[2] - ring_slots)[None, None] < heads.survivors[..., None]
    behind, score = jnp.zeros_like(is_survivor, jnp.int32), None
    if arena.score is not None:
        stored = lambda x: x[heads.table].reshape(shape)
        score, behind = stored(arena.score), stored(arena.position)[..., ring_slots:]
    joined = lambda in_ring, gap, behind: jnp.concatenate(
        [in_ring, jnp.full((*shape[:2], ring_slots - ring), gap, jnp.int32), behind], axis=-1
    )
    return PageSlots(
        joined(position, EMPTY, jnp.where(is_survivor, behind, EMPTY)),
        joined(expiry, NEVER_VISIBLE, jnp.where(is_survivor, NEVER, NEVER_VISIBLE)),
        score,
        heads.budget,
    )


@typed
def attend_pages(
    rows: Float[Array, "B K R H"],
    k_pages: Float[Array, "N S H"],
    v_pages: Float[Array, "N S H"],
    table: Int[Array, "B K P"],
    in_ring: Int[Array, "B K"],
    survivors: Int[Array, "B K"],
    *,
    ring_slots: int,
) -> SoftmaxPart:
    """Return the softmax of each row over all pairs of its head; see `holds_pair` for where they are.

    The rows are folded queries, and `ring_slots` is a multiple of the page size. What a place without a pair holds has
    no effect, even if it is NaN.
    """
    is_few, holds = rows.shape[2] <= FEW_ROWS, (in_ring, ring_slots, survivors)
    if is_few and not platform_defaults().loop_free_decode:
        return _attend_groups(rows, k_pages, v_pages, table, *holds)
    page_size, columns = k_pages.shape[1], table.shape[2]
    pages = columns if is_few else min(columns, max(1, platform_defaults().slot_block // page_size))
    slot = jnp.arange(columns * page_size, dtype=jnp.int32)[None, None]
    filled = holds_pair(slot, in_ring[..., None], ring_slots, survivors[..., None])
    position = jnp.where(filled, 0, EMPTY)

    def load(start):
        own = lax.dynamic_slice_in_dim(table, start // page_size, pages, 2)
        part = lax.dynamic_slice_in_dim(position, start, pages * page_size, 2)
        return _pages(k_pages, own), _pages(v_pages, own), part, jnp.full_like(part, NEVER), None

    used = jnp.max(jnp.where(filled, slot + 1, 0))
    blocks = KeyBlocks(columns * page_size, pages * page_size, used, load)
    return attend_rows(rows, jnp.zeros((len(rows), 1), jnp.int32), [blocks])


def attend_pairs(
    rows: Float[Array, "B K R H"], position: Int[Array, "B T"], pairs: Sequence[tuple[Array, Array, Array, Array]]
) -> SoftmaxPart:
    """Return the softmax of folded queries over pairs that they see under the rule.

    `pairs` are keys, values [B K S H], positions and expiries [B K S] of several arrays of pairs.
    """
    block = platform_defaults().slot_block
    return attend_rows(rows, position, [blocks_of(*some, some[0].shape[2], block) for some in pairs])


def _attend_groups(rows, k_pages, v_pages, table, in_ring, ring_slots, survivors) -> SoftmaxPart:
    """Do the work of `attend_pages` for few rows.

    The pages of all heads are read in groups of `GROUP_PAIRS` pairs, some groups at a time, so the cost follows the sum
    of live pairs and not the longest head.
    """
    (_, size, h), queries = k_pages.shape, rows.reshape(-1, *rows.shape[2:])
    pages = max(1, GROUP_PAIRS // size)
    table = jnp.pad(table, ((0, 0), (0, 0), (0, -table.shape[2] % pages)))
    groups, pairs = table.shape[2] // pages, pages * size
    table, in_ring, survivors = table.reshape(-1, pages), in_ring.reshape(-1, 1), survivors.reshape(-1, 1)
    # 1. The groups that hold a pair come first in `order`.
    start = pairs * jnp.arange(groups, dtype=jnp.int32)[None]
    is_used = (start < in_ring) | ((start + pairs > ring_slots) & (start < ring_slots + survivors))
    order = jnp.pad(jnp.nonzero(is_used.reshape(-1), size=len(table), fill_value=0)[0], (0, GROUPS))
    used = jnp.sum(is_used, dtype=jnp.int32)

    # 2. An online softmax, whose parts are merged where several groups are of one head.
    def attend(index, part: SoftmaxPart) -> SoftmaxPart:
        group = lax.dynamic_slice_in_dim(order, index * GROUPS, GROUPS)
        head, slot = group // groups, pairs * (group % groups)[:, None] + jnp.arange(pairs)[None]
        visible = holds_pair(slot, in_ring[head], ring_slots, survivors[head])
        visible = visible & (index * GROUPS + jnp.arange(GROUPS) < used)[:, None]
        keys, values = (x[table[group]].reshape(GROUPS, pairs, h).astype(rows.dtype) for x in (k_pages, v_pages))
        s = jnp.einsum("wrh,wsh->wrs", queries[head], keys, preferred_element_type=jnp.float32) * h**-0.5
        s = jnp.where(visible[:, None], s, MASKED)
        row_max = jnp.asarray(part.row_max).at[head].max(s.max(-1))
        p = jnp.where(visible[:, None], jnp.exp(s - row_max[head][..., None]), 0.0)
        values = jnp.where(visible[..., None], values, 0)  # 0 * NaN is NaN
        out = jnp.einsum("wrs,wsh->wrh", p.astype(values.dtype), values, preferred_element_type=jnp.float32)
        rescale = jnp.exp(part.row_max - row_max)
        return SoftmaxPart(
            row_max,
            jnp.asarray(part.row_sum * rescale).at[head].add(p.sum(-1)),
            jnp.asarray(part.acc * rescale[..., None]).at[head].add(out),
        )

    part = lax.fori_loop(0, (used + GROUPS - 1) // GROUPS, attend, empty_part(queries.shape[:2], h))
    return jax.tree.map(lambda x: x.reshape(*rows.shape[:2], *x.shape[1:]), part)


def _gathered(arena: Arena, table: Int[Array, "B K P"]) -> dict[str, Array]:
    """Return copies of the pages in `table`, one after the other."""
    return {name: _pages(x, table) for name, x in page_arena.contents(arena).items()}


def _pages(stored: Array, table: Int[Array, "B K P"]) -> Array:
    return stored[table].reshape(*table.shape[:2], -1, *stored.shape[2:])


def append(
    arena: Arena,
    heads: HeadPages,
    k: Float[Array, "B K T H"],
    v: Float[Array, "B K T H"],
    expiries: Expiries,
    slots: PageSlots | None,
    old: Mapping[str, Array] | None,
    seen: Int[Array, "B"],
    count: Int[Array, "B"],
) -> tuple[Arena, HeadPages]:
    """Write the first `count` pairs of a chunk. A pair that leaves the ring survives unless it is gone by then.

    `slots` are those before the chunk, under budgets after `keep_budgets`; a decode step without budgets needs none.
    `old` holds copies of the ring's pages; None reads the pairs that leave it from the arena.
    """
    ring, page_size, length = heads.ring, arena.page_size, k.shape[2]
    moved, after = min(ring, length), seen + count
    ring_slots = heads.ring_pages(page_size) * page_size
    # 1. The oldest pairs of the ring, and after them those of the chunk: which leave the ring, and which survive?
    leaving = seen[:, None] - ring + jnp.arange(moved)[None]
    position = jnp.concatenate([leaving, seen[:, None] + jnp.arange(length)[None]], axis=1)
    exists = (position >= 0) & (position < after[:, None])
    leaves = exists & (position < after[:, None] - ring)
    old_slot = jnp.broadcast_to((leaving % ring)[:, None], (*heads.table.shape[:2], moved))
    if heads.budget is None:
        gone = jnp.concatenate(
            [jnp.take_along_axis(heads.marked, old_slot, axis=-1), expiries.expiry != NEVER], axis=-1
        )
        stays, staying = None, heads.survivors
    else:
        assert slots is not None
        now = after[:, None, None] - 1
        gone = jnp.concatenate([jnp.take_along_axis(slots.expiry, old_slot, axis=-1), expiries.expiry], axis=-1) < now
        stays = (slots.expiry >= now)[..., ring_slots:]
        staying = jnp.sum(stays, axis=-1, dtype=jnp.int32)
    survives = leaves[:, None] & ~gone
    # 2. Places of the survivors, and pages for them and for a ring that is not full yet.
    if stays is None:
        place = heads.survivors[..., None] + jnp.cumsum(survives, axis=-1, dtype=jnp.int32) - 1
    else:
        place = slots_of(stays, survives)
    survivors = staying + jnp.sum(survives, axis=-1, dtype=jnp.int32)
    arena, table, starved = _take_pages(arena, heads, survivors, seen, after, length)
    # 3. Write: survivors of the ring and of the chunk behind the ring, and the newest pairs into the ring.
    in_ring = exists & ~leaves & (position >= seen[:, None])
    slot = jnp.where(survives, ring_slots + place, (position % ring)[:, None])
    page, offset = _place(table, slot, arena)
    page = jnp.where(survives | in_ring[:, None], page, NOBODY)
    from_ring = _from_ring(arena, table, old_slot, old)
    own_position = jnp.broadcast_to(position[:, None, moved:], expiries.expiry.shape)
    own = {"k": k, "v": v, "score": expiries.score, "position": own_position}
    both = lambda stored, new: jnp.concatenate([stored, new.astype(stored.dtype)], axis=2)
    pairs = {name: both(stored, own[name]) for name, stored in from_ring.items()}
    if platform_defaults().reads_in_writes:
        arena, pairs = lax.optimization_barrier((arena, pairs))
    arena = page_arena.write(arena, page, offset, pairs)
    marked = _marks(heads, expiries, seen, after)
    return arena, replace(heads, table=table, survivors=survivors, marked=marked, starved=heads.starved | starved)


def _from_ring(
    arena: Arena, table: Int[Array, "B K P"], slot: Int[Array, "B K n"], old: Mapping[str, Array] | None
) -> dict[str, Array]:
    """Return the pairs of ring slots, from the copies `old` of their pages if there are some."""
    if old is None:
        page, offset = _place(table, slot, arena)
        return page_arena.pairs_at(arena, page, offset)
    at = lambda x: slot.reshape(*slot.shape, *(1,) * (x.ndim - 3))
    return {name: jnp.take_along_axis(x, at(x), axis=2) for name, x in old.items()}


def _marks(heads: HeadPages, expiries: Expiries, seen: Int[Array, "B"], after: Int[Array, "B"]) -> Bool[Array, "B K R"]:
    """Return the marks of the ring after the chunk; under budgets, no pair has one."""
    newest = _ring_positions(heads.ring, after)
    index = jnp.clip(newest - seen[:, None], 0, expiries.expiry.shape[-1] - 1)[:, None]
    of_chunk = jnp.take_along_axis(expiries.expiry != NEVER, jnp.broadcast_to(index, heads.marked.shape), axis=-1)
    is_new = (newest >= seen[:, None])[:, None]
    return jnp.where(is_new, of_chunk & (heads.budget is None), heads.marked)


def _take_pages(
    arena: Arena, heads: HeadPages, survivors: Array, seen: Array, after: Array, length: int
) -> tuple[Arena, Int[Array, "B K P"], Bool[Array, "B K"]]:
    """Take pages for more survivors and for a longer ring; return the table, and which heads did not get theirs."""
    page_size, columns = arena.page_size, heads.table.shape[-1]
    ring_pages, more = heads.ring_pages(page_size), pages_of(length, page_size)
    ring_before, before = pages_in_use(heads.survivors, seen, heads.ring, page_size)
    ring_after, behind = pages_in_use(survivors, after, heads.ring, page_size)
    step = jnp.arange(more, dtype=jnp.int32)[None, None]
    in_ring, in_survivors = ring_before[..., None] + step[..., :ring_pages], before[..., None] + step
    column = jnp.concatenate([in_ring, ring_pages + in_survivors], axis=-1)
    wanted = jnp.concatenate([in_ring < ring_after[..., None], in_survivors < behind[..., None]], axis=-1)
    arena, page = page_arena.take(arena, wanted & (column < columns))
    rows, kv_heads = (lax.broadcasted_iota(jnp.int32, column.shape, axis) for axis in (0, 1))
    table = (
        jnp.asarray(heads.table).at[rows, kv_heads, jnp.where(page == NOBODY, columns, column)].set(page, mode="drop")
    )
    return arena, table, jnp.any(wanted & (page == NOBODY), axis=-1)
