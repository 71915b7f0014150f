"""Caches of random numbers whose heads hold given numbers of pairs, and the bytes that such a cache allocates.

A cache in slots has just enough of them for the fullest head of each layer, which is the least that an engine with one
array for each layer can do. A cache in pages has just enough pages for all heads.
"""

import dataclasses
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

import dms_jax
from dms_jax.axes import Array
from dms_jax.core.cache_base import TokenHistory
from dms_jax.core.compact_cache import CompactCache, LayerCache
from dms_jax.core.page_counts import PageShape, cache_bytes, largest_that_fits, pages_of, table_columns
from dms_jax.core.paged_cache import PagedCache
from dms_jax.core.visibility import NEVER
from dms_jax.engine.cache_capacity import layer_capacities
from dms_jax.errors import ConfigError
from dms_jax.models.decoder import Decoder
from dms_jax.platform_defaults import platform_defaults
from dms_jax.policies import policy_of


def empty_cache(model: Decoder, counts: Int[np.ndarray, "L B K"], room: int, dense: bool) -> CompactCache:
    """Make a cache for `counts` pairs of each head, and `room` more."""
    capacities = layer_capacities((counts.max(axis=(1, 2)) + room).tolist())
    return dms_jax.init_cache(model, counts.shape[1], capacities, overflow="evict", dense=dense)


def allocated_bytes(model: Decoder, counts: Int[np.ndarray, "L B K"], room: int, dense: bool) -> int:
    """Return the bytes of `filled_cache`, without making it."""
    return jax.eval_shape(partial(empty_cache, model, counts, room, dense)).bytes


def filled_cache(
    model: Decoder, counts: Int[np.ndarray, "L B K"], context: int, room: int, dense: bool
) -> CompactCache:
    """Make a cache that has seen `context` tokens in each row. Each head holds its count of them: the oldest and the
    newest, half each."""
    cache = empty_cache(model, counts, room, dense)

    @partial(jax.jit, donate_argnums=0)
    def fill(layer: LayerCache, live: Int[Array, "B K"], key) -> LayerCache:
        kv, live = jax.random.normal(key, (2, *layer.k.shape), layer.k.dtype), live[..., None]
        slot = jnp.arange(layer.capacity, dtype=jnp.int32)[None, None]
        position = jnp.where(slot < live - live // 2, slot, context - live + slot)
        return dataclasses.replace(
            layer,
            k=kv[0],
            v=kv[1],
            position=jnp.where(slot < live, position, layer.position),
            expiry=jnp.where(slot < live, NEVER, layer.expiry),
        )

    layers, cache = list(cache.layers), dataclasses.replace(cache, layers=())
    for index in range(len(layers)):
        layers[index] = fill(layers[index], jnp.asarray(counts[index], jnp.int32), jax.random.key(index))
    seen = jnp.full(counts.shape[1], context, jnp.int32)
    return dataclasses.replace(cache, layers=tuple(layers), seen=seen)


def ring_of(model: Decoder, dense: bool) -> int:
    """Return how many of its newest pairs a head of a cache in pages keeps in its ring."""
    return policy_of(model.config, "dense" if dense else None).ring_size or platform_defaults().page_size


def num_pages(model: Decoder, counts: Int[np.ndarray, "L B K"], room: int, dense: bool) -> int:
    """Return the pages of an arena for `counts` pairs of each head, and `room` more."""
    ring, size = ring_of(model, dense), platform_defaults().page_size
    if counts.min() < ring:
        raise ConfigError(
            f"heads of a cache in pages must hold at least the {ring} pairs of a window and its query, got "
            f"{counts.min()}; use a larger --context, a smaller --cr or --cache slots"
        )
    return 1 + int(np.sum(pages_of(ring, size) + pages_of(counts - ring + room, size)))


def allocated_page_bytes(model: Decoder, counts: Int[np.ndarray, "L B K"], context: int, room: int, dense: bool) -> int:
    """Return the bytes of `filled_pages`, without making it."""
    ring, size = ring_of(model, dense), platform_defaults().page_size
    shape = PageShape(size, model.config.head_dim, model.embed.get_value().dtype.itemsize)
    columns = table_columns(context + room, ring, size)
    return cache_bytes(shape, num_pages(model, counts, room, dense), columns, ring, counts.size, counts.shape[1])


def filled_pages(model: Decoder, counts: Int[np.ndarray, "L B K"], context: int, room: int, dense: bool) -> PagedCache:
    """Make a cache in pages that has seen `context` tokens in each row, and holds `counts` pairs of each head."""
    pages = num_pages(model, counts, room, dense)
    policy = "dense" if dense else None
    cache = dms_jax.init_pages(model, counts.shape[1], context + room, num_pages=pages, policy=policy)
    ring, size, column = cache.heads.ring, cache.page_size, np.arange(cache.heads.table.shape[-1])
    needed = pages_of(ring, size) + pages_of(counts - ring, size)
    first = 1 + np.cumsum(needed).reshape(needed.shape) - needed
    table, used = np.where(column < needed[..., None], first[..., None] + column, 0), int(needed.sum())
    references = (np.arange(pages) > 0) & (np.arange(pages) <= used)
    fill = jax.jit(lambda key: jax.random.normal(key, cache.arena.k.shape, cache.arena.k.dtype))
    arena = dataclasses.replace(
        cache.arena,
        k=fill(jax.random.key(0)),
        v=fill(jax.random.key(1)),
        references=jnp.asarray(references[None], jnp.int32),
        free=jnp.asarray(np.roll(np.arange(pages), -1 - used)[None], jnp.int32),
        free_count=jnp.asarray([pages - 1 - used], jnp.int32),
    )
    heads = dataclasses.replace(
        cache.heads, table=jnp.asarray(table, jnp.int32), survivors=jnp.asarray(counts - ring, jnp.int32)
    )
    seen = jnp.full(counts.shape[1], context, jnp.int32)
    filled = dataclasses.replace(cache, arena=arena, heads=heads, seen=seen)
    return filled.with_history(TokenHistory.empty(len(seen))).with_bounds(filled.read_bounds())


def max_rows(size: Callable[[int], int], budget: int) -> int:
    """Return the largest number of rows, at least 1, whose `size` is within the budget. `size` must not decrease."""
    return max(1, largest_that_fits(lambda rows: size(rows) <= budget))
