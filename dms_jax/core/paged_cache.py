"""A cache in pages: memory follows the number of live pairs of each head, in steps of a page.

Every layer, row and KV head has a ring of the newest `window_size + 1` pairs, which are always visible, and behind it
the survivors: the pairs that were not marked when they left the ring, in the order in which they left. Pages of all
heads come out of one arena (`page_arena`), so a head that keeps everything uses what a head that keeps nothing leaves.

    logical slots of a head     0 ... R-1            R', R'+1, ...       R = ring size, R' = R rounded up to pages
    hold                        pair p in p mod R    survivors
    pages                       table[: R'/S]        table[R'/S :]       S = page size

Nothing is searched, and no position or expiry is stored: the position of a ring pair follows from the tokens seen, and
a survivor never leaves. Full pages of survivors never change, so rows may share them (`fork`). Under exact budgets
(`budget_eviction`), a survivor may be replaced, so there a pair carries its score and position, and rows share nothing.

With several devices, each has an arena of its own for its rows and heads, and page numbers are those of the device.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Bool, Int

from dms_jax.axes import Array, typed
from dms_jax.config import Overflow
from dms_jax.config_reader import MAX_INT
from dms_jax.core import page_arena
from dms_jax.core.cache_base import Cache, HostBounds, TokenHistory
from dms_jax.core.page_arena import NOBODY, Arena
from dms_jax.core.page_counts import largest_that_fits, pages_of, size_class
from dms_jax.errors import ConfigError
from dms_jax.sharding import devices_of, mesh_of, named_sharding, per_device


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class HeadPages:
    """Which pages each head has, and what the cache must know about its pairs. Axis L is missing for one layer."""

    table: Int[Array, "*L B K P"]  # page of each `page_size` logical slots; 0 for none
    survivors: Int[Array, "*L B K"]  # pairs behind the ring
    marked: Bool[Array, "*L B K R"]  # of the pairs in the ring: whether they are gone when they leave it
    starved: Bool[Array, "*L B K"]  # whether the head has lost a pair because no page was free
    budget: Int[Array, "*L B K"] | None = None  # as in `LayerCache.budget`

    @property
    def ring(self) -> int:
        """Pairs in the ring."""
        return self.marked.shape[-1]

    def ring_pages(self, page_size: int) -> int:
        return pages_of(self.ring, page_size)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PagedLayer:
    """One layer of a paged cache as the model sees it: everything, and the number of the layer."""

    arena: Arena
    heads: HeadPages
    index: Int[Array, ""] | int

    def own(self) -> HeadPages:
        """Return the state of this layer's heads."""
        return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, self.index, 0, keepdims=False), self.heads)

    def updated(self, arena: Arena, heads: HeadPages) -> "PagedLayer":
        """Return the layer with another arena, and another state of its own heads."""
        put = lambda all_layers, one: jax.lax.dynamic_update_index_in_dim(all_layers, one, self.index, 0)
        return replace(self, arena=arena, heads=jax.tree.map(put, self.heads, heads))


