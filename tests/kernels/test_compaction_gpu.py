"""The Hopper compaction kernel, in interpret mode, against `core.compact_cache.write_pairs`: the same bits in every slot."""

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
    """Keys, values, position, expiry and score of [B K S] pairs."""
    k, v = (jnp.asarray(rng.normal(size=(*shape, head_dim)), dtype) for _ in range(2))
    position, expiry = (jnp.asarray(rng.integers(-100, 100, shape), jnp.int32) for _ in range(2))
    return k, v, position, expiry, jnp.asarray(rng.normal(size=shape), jnp.float32)


def check(seed, batch, heads, capacity, length, stays, comes, pairs, dtype=jnp.float32, head_dim=8):
    """`stays` and `comes` are, for each head, the fraction of slots that stay and of pairs that come."""
    rng = np.random.default_rng(seed)
    old, new = (
        arrays(rng, (batch, heads, size), head_dim, t) for size, t in ((capacity, dtype), (length, jnp.float32))
    )
    staying = rng.random((batch, heads, capacity)) < np.array(stays)[:, None]
    coming = rng.random((batch, heads, length)) < np.array(comes)[:, None]
    # No more pairs may come than slots are free.
    coming &= np.cumsum(coming, axis=-1) <= (~staying).sum(-1, keepdims=True)
    staying, coming = jnp.asarray(staying), jnp.asarray(coming)
    layer = LayerCache(*old, jnp.zeros((batch, heads), jnp.int32))
    expected = compact_cache.write_pairs(layer, *new, staying, coming)
    actual = RUN(Pairs(*old), Pairs(*new), staying, coming, blocks=PlaceBlocks(pairs))
    for got, name in zip(actual, Pairs._fields, strict=True):
        np.testing.assert_array_equal(
            np.asarray(got, np.float32), np.asarray(getattr(expected, name), np.float32), name
        )


@hypothesis.settings(max_examples=3, deadline=None, derandomize=True, phases=[hypothesis.Phase.generate])
@hypothesis.given(seed=st.integers(0, 1000), stays=st.sampled_from([0.0, 0.5, 0.9]), comes=st.sampled_from([0.3, 1.0]))
def test_random_pairs_equal_core(seed, stays, comes):
    """11 pairs are not a multiple of a tile of 8."""
    check(seed, 1, 1, 24, 11, [stays], [comes], 8)


def test_full_and_empty_heads_equal_core():
    """In one head all slots are free and all pairs come, in one no pair comes, and in a full one no pair can come."""
    check(0, 1, 3, 12, 11, [0.0, 0.5, 1.0], [1.0, 0.0, 1.0], 8)


def test_chunk_of_one_pair_equals_core():
    check(1, 2, 1, 8, 1, [0.5], [1.0], 32)


@pytest.mark.parametrize("dtype", [jnp.float8_e4m3fn, jnp.bfloat16])
def test_narrow_caches_equal_core(dtype):
    check(2, 1, 1, 16, 8, [0.5], [0.8], 8, dtype)
