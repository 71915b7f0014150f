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
from dms_jax.core import page_arena
from dms_jax.core.cache_base import Cache, HostBounds, TokenHistory
from dms_jax.core.page_arena import NOBODY, Arena
from dms_jax.sharding import devices_of, mesh_of, named_sharding, per_device


def pages_of(pairs: Any, page_size: int) -> Any:
    """Return how many pages hold so many pairs; numbers or arrays."""
    return -(-pairs // page_size)


def size_class(pages: int) -> int:
    """Round a number of pages up to one of few sizes, at most an eighth too large: each size is compiled."""
    step = max(1, (1 << (pages - 1).bit_length()) // 16)
    return -(-pages // step) * step


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


@dataclass(frozen=True)
class PagedCache(Cache):
    """The pages of all layers, and the tokens that each row has seen. It is an immutable pytree."""

    arena: Arena  # a leading axis of devices
    heads: HeadPages
    seen: Int[Array, "B"]
    policy: Any
    overflow: Overflow = "grow"
    bounds: HostBounds | None = field(default=None, init=False, compare=False)
    history: TokenHistory | None = field(default=None, init=False, compare=False)

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
        """Tokens that the table of each row has room for, even if all of them stay."""
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

    def layer(self, index: Any) -> PagedLayer:
        return PagedLayer(self.arena, self.heads, index)

    def with_layer(self, index: Any, layer: PagedLayer) -> "PagedCache":
        return replace(self, arena=layer.arena, heads=layer.heads)

    def repeated(self, chains: int) -> "PagedCache":
        rows, cache = jnp.repeat(jnp.arange(self.batch_size, dtype=jnp.int32), chains), self
        copies = np.asarray(_pages_to_copy(cache)) * (chains - 1)
        short = int((pages_on_devices(copies, cache.mesh) - np.asarray(cache.arena.free_count)).max())
        with mesh_of(self.arena.k):
            if short > 0:
                cache = resized(cache, size_class(self.arena.num_pages + short), self.heads.table.shape[-1])
            return select_rows(cache, rows)


jax.tree_util.register_dataclass(PagedCache, ["arena", "heads", "seen"], ["policy", "overflow"])


@typed
def pages_in_use(
    survivors: Int[Array, "*A B K"], seen: Int[Array, "B"], ring: int, page_size: int
) -> tuple[Int[Array, "*A B K"], Int[Array, "*A B K"]]:
    """Return how many pages hold the ring and the survivors of each head."""
    in_ring = pages_of(jnp.minimum(seen, ring), page_size)
    return jnp.broadcast_to(in_ring[:, None], survivors.shape), pages_of(survivors, page_size)


def _pages_to_copy(cache: PagedCache) -> Int[Array, "L B K"]:
    """Return how many pages a copy of each head cannot share: those of the ring, and the last one of survivors."""
    ring, survivors = pages_in_use(cache.heads.survivors, cache.seen, cache.heads.ring, cache.page_size)
    if cache.heads.budget is not None:  # any page of survivors may change
        return ring + survivors
    return ring + jnp.minimum(cache.heads.survivors % cache.page_size, 1)


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


def axes_of(arena: Arena, heads: HeadPages, batch: str = "batch", layers: str = ". ") -> tuple[Any, Any]:
    """Return the axes of all arrays, as `sharding.per_device` reads them; `batch` is the axis of rows."""
    pairs = None if arena.score is None else "arenas . ."
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

    Repeated rows share full pages of survivors and get copies of the others. There must be enough free pages for the
    copies; a head whose copy finds none is `starved`. With several devices, a row must be on the device of its source.
    """
    batch, kv_heads = cache.heads.survivors.shape[1:]
    arena, before = axes_of(cache.arena, cache.heads)
    _, after = axes_of(cache.arena, cache.heads, f"batch={len(rows)}")
    run = per_device(
        with_own_arena(partial(_share_rows, rows_before=batch)),
        (batch, kv_heads),
        [arena, before, f"batch={len(rows)}"],
        (arena, after),
    )
    new_arena, heads = run(cache.arena, cache.heads, rows)
    return replace(cache, arena=new_arena, heads=heads, seen=cache.seen[rows])


def _share_rows(arena: Arena, heads: HeadPages, rows: Array, rows_before: int) -> tuple[Arena, HeadPages]:
    """Count the pages of repeated rows, and give each row but the first one copies of the pages that may change."""
    own = heads.table.shape[1]
    if own < rows_before:  # each device has some of the rows, and knows them by numbers of its own
        rows = rows - jax.lax.axis_index("data") * own
    first = jnp.argmax(rows[:, None] == rows[None], axis=1) == jnp.arange(len(rows))
    heads = jax.tree.map(lambda x: x[:, rows], heads)
    table, page_size, ring_pages = heads.table, arena.page_size, heads.ring_pages(arena.page_size)
    column = jnp.arange(table.shape[-1])
    column = column[None, None, None]
    full = ring_pages + heads.survivors[..., None] // page_size
    may_change = (column < ring_pages) | (column >= full)
    if heads.budget is not None:
        may_change = jnp.ones_like(may_change)
    copied = may_change & ~first[None, :, None, None] & (table != NOBODY)
    references = jnp.zeros_like(arena.references)
    arena = page_arena.restacked(replace(arena, references=references))
    arena = page_arena.share(arena, jnp.where(copied, NOBODY, table))
    arena, page = page_arena.take(page_arena.restacked(arena), copied)
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
    return arena, replace(heads, table=jnp.where(copied, page, table), starved=starved)


@partial(jax.jit, static_argnames=("num_pages", "width"))
def resized(cache: PagedCache, num_pages: int, width: int) -> PagedCache:
    """Copy a cache into arenas of `num_pages` pages and a table of `width` columns; all pages in use must fit."""
    axes = axes_of(cache.arena, cache.heads)

    def own(arena, heads):
        arena, number = page_arena.resized(arena, num_pages)
        more = width - heads.table.shape[-1]
        return arena, replace(heads, table=jnp.pad(number[heads.table], ((0, 0),) * 3 + ((0, more),)))

    run = per_device(with_own_arena(own), cache.heads.survivors.shape[1:], list(axes), axes)
    arena, heads = run(cache.arena, cache.heads)
    return replace(cache, arena=arena, heads=heads)