@dataclass(frozen=True, repr=False)
class PagedCache(Cache):
    """The pages of all layers, and the tokens that each row has seen. It is an immutable pytree."""

    arena: Arena  # a leading axis of devices
    heads: HeadPages
    seen: Int[Array, "B"]
    policy: Any
    overflow: Overflow = "grow"
    bounds: HostBounds | None = field(default=None, init=False, compare=False)
    history: TokenHistory | None = field(default=None, init=False, compare=False)

    def described_room(self) -> tuple[int, str]:
        return self.heads.table.shape[2], f"{self.arena.num_pages} pages of {self.page_size} pairs for all heads"

    @property
    def num_layers(self) -> int:
        return self.heads.table.shape[0]

    @property
    def page_size(self) -> int:
        return self.arena.page_size

    @property
    def mesh(self) -> Mesh | None:
        """The mesh whose devices have an arena each; None for one device."""
        return devices_of(self.arena.k)

    @property
    def max_length(self) -> int:
        """Tokens that the table of each row has room for, whatever stays; under budgets, any number."""
        if self.heads.budget is not None:
            return MAX_INT
        return (self.heads.table.shape[-1] - self.heads.ring_pages(self.page_size)) * self.page_size

    @property
    def live_counts(self) -> Int[Array, "L B K"]:
        return self.heads.survivors + jnp.minimum(self.seen, self.heads.ring)[None, :, None]

    @property
    def staying_counts(self) -> Int[Array, "L B K"]:
        filled = jnp.arange(self.heads.ring)[None] < self.seen[:, None]
        return self.heads.survivors + jnp.sum(~self.heads.marked & filled[None, :, None], axis=-1, dtype=jnp.int32)

    @property
    def forced_evictions(self) -> Int[Array, "L B K"]:
        return jnp.zeros_like(self.heads.survivors)

    @property
    def starved(self) -> Bool[Array, "B"]:
        """Rows that have lost a pair because no page was free. Their results are wrong; those of others are not."""
        return jnp.any(self.heads.starved, axis=(0, 2))

    @property
    def pair_bytes(self) -> int:
        return 2 * self.arena.k.shape[-1] * self.arena.k.dtype.itemsize

    @property
    def page_bytes(self) -> int:
        """Bytes of everything that is stored in one page."""
        arenas, pages = self.arena.references.shape
        return sum(x.nbytes for x in page_arena.contents(self.arena).values()) // (arenas * pages)

    def read_bounds(self) -> HostBounds:
        seen, free = np.asarray(self.seen, np.int64), np.asarray(self.arena.free_count)
        most = self.max_length - int(seen.max())
        tokens = largest_that_fits(lambda count: count <= most and bool((pages_needed(self, count) <= free).all()))
        return HostBounds(int(seen.max()), tokens=tokens)

    def layer(self, index: Any) -> PagedLayer:
        return PagedLayer(self.arena, self.heads, index)

    def with_layer(self, index: Any, layer: PagedLayer) -> "PagedCache":
        return replace(self, arena=layer.arena, heads=layer.heads)

    def repeated(self, chains: int) -> "PagedCache":
        rows, cache = jnp.repeat(jnp.arange(self.batch_size, dtype=jnp.int32), chains), self
        copies = np.asarray(_pages_to_copy(cache)) * (chains - 1)
        short = int((pages_on_devices(copies, cache.mesh) - np.asarray(cache.arena.free_count)).max())
        if short > 0 and cache.overflow == "raise":
            pages = self.arena.num_pages
            raise ConfigError(
                f"a fork into {chains} chains needs {short} more pages than the {pages} of this cache; "
                f"use num_pages >= {pages + short}, or overflow='grow'"
            )
        with mesh_of(self.arena.k):
            if short > 0:
                pages = size_class(self.arena.num_pages + short, cache.page_bytes)
                cache = resized(cache, pages, self.heads.table.shape[-1])
            return select_rows(cache, rows)


jax.tree_util.register_dataclass(PagedCache, ["arena", "heads", "seen"], ["policy", "overflow"])


@typed
def pages_in_use(
    survivors: Int[Array, "*A B K"], seen: Int[Array, "B"], ring: int, page_size: int
) -> tuple[Int[Array, "*A B K"], Int[Array, "*A B K"]]:
    """Return how many pages hold the ring and the survivors of each head."""
    in_ring = pages_of(jnp.minimum(seen, ring), page_size)
    return jnp.broadcast_to(in_ring[:, None], survivors.shape), pages_of(survivors, page_size)


def holds_pair(slot: Any, in_ring: Any, ring_slots: int, survivors: Any) -> Any:
    """Return which logical slots hold a pair: the first `in_ring` slots, and `survivors` behind the `ring_slots` slots
    of the ring's pages. Arrays of NumPy or JAX that broadcast."""
    return (slot < in_ring) | ((slot >= ring_slots) & (slot < ring_slots + survivors))


def _pages_to_copy(cache: PagedCache) -> Int[Array, "L B K"]:
    """Return how many pages a copy of each head cannot share: those of the ring, and the last one of survivors."""
    ring, survivors = pages_in_use(cache.heads.survivors, cache.seen, cache.heads.ring, cache.page_size)
    if cache.heads.budget is not None:  # any page of survivors may change
        return ring + survivors
    return ring + jnp.minimum(cache.heads.survivors % cache.page_size, 1)


