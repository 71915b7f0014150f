"""The TPU compaction kernel, in interpret mode, equals `core.compact_cache.write_pairs` bitwise."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dms_jax.core import compact_cache
from dms_jax.core.compact_cache import LayerCache
from dms_jax.kernels.block_sizes import PlaceBlocks
from dms_jax.kernels.compaction_tpu import _staircase, write_pairs
from dms_jax.kernels.operands import Pairs

B, K = 2, 3


def case(rng, capacity, length, head_dim, dtype, cache_dtype, keep_share: float, new_share: float):
    """Draw a layer, a chunk, the kept slots and the new pairs.

    One head keeps all slots, one keeps no slot, and one has no new pair.
    """
    numbers = lambda n: (
        jnp.asarray(rng.integers(-(2**31), 2**31 - 1, (B, K, n), np.int64).astype(np.int32)) for _ in range(2)
    )
    score = lambda n: jnp.asarray(rng.normal(size=(B, K, n)), jnp.float32)
    rows = lambda n, kind: (jnp.asarray(rng.normal(size=(B, K, n, head_dim)), kind) for _ in range(2))
    layer = LayerCache(*rows(capacity, cache_dtype), *numbers(capacity), score(capacity), jnp.zeros((B, K), jnp.int32))
    chunk = (*rows(length, dtype), *numbers(length), score(length))
    keep = rng.random((B, K, capacity)) < keep_share
    new = rng.random((B, K, length)) < new_share
    keep[0, 0], keep[0, 1], new[0, 2] = True, False, False
    free = (~keep).sum(-1, keepdims=True)
    return layer, chunk, keep, new & (np.cumsum(new, -1) <= free)


def check(seed, capacity, length, head_dim, blocks, dtype=jnp.float32, cache_dtype=None, keep_share=0.6, new_share=0.7):
    rng = np.random.default_rng(seed)
    layer, chunk, keep, new = case(rng, capacity, length, head_dim, dtype, cache_dtype or dtype, keep_share, new_share)
    # A pair that is not new may hold anything.
    k, v = (jnp.where(new[..., None], x, jnp.nan) for x in chunk[:2])
    actual = jax.jit(lambda *arrays: write_pairs(*arrays, blocks=blocks, interpret=True))(
        Pairs.of_layer(layer), Pairs(k, v, *chunk[2:]), keep, new
    )
    expected = compact_cache.write_pairs(layer, *chunk, keep, new)
    for name, array in zip(Pairs._fields, actual, strict=True):
        want = getattr(expected, name)
        assert array.dtype == want.dtype
        np.testing.assert_array_equal(np.asarray(array, np.float64), np.asarray(want, np.float64), err_msg=name)


@settings(max_examples=10, deadline=None)
@given(
    seed=st.integers(0, 999),
    sizes=st.sampled_from([(1, 1), (40, 1), (40, 13), (24, 40)]),
    blocks=st.sampled_from([(4, 8), (5, 16), (64, 64)]),
    keep_share=st.sampled_from([0.0, 0.6, 0.95]),
    new_share=st.sampled_from([0.5, 1.0]),
)
def test_written_pairs_equal_core(seed, sizes, blocks, keep_share, new_share):
    check(seed, *sizes, 8, PlaceBlocks(*blocks), keep_share=keep_share, new_share=new_share)


@pytest.mark.parametrize(
    "dtype, cache_dtype",
    [("float32", "float32"), ("bfloat16", "bfloat16"), ("bfloat16", "float8_e4m3fn"), ("bfloat16", "float8_e5m2")],
)
def test_rows_of_full_lanes_and_small_types_equal_core(dtype, cache_dtype):
    check(1, 40, 13, 128, PlaceBlocks(8, 16), jnp.dtype(dtype), jnp.dtype(cache_dtype))


def test_small_types_with_slots_in_lanes_equal_core():
    check(2, 40, 13, 16, PlaceBlocks(8, 16), jnp.bfloat16, jnp.float8_e4m3fn)


def test_staircase_steps_are_the_blocks_that_meet(rng):
    """A block of slots meets the blocks of pairs that it receives pairs from, and those in between."""
    keep, new = rng.random((20, 64)) < np.linspace(0, 1, 20)[:, None], rng.random((20, 24)) < rng.random((20, 1))
    new &= np.cumsum(new, -1) <= (~keep).sum(-1, keepdims=True)
    slot_block, pair_block, count = _staircase(
        jnp.cumsum(~keep, -1, dtype=jnp.int32), jnp.cumsum(new, -1, dtype=jnp.int32), 8, 4
    )
    for a in range(20):
        met = [
            (slot // 8, pair // 4) for slot, pair in zip(np.flatnonzero(~keep[a]), np.flatnonzero(new[a]), strict=False)
        ]
        received = {block: [pair for slot, pair in met if slot == block] for block, _ in met}
        steps = [(block, pair) for block, pairs in received.items() for pair in range(pairs[0], pairs[-1] + 1)]
        assert [*zip(slot_block[a, : count[a]].tolist(), pair_block[a, : count[a]].tolist(), strict=True)] == steps
