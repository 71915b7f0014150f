"""Layers of a compact cache filled with random pairs, for the cases of `kernel_cases`."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from dms_jax.core import compact_cache
from dms_jax.core.compact_cache import LayerCache
from dms_jax.core.visibility import NEVER

# (rows, KV heads, mean) -> the live pairs [B K] of each head, and slots for the fullest one
HeadCounts = Callable[[int, int, int], tuple[np.ndarray, int]]


def held_pairs(
    numbers: np.random.Generator,
    batch: int,
    kv_heads: int,
    capacity: int,
    live: int,
    head_counts: HeadCounts | None = None,
) -> tuple[np.ndarray, int]:
    """Return how many pairs each head holds [B K], `live` on average, and the capacity, as in `slot_case`."""
    if head_counts is not None:
        return head_counts(batch, kv_heads, live)
    spread = min(live // 4, capacity - live)
    return live + numbers.integers(-spread, spread + 1, (batch, kv_heads)), capacity


def filled_layer(
    numbers: np.random.Generator, counts: np.ndarray, capacity: int, head_dim: int, dtype: jnp.dtype
) -> tuple[LayerCache, jax.Array]:
    """Make a layer whose heads hold `counts` [B K] pairs. Returns the layer and the tokens seen [B]."""
    slots = (*counts.shape, capacity)
    held = np.arange(capacity) < counts[..., None]
    keys = jax.random.split(jax.random.key(int(numbers.integers(1 << 30))))
    k, v = (jax.random.normal(key, (*slots, head_dim), jnp.bfloat16).astype(dtype) for key in keys)
    empty = compact_cache.empty_layer(1, 1, 1, head_dim, dtype)
    filled = lambda value, otherwise: jnp.asarray(np.where(held, value, otherwise))
    position = np.broadcast_to(np.arange(capacity, dtype=np.int32), slots)
    layer = LayerCache(
        k,
        v,
        filled(position, empty.position[0, 0, 0]),
        filled(np.int32(NEVER), empty.expiry[0, 0, 0]),
        jnp.zeros(slots, jnp.float32),
        jnp.zeros(slots[:2], jnp.int32),
    )
    return layer, jnp.full(len(counts), capacity, jnp.int32)