def pages_needed(
    cache: PagedCache, count: int, fraction: float | np.ndarray = 1.0, slack: int = 0
) -> Int[np.ndarray, "M"]:
    """Return how many more pages each device needs if each row appends `count` tokens.

    Each head keeps `fraction` of the pairs that leave its ring, and `slack` pairs more.
    """
    heads, size = cache.heads, cache.page_size
    seen, survivors = np.asarray(cache.seen, np.int64), np.asarray(heads.survivors, np.int64)
    leaving = np.maximum(seen + count - heads.ring, 0) - np.maximum(seen - heads.ring, 0)
    leaving = leaving[None, :, None]
    more = survivors + np.minimum(leaving, np.ceil(leaving * fraction).astype(np.int64) + slack)
    if heads.budget is not None:
        more = np.maximum(survivors, np.minimum(more, np.asarray(heads.budget) - heads.ring))
    in_ring = pages_of(np.minimum(seen + count, heads.ring), size) - pages_of(np.minimum(seen, heads.ring), size)
    needed = pages_of(more, size) - pages_of(survivors, size) + in_ring[None, :, None]
    return pages_on_devices(needed, cache.mesh)


def pages_on_devices(pages: Int[np.ndarray, "L B K"], mesh: Mesh | None) -> Int[np.ndarray, "M"]:
    """Sum numbers of pages over the heads that each device of a mesh holds; None is one device."""
    of_head = pages.sum(axis=0, dtype=np.int64)
    if mesh is None:
        return of_head.sum().reshape(1)
    return np.array([of_head[part].sum() for part in heads_on_devices(of_head.shape, mesh)])


def heads_on_devices(shape: tuple[int, ...], mesh: Mesh | None) -> list[tuple[slice, ...]]:
    """Return which of the heads [B K] each arena of a mesh holds, in the order of the arenas."""
    if mesh is None:
        return [(slice(None), slice(None))]
    arenas = named_sharding(("arenas",), (mesh.size,), mesh).devices_indices_map((mesh.size,))
    parts = named_sharding(("batch", "kv_heads"), shape, mesh).devices_indices_map(shape)
    return [parts[device] for device in sorted(arenas, key=lambda device: arenas[device][0].start or 0)]


def axes_of(arena: Arena | None, heads: HeadPages, batch: str = "batch", layers: str = ". ") -> tuple[Any, Any]:
    """Return the axes of all arrays, as `sharding.per_device` reads them; `batch` is the axis of rows."""
    pairs = None if arena is None or arena.score is None else "arenas . ."
    arena_axes, heads_axes = cast(Any, Arena), cast(Any, HeadPages)
    rows, budget = f"{layers}{batch} kv_heads", None if heads.budget is None else f"{layers}{batch} kv_heads"
    return (
        arena_axes("arenas . . .", "arenas . . .", "arenas .", "arenas .", "arenas", pairs, pairs),
        heads_axes(f"{rows} .", rows, f"{rows} .", rows, budget),
    )


def with_own_arena(function: Callable) -> Callable:
    """Let a function of one arena run on a device's part of an arena that has an axis of devices; it returns one first.

    `sharding.per_device` leaves each device an axis of 1.
    """

    def run(arena, *args):
        own, *rest = function(jax.tree.map(lambda x: x.reshape(x.shape[1:]), arena), *args)
        return jax.tree.map(lambda x: x[None], own), *rest

    return run


@jax.jit
def select_rows(cache: PagedCache, rows: Int[Array, "n"]) -> PagedCache:
    """Return a cache of n rows, in which row i continues as row `rows[i]` of `cache`; rows may repeat.

    The pages of rows that are left out become free. Repeated rows share full pages of survivors and get copies of the
    others. There must be enough free pages for the copies; a head whose copy finds none is `starved`. With several
    devices, a row must be on the device of its source.
    """
    batch, kv_heads = cache.heads.survivors.shape[1:]
    arena, before = axes_of(cache.arena, cache.heads)
    _, after = axes_of(cache.arena, cache.heads, f"batch={len(rows)}")
    run = per_device(
        with_own_arena(_share_rows),
        (batch, kv_heads),
        [arena, before, "batch", f"batch={len(rows)}"],
        (arena, after, f"batch={len(rows)}"),
    )
    new_arena, heads, seen = run(cache.arena, cache.heads, cache.seen, rows)
    return replace(cache, arena=new_arena, heads=heads, seen=seen)


