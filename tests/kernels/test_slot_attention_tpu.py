"""The TPU kernel for attention over slots, in interpret mode, against `core.slot_attention`.

Heads are ragged, dead slots hold NaN and infinity, and sizes are not multiples of blocks.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dms_jax.core.compact_cache import EMPTY, NEVER_VISIBLE, LayerCache
from dms_jax.core.slot_attention import fold_queries, merge_parts, slot_attention, slots_in_use, unfold_queries
from dms_jax.core.visibility import MASKED, NEVER
from dms_jax.kernels.block_sizes import SlotBlocks
from dms_jax.kernels.slot_attention_tpu import attend_slots

B, K = 2, 2
TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2}


def slots(rng, now: int, length: int, capacity: int, head_dim: int, dtype=jnp.float32, live: float = 0.7) -> LayerCache:
    """Draw pairs at random positions up to the last query, in a different number of slots for each head."""
    written = np.arange(capacity) < rng.integers(0, capacity + 1, (B, K))[..., None]
    written[0, 0], written[-1, -1] = True, False
    position = np.where(written, rng.integers(0, now + length, (B, K, capacity)), EMPTY).astype(np.int32)
    expiry = np.where(rng.random(position.shape) < live, NEVER, rng.integers(0, now + length, position.shape))
    expiry = np.where(written, expiry, NEVER_VISIBLE).astype(np.int32)
    k, v = (jnp.asarray(rng.normal(size=(B, K, capacity, head_dim)), dtype) for _ in range(2))
    zero = jnp.zeros((B, K), jnp.int32)
    return LayerCache(k, v, jnp.asarray(position), jnp.asarray(expiry), jnp.zeros(position.shape, jnp.float32), zero)


def poisoned(layer: LayerCache, position) -> tuple[jax.Array, jax.Array]:
    """Write infinity into the keys, and NaN into the values, of every slot that no query sees."""
    q = np.asarray(position)[:, None, :, None]
    seen = ((layer.position[:, :, None] <= q) & (q <= layer.expiry[:, :, None])).any(2)[..., None]
    return jnp.where(seen, layer.k, jnp.asarray(jnp.inf, layer.k.dtype)), jnp.where(
        seen, layer.v, jnp.asarray(jnp.nan, layer.v.dtype)
    )


@partial(jax.jit, static_argnames=("heads", "blocks"))
def by_kernel(q, position, keys, values, layer, heads, blocks):
    rows = fold_queries(q, heads)
    row_position = jnp.tile(position, (1, rows.shape[2] // q.shape[1]))
    part = attend_slots(
        rows,
        row_position,
        keys,
        values,
        layer.position,
        layer.expiry,
        slots_in_use(layer.expiry, position),
        blocks=blocks,
        interpret=True,
    )
    return unfold_queries(merge_parts(part).normalized().astype(q.dtype), q.shape[1]), part


def check(seed, length, group, capacity, head_dim, blocks, dtype=jnp.float32, cache_dtype=None, live=0.7, now=9):
    rng = np.random.default_rng(seed)
    layer = slots(rng, now, length, capacity, head_dim, cache_dtype or dtype, live)
    position = jnp.asarray(np.array([now, now + 3])[:, None] + np.arange(length), jnp.int32)
    q = jnp.asarray(rng.normal(size=(B, length, K * group, head_dim)), dtype)
    out, part = by_kernel(q, position, *poisoned(layer, position), layer, K, blocks)
    expected = slot_attention(q, layer, position, None, 7)
    tolerance = TOLERANCE[jnp.dtype(dtype).name]
    np.testing.assert_allclose(
        np.asarray(out, np.float32), np.asarray(expected, np.float32), rtol=tolerance, atol=tolerance
    )
    return part


@settings(max_examples=6, deadline=None)
@given(
    seed=st.integers(0, 999),
    sizes=st.sampled_from([(1, 1, 1), (1, 3, 33), (5, 1, 20), (5, 3, 33)]),
    blocks=st.sampled_from([(4, 8), (64, 16), (64, 64)]),
    live=st.sampled_from([0.0, 0.7, 1.0]),
)
def test_kernel_equals_core(seed, sizes, blocks, live):
    """Sizes are the numbers of queries, of query heads per group, and of slots."""
    check(seed, *sizes, 8, SlotBlocks(*blocks, 1), live=live)


@pytest.mark.parametrize(
    "length, dtype, cache_dtype",
    [
        (1, "float32", "float32"),
        (5, "bfloat16", "bfloat16"),
        (5, "bfloat16", "float8_e4m3fn"),
        (1, "bfloat16", "float8_e5m2"),
    ],
)
def test_rows_of_full_lanes_and_small_types_equal_core(length, dtype, cache_dtype):
    check(3, length, 2, 40, 128, SlotBlocks(8, 16, 1), jnp.dtype(dtype), jnp.dtype(cache_dtype))


def test_small_types_with_slots_in_lanes_equal_core():
    check(4, 3, 2, 40, 16, SlotBlocks(8, 16, 1), jnp.bfloat16, jnp.float8_e4m3fn)


def test_head_without_slots_is_an_empty_part():
    part = check(5, 1, 2, 16, 8, SlotBlocks(8, 8, 1))
    assert part.row_max.shape == (1, B, K, 2) and part.acc.shape == (1, B, K, 2, 8)
    np.testing.assert_array_equal(part.row_max[0, -1, -1], np.float32(MASKED))
    np.testing.assert_array_equal(part.row_sum[0, -1, -1], 0)
    np.testing.assert_array_equal(part.acc[0, -1, -1], 0)


def test_max_and_sum_equal_their_definition(rng):
    layer = slots(rng, 9, 1, 24, 8)
    q, position = jnp.asarray(rng.normal(size=(B, 1, K * 2, 8)), jnp.float32), jnp.full((B, 1), 9, jnp.int32)
    _, part = by_kernel(q, position, *poisoned(layer, position), layer, K, SlotBlocks(8, 8, 1))
    s = np.einsum("bkrh,bksh->bkrs", fold_queries(q, K), layer.k) * 8**-0.5
    visible = np.asarray((layer.position <= 9) & (layer.expiry >= 9))[:, :, None]
    row_max = np.where(visible, s, MASKED).max(-1)
    np.testing.assert_allclose(part.row_max[0], row_max, rtol=1e-5)
    np.testing.assert_allclose(
        part.row_sum[0], np.exp(np.where(visible, s - row_max[..., None], -np.inf)).sum(-1), rtol=1e-5
    )


def test_slots_from_used_on_are_not_read(rng):
    """All slots are visible, so a caller that passes a smaller `used` gets attention over fewer slots."""
    layer = slots(rng, 9, 1, 24, 8, live=1.0)
    q, position = jnp.asarray(rng.normal(size=(B, 1, K, 8)), jnp.float32), jnp.full((B, 1), 50, jnp.int32)
    used = jnp.asarray([[11, 0], [24, 5]])
    rows = fold_queries(q, K)
    attend = jax.jit(partial(attend_slots, rows, position, blocks=SlotBlocks(8, 8, 1), interpret=True))
    hidden = (jnp.arange(24)[None, None] >= used[..., None])[..., None]
    actual = attend(
        jnp.where(hidden, jnp.nan, layer.k), jnp.where(hidden, jnp.nan, layer.v), layer.position, layer.expiry, used
    )
    expected = attend(
        layer.k,
        layer.v,
        layer.position,
        jnp.where(hidden[..., 0], NEVER_VISIBLE, layer.expiry),
        jnp.full_like(used, 24),
    )
    jax.tree.map(np.testing.assert_array_equal, actual, expected)
