"""Caches of random numbers whose heads hold given numbers of pairs, and the bytes that such a cache allocates.

A cache has just enough slots for the fullest head of each layer, which is the least that an engine with one array for
each layer can do.
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
from dms_jax.core.compact_cache import CompactCache, LayerCache
from dms_jax.core.visibility import NEVER
from dms_jax.engine.cache_capacity import layer_capacities
from dms_jax.models.decoder import Decoder


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


def max_rows(size: Callable[[int], int], budget: int) -> int:
    """Return the largest number of rows, at least 1, whose `size` is within the budget. `size` must not decrease."""
    rows = 1
    while size(2 * rows) <= budget:
        rows *= 2
    low, high = rows, 2 * rows  # low fits or is 1, high does not fit
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if size(middle) <= budget else (low, middle)
    return low
