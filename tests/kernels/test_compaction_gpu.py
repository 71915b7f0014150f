"""The Hopper compaction kernel, in interpret mode, equals `core.compact_cache.write_pairs` bitwise."""

from functools import partial

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from dms_jax.core import compact_cache
from dms_jax.core.compact_cache import LayerCache
from dms_jax.kernels.block_sizes import PlaceBlocks
from dms_jax.kernels.compaction_gpu import write_pairs
from dms_jax.kernels.operands import Pairs

RUN = jax.jit(partial(write_pairs, interpret=True), static_argnames="blocks")


def arrays(rng, shape, head_dim, dtype):
    """Draw keys, values, position, expiry and score of [B K S] pairs."""
    k, v = (jnp.asarray(rng.normal(size=(*shape, head_dim)), dtype) for _ in range(2))
    position, expiry = (jnp.asarray(rng.integers(-100, 100, shape), jnp.int32) for _ in range(2))
    return k, v, position, expiry, jnp.asarray(rng.normal(size=shape), jnp.float32)


def check(seed, batch, heads, capacity, length, keep_share, new_share, pairs, dtype=jnp.float32, head_dim=8):
    """Compare one call with core, given the fractions of kept slots and of new pairs of each head."""
    rng = np.random.default_rng(seed)
    old, new = (
        arrays(rng, (batch, heads, size), head_dim, t) for size, t in ((capacity, dtype), (length, jnp.float32))
    )
    keep = rng.random((batch, heads, capacity)) < np.array(keep_share)[:, None]
    is_new = rng.random((batch, heads, length)) < np.array(new_share)[:, None]
    # At most as many pairs may be new as slots are free.
    is_new &= np.cumsum(is_new, axis=-1) <= (~keep).sum(-1, keepdims=True)
    keep, is_new = jnp.asarray(keep), jnp.asarray(is_new)
    layer = LayerCache(*old, jnp.zeros((batch, heads), jnp.int32))
    expected = compact_cache.write_pairs(layer, *new, keep, is_new)
    actual = RUN(Pairs(*old), Pairs(*new), keep, is_new, blocks=PlaceBlocks(pairs))
    for got, name in zip(actual, Pairs._fields, strict=True):
        np.testing.assert_array_equal(
            np.asarray(got, np.float32), np.asarray(getattr(expected, name), np.float32), name
        )


@hypothesis.settings(max_examples=3, deadline=None, derandomize=True, phases=[hypothesis.Phase.generate])
@hypothesis.given(
    seed=st.integers(0, 1000), keep_share=st.sampled_from([0.0, 0.5, 0.9]), new_share=st.sampled_from([0.3, 1.0])
)
def test_random_pairs_equal_core(seed, keep_share, new_share):
    """Use 11 pairs, which are not a multiple of a tile of 8."""
    check(seed, 1, 1, 24, 11, [keep_share], [new_share], 8)


def test_full_and_empty_heads_equal_core():
    """Use three heads: one with only free slots and only new pairs, one without new pairs, and a full one."""
    check(0, 1, 3, 12, 11, [0.0, 0.5, 1.0], [1.0, 0.0, 1.0], 8)


def test_chunk_of_one_pair_equals_core():
    check(1, 2, 1, 8, 1, [0.5], [1.0], 32)


@pytest.mark.parametrize("dtype", [jnp.float8_e4m3fn, jnp.bfloat16])
def test_narrow_caches_equal_core(dtype):
    check(2, 1, 1, 16, 8, [0.5], [0.8], 8, dtype)
