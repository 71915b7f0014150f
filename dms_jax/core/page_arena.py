"""The memory of a paged cache on one device: pages of keys and values, and which of them are free.

Everything here runs on the device, inside the jitted step, because only the device knows how many pairs a head keeps.
Page 0 belongs to nobody: it is what `take` gives when no page is free, and writes to it are dropped. So a cache that
runs out of pages loses pairs of the head that wanted one, and never touches a page that somebody else holds.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Bool, Float, Int

from dms_jax.axes import Array, typed
from dms_jax.platform_defaults import platform_defaults

NOBODY = 0  # the page that is never given away
FEW_WRITES = 256  # pairs that XLA writes into an arena of any order in place


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Arena:
    """The pages of all rows, layers and KV heads of one device; `paged_cache` has a leading axis of devices."""

    k: Float[Array, "*M N S H"]  # after RoPE
    v: Float[Array, "*M N S H"]
    references: Int[Array, "*M N"]  # how many heads hold each page
    free: Int[Array, "*M N"]  # a stack: the first `free_count` entries are the free pages
    free_count: Int[Array, "*M"]
    # Of each pair, under exact budgets only: how dispensable it is, and its position, which breaks ties.
    score: Float[Array, "*M N S"] | None = None
    position: Int[Array, "*M N S"] | None = None

    @property
    def num_pages(self) -> int:
        """Pages of one device, including page 0."""
        return self.k.shape[-3]

    @property
    def page_size(self) -> int:
        """Pairs of one page."""
        return self.k.shape[-2]


def contents(arena: Arena) -> dict[str, Array]:
    """Return what an arena stores for each pair, by name."""
    found = {name: getattr(arena, name) for name in ("k", "v", "score", "position")}
    return {name: x for name, x in found.items() if x is not None}


def empty_arena(
    arenas: int, num_pages: int, page_size: int, head_dim: int, dtype: jnp.dtype, with_scores: bool = False
) -> Arena:
    """Make arenas without pages in use; page 0 is one of the `num_pages` of each."""
    pages = (arenas, num_pages, page_size)
    free = jnp.roll(jnp.arange(num_pages, dtype=jnp.int32), -1)
    return Arena(
        k=jnp.zeros((*pages, head_dim), dtype),
        v=jnp.zeros((*pages, head_dim), dtype),
        references=jnp.zeros(pages[:2], jnp.int32),
        free=jnp.tile(free, (arenas, 1)),
        free_count=jnp.full(arenas, num_pages - 1, jnp.int32),
        score=jnp.zeros(pages, jnp.float32) if with_scores else None,
        position=jnp.zeros(pages, jnp.int32) if with_scores else None,
    )


@typed
def take(arena: Arena, wanted: Bool[Array, "*A"]) -> tuple[Arena, Int[Array, "*A"]]:
    """Take a page wherever one is wanted. Return its number, or 0 where none is wanted or none is free."""
    rank = jnp.cumsum(wanted.reshape(-1), dtype=jnp.int32).reshape(wanted.shape) - 1
    given = wanted & (rank < arena.free_count)
    page = jnp.where(given, arena.free[jnp.where(given, arena.free_count - 1 - rank, 0)], NOBODY)
    taken = replace(arena, free_count=arena.free_count - jnp.sum(given, dtype=jnp.int32))
    return share(taken, page), page


@typed
def share(arena: Arena, page: Int[Array, "*A"]) -> Arena:
    """Count one more reference to each of the pages; 0 stands for no page."""
    return replace(arena, references=jnp.asarray(arena.references).at[_target(arena, page)].add(1, mode="drop"))


@typed
def release(arena: Arena, page: Int[Array, "*A"]) -> Arena:
    """Give up one reference to each of the pages; a page without references is free again. 0 stands for no page."""
    left = jnp.asarray(arena.references).at[_target(arena, page)].add(-1, mode="drop")
    freed = (arena.references > 0) & (left == 0)
    rank = jnp.cumsum(freed, dtype=jnp.int32) - 1
    place = jnp.where(freed, arena.free_count + rank, arena.num_pages)
    free = jnp.asarray(arena.free).at[place].set(jnp.arange(arena.num_pages, dtype=jnp.int32), mode="drop")
    return replace(arena, references=left, free=free, free_count=arena.free_count + jnp.sum(freed, dtype=jnp.int32))


@typed
def copy_pages(arena: Arena, source: Int[Array, "*A"], target: Int[Array, "*A"]) -> Arena:
    """Copy the content of pages; a target of 0 is not written."""
    index = _target(arena, target).reshape(-1)
    copied = lambda x: jnp.asarray(x).at[index].set(x[source.reshape(-1)], mode="drop")
    return replace(arena, **{name: copied(x) for name, x in contents(arena).items()})


@typed
def pairs_at(arena: Arena, page: Int[Array, "*A"], offset: Int[Array, "*A"]) -> dict[str, Array]:
    """Return what an arena stores of the pairs at places in pages."""
    if not platform_defaults().pairs_in_rows(arena.k.shape[-1]):
        at = lambda x: jnp.take_along_axis(x[page], offset.reshape(*offset.shape, *(1,) * (x.ndim - 1)), offset.ndim)
        return {name: jnp.squeeze(at(x), offset.ndim) for name, x in contents(arena).items()}
    return {name: x[page, offset] for name, x in contents(arena).items()}


@typed
def write(
    arena: Arena,
    page: Int[Array, "B K T"],
    offset: Int[Array, "B K T"],
    pairs: Mapping[str, Array],
) -> Arena:
    """Write pairs, as `contents` names them, to their places in pages; those of page 0 are dropped."""
    page = _target(arena, page)
    in_rows = platform_defaults().pairs_in_rows(arena.k.shape[-1]) or page.size <= FEW_WRITES

    def put(old: Array, new: Array) -> Array:
        if in_rows or old.ndim == 2:
            return jnp.asarray(old).at[page, offset].set(new.astype(old.dtype), mode="drop")
        # Few pairs at a time: for more of them, XLA would first copy the arena into another order.
        flat = lambda x: x.reshape(-1, *x.shape[3:])
        pad = lambda x, fill=0: jnp.pad(x, [(0, -len(x) % FEW_WRITES)] + [(0, 0)] * (x.ndim - 1), constant_values=fill)
        pages, offsets, new = pad(flat(page), arena.num_pages), pad(flat(offset)), pad(flat(new).astype(old.dtype))

        def put_few(index, old):
            some = lambda x: lax.dynamic_slice_in_dim(x, index * FEW_WRITES, FEW_WRITES)
            return old.at[some(pages), some(offsets)].set(some(new), mode="drop")

        return lax.fori_loop(0, len(pages) // FEW_WRITES, put_few, jnp.asarray(old))

    return replace(arena, **{name: put(x, pairs[name]) for name, x in contents(arena).items()})


def renumbered(
    references: Int[Array, "N"], num_pages: int
) -> tuple[Int[Array, "n"], Int[Array, "n"], Int[Array, "n"], Int[Array, ""], Int[Array, "N"]]:
    """Number the pages in use so that they come first in an arena of `num_pages` pages, which must have room for them.

    Return for the new arena: the old page whose content each page gets, the references, the stack of free pages and the
    number of free pages; and the new number of each old page.
    """
    old, page = len(references), jnp.arange(num_pages, dtype=jnp.int32)
    in_use = (references > 0) | (jnp.arange(old) == NOBODY)
    order = jnp.argsort(~in_use, stable=True).astype(jnp.int32)  # page 0 stays the first
    used = jnp.sum(in_use, dtype=jnp.int32)
    source = jnp.where(page < used, order[jnp.minimum(page, old - 1)], NOBODY)
    number = jnp.zeros(old, jnp.int32).at[order].set(jnp.arange(old, dtype=jnp.int32))
    free_count = num_pages - used
    return source, references[source], (page + used) % num_pages, free_count, jnp.where(in_use, number, NOBODY)


def _target(arena: Arena, page: Int[Array, "*A"]) -> Int[Array, "*A"]:
    """Return where to write: past the end, where writes are dropped, for page 0."""
    return jnp.where(page == NOBODY, arena.num_pages, page)
