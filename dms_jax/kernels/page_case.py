"""Inputs, reference and cost of attention over pages, for `kernel_cases`."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from dms_jax.core import paged_attention
from dms_jax.core.page_counts import pages_of
from dms_jax.kernels import attention_api
from dms_jax.kernels.filled_layer import HeadCounts
from dms_jax.kernels.kernel_case import Case, with_implementation
from dms_jax.platform_defaults import platform_defaults

RING = 256  # pairs in the ring of a decode step
SPREAD = (
    0.8  # sigma of the logarithm of live pairs; their standard deviation is then 0.9 of the mean, as in real models
)
MIN_PAGE = 64  # pairs of a page that the kernels of all platforms can read


def page_case(
    batch: int,
    queries: int,
    capacity: int,
    live: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    dtype: jnp.dtype,
    cache_dtype: jnp.dtype | None = None,
    head_counts: HeadCounts | None = None,
) -> Case:
    """Make a case of a decode step (1 of `queries`), or of a chunk that attends to the survivors behind it.

    Heads have `live` pairs on average and at most `capacity`, and their numbers differ as those of a real model, unless
    `head_counts` chooses them.
    """
    cache_dtype, numbers = cache_dtype or dtype, np.random.default_rng(0)
    if head_counts is None:
        counts = np.exp(SPREAD * numbers.normal(size=(batch, kv_heads)))
        counts = np.clip(counts * live / counts.mean(), min(RING, live), capacity).astype(np.int32)
    else:
        counts, capacity = head_counts(batch, kv_heads, live)
    page_size = max(MIN_PAGE, platform_defaults().page_size)
    in_ring = np.minimum(counts, RING) if queries == 1 else np.zeros_like(counts)
    ring_slots = RING if queries == 1 else 0
    table = _table(numbers, in_ring, counts - in_ring, ring_slots, capacity, page_size)
    keys = jax.random.split(jax.random.key(0), 3)
    rows = jax.random.normal(keys[0], (batch, kv_heads, heads // kv_heads * queries, head_dim), dtype)
    k_pages, v_pages = (
        jax.random.normal(key, (int(table.max()) + 1, page_size, head_dim), jnp.bfloat16).astype(cache_dtype)
        for key in keys[1:]
    )
    sizes = (jnp.asarray(x, jnp.int32) for x in (in_ring, counts - in_ring))

    def attend_with(attention):
        return lambda *inputs: (attention(*inputs, ring_slots=ring_slots).normalized(),)

    pairs, cached = int(counts.sum()), jnp.dtype(cache_dtype).itemsize
    return Case(
        "page_attention",
        {
            "batch": batch,
            "queries": queries,
            "capacity": capacity,
            "live": live,
            "heads": heads,
            "kv_heads": kv_heads,
            "head_dim": head_dim,
        },
        dtype,
        cache_dtype,
        (rows, k_pages, v_pages, jnp.asarray(table), *sizes),
        lambda *how: attend_with(with_implementation(attention_api.attend_to_pages, *how)),
        attend_with(paged_attention.attend_pages),
        lambda inputs, out: {0: inputs[0] + (1e-6 * out[0]).astype(dtype)},
        min_bytes=2 * pairs * head_dim * cached + rows.size * (jnp.dtype(dtype).itemsize + 4),
        flops=4 * head_dim * heads // kv_heads * queries * pairs,
    )


def _table(
    numbers: np.random.Generator,
    in_ring: Int[np.ndarray, "B K"],
    survivors: Int[np.ndarray, "B K"],
    ring_slots: int,
    capacity: int,
    page_size: int,
) -> Int[np.ndarray, "B K P"]:
    """Return a table in which each head has the pages that it needs, anywhere in an arena of just so many pages."""
    ring_pages, column = ring_slots // page_size, np.arange(pages_of(capacity, page_size) + 1)
    is_ring = column < pages_of(in_ring, page_size)[..., None]
    behind = (column >= ring_pages) & (column < ring_pages + pages_of(survivors, page_size)[..., None])
    table = np.zeros(behind.shape, np.int32)
    table[is_ring | behind] = 1 + numbers.permutation(int((is_ring | behind).sum()))
    return table