def _share_rows(arena: Arena, heads: HeadPages, seen: Array, rows: Array) -> tuple[Arena, HeadPages, Array]:
    """Give up the pages of rows that are left out, and share or copy those of all but the first of repeated rows.

    Under exact budgets, nothing is shared: a full head writes over a pair at almost every step, at any place, so each
    row would soon need all of its pages for itself. With copies, it has them from the start.
    """
    own = heads.table.shape[1]
    rows = rows % own  # each device has some of the rows, and knows them by numbers of its own
    is_left_out = ~jnp.any(rows[:, None] == jnp.arange(own)[None], axis=0)
    arena = page_arena.release(arena, jnp.where(is_left_out[None, :, None, None], heads.table, NOBODY))
    is_repeated = jnp.argmax(rows[:, None] == rows[None], axis=1) < jnp.arange(len(rows))
    heads, seen = jax.tree.map(lambda x: x[:, rows], heads), seen[rows]
    table, page_size, ring_pages = heads.table, arena.page_size, heads.ring_pages(arena.page_size)
    column = jnp.arange(table.shape[-1])[None, None, None]
    full = ring_pages + heads.survivors[..., None] // page_size
    may_change = (column < ring_pages) | (column >= full) | (heads.budget is not None)
    extra = jnp.where(is_repeated[None, :, None, None], table, NOBODY)
    copied = may_change & (extra != NOBODY)
    arena = page_arena.share(arena, jnp.where(copied, NOBODY, extra))
    arena, page = page_arena.take(arena, copied)
    # Only these columns can hold a page that may change; all of them under budgets.
    if heads.budget is None:
        tail = jnp.minimum(full, table.shape[-1] - 1)
        ring = jnp.broadcast_to(jnp.arange(ring_pages), (*table.shape[:-1], ring_pages))
        at = jnp.concatenate([ring, tail], axis=-1)
        source, target = (jnp.take_along_axis(x, at, axis=-1) for x in (table, page))
    else:
        source, target = table, page
    arena = page_arena.copy_pages(arena, source, target)
    starved = heads.starved | jnp.any(copied & (page == NOBODY), axis=-1)
    return arena, replace(heads, table=jnp.where(copied, page, table), starved=starved), seen


def resized(cache: PagedCache, num_pages: int, width: int, donate: bool = False) -> PagedCache:
    """Copy a cache into arenas of `num_pages` pages and a table of `width` columns; all pages in use must fit.

    With `donate`, the memory of each array of the arenas is free as soon as its pages are copied. Then only one of
    these arrays at a time exists twice. The old cache must not be used afterwards.
    """
    (source, references, free, free_count), heads = _renumbered(cache.arena.references, cache.heads, num_pages, width)
    arena = replace(cache.arena, references=references, free=free, free_count=free_count)
    stored = {}
    for name, x in page_arena.contents(arena).items():
        stored[name] = _moved(x, source, cache.heads.survivors.shape[1:])
        if donate:
            jax.block_until_ready(stored[name])
            cast(jax.Array, x).delete()
    return replace(cache, arena=replace(arena, **stored), heads=heads)


@partial(jax.jit, static_argnames=("num_pages", "width"))
def _renumbered(
    references: Int[Array, "M N"], heads: HeadPages, num_pages: int, width: int
) -> tuple[tuple[Array, ...], HeadPages]:
    """Return what `page_arena.renumbered` says of the new arenas, and the heads with the new numbers of their pages."""

    def own(references, heads):
        *arena, number = page_arena.renumbered(references, num_pages)
        more = width - heads.table.shape[-1]
        return tuple(arena), replace(heads, table=jnp.pad(number[heads.table], ((0, 0),) * 3 + ((0, more),)))

    axes, pages = axes_of(None, heads)[1], "arenas ."
    run = per_device(
        with_own_arena(own), heads.survivors.shape[1:], [pages, axes], ((pages, pages, pages, "arenas"), axes)
    )
    return run(references, heads)


@partial(jax.jit, static_argnames="sizes")
def _moved(x: Array, source: Int[Array, "M n"], sizes: tuple[int, int]) -> Array:
    """Return arrays of pages [M N ...] whose page i is page `source[i]` of each device's `x`."""
    axes = " ".join(["arenas", *"." * (x.ndim - 1)])
    run = per_device(lambda x, source: x[0, source[0]][None], sizes, [axes, "arenas ."], axes)
    return run(x, source)
