"""Chunked attention against the dense reference, values and gradients, and the arrays in its traced program."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dms_jax.core.chunked_attention import gated_attention
from dms_jax.core.reference_attention import reference_attention
from dms_jax.core.visibility import MASKED

TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


def inputs(seed, batch, length, kv_heads, group, head_dim, hard=False, segments=False):
    rng = np.random.default_rng(seed)
    q, k, v = (
        jnp.asarray(rng.normal(size=(batch, length, heads, head_dim)), jnp.float32)
        for heads in (kv_heads * group, kv_heads, kv_heads)
    )
    shape = (batch, kv_heads, length)
    log_keep = np.where(rng.random(shape) < 0.5, MASKED, 0.0) if hard else -np.logaddexp(0, rng.normal(size=shape) * 5)
    ids = jnp.asarray(np.sort(rng.integers(0, 3, (batch, length)), axis=1), jnp.int32) if segments else None
    return q, k, v, jnp.asarray(log_keep, jnp.float32), ids


@functools.cache
def compiled(attention, window_size, **options):
    def loss(q, k, v, log_keep, ids):
        out = attention(q, k, v, log_keep, segment_ids=ids, window_size=window_size, **options)
        return jnp.sum(jnp.sin(out * 3)), out

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2, 3), has_aux=True))


def value_and_gradients(attention, *args, window_size, **options):
    return compiled(attention, window_size, **options)(*args)


def assert_equals_the_reference(seed, batch, length, kv_heads, group, head_dim, window, block, hard, segments):
    args = inputs(seed, batch, length, kv_heads, group, head_dim, hard, segments)
    (_, expected), expected_grads = value_and_gradients(reference_attention, *args, window_size=window)
    (_, actual), grads = value_and_gradients(gated_attention, *args, window_size=window, block=block)
    np.testing.assert_allclose(actual, expected, **TOLERANCE)
    for ours, theirs in zip(grads, expected_grads, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5 * max(1, float(jnp.abs(theirs).max())))


SHAPES = [  # batch, length, KV heads, query heads per KV head, head size, window, block, segments
    (1, 1, 1, 1, 8, 0, 16, False),
    (2, 70, 3, 1, 8, 20, 16, True),
    (1, 64, 2, 7, 16, 0, 16, False),
    (2, 37, 1, 3, 20, 80, 64, False),
    (1, 23, 2, 2, 8, 5, 1, True),
    (1, 50, 1, 2, 20, 49, 7, False),
]


@pytest.mark.parametrize("batch, length, kv_heads, group, head_dim, window, block, segments", SHAPES)
def test_chunked_attention_equals_the_reference(batch, length, kv_heads, group, head_dim, window, block, segments):
    for seed, hard in ((0, False), (1, True), (2, False), (3, True)):
        assert_equals_the_reference(seed, batch, length, kv_heads, group, head_dim, window, block, hard, segments)


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(
    seed=st.integers(0, 9999),
    batch=st.integers(1, 2),
    length=st.integers(1, 70),
    kv_heads=st.integers(1, 3),
    group=st.sampled_from([1, 2, 3, 7]),
    head_dim=st.sampled_from([8, 16, 20]),
    window=st.integers(0, 80),
    block=st.sampled_from([1, 7, 16, 64]),
    hard=st.booleans(),
    segments=st.booleans(),
)
def test_chunked_attention_equals_the_reference_at_any_shape(**case):
    assert_equals_the_reference(**case)


def test_default_block_works_for_head_sizes_of_real_models():
    for head_dim, group in ((64, 3), (80, 1), (128, 8)):
        args = inputs(0, 1, 300, 2, group, head_dim)
        (_, expected), expected_grads = value_and_gradients(reference_attention, *args, window_size=100)
        (_, actual), grads = value_and_gradients(gated_attention, *args, window_size=100)
        np.testing.assert_allclose(actual, expected, **TOLERANCE)
        for ours, theirs in zip(grads, expected_grads, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=2e-5)


def test_gate_gets_a_gradient_only_where_it_acts():
    q, k, v, log_keep, _ = inputs(1, 1, 40, 2, 2, 8)
    window = 10
    gradient = value_and_gradients(gated_attention, q, k, v, log_keep, None, window_size=window)[1][3]
    assert np.all(np.asarray(gradient[:, :, 40 - 1 - window :]) == 0) and np.all(
        np.asarray(gradient[:, :, : 40 - 1 - window]) != 0
    )


def test_evicted_key_has_no_effect():
    q, k, v, log_keep, _ = inputs(2, 1, 30, 1, 2, 8)
    log_keep = jnp.zeros_like(log_keep).at[..., 5].set(MASKED)
    poisoned = gated_attention(q, k.at[:, 5].set(1e4), v.at[:, 5].set(1e4), log_keep, window_size=4)
    clean = gated_attention(q, k, v, log_keep, window_size=4)
    np.testing.assert_array_equal(poisoned[:, 10:], clean[:, 10:])
    assert not np.array_equal(poisoned[:, 9], clean[:, 9])


def arrays_of(jaxpr):
    """Yield the shape of every array that a program makes, also inside loops."""
    for equation in jaxpr.eqns:
        yield from (v.aval.shape for v in equation.outvars if hasattr(v.aval, "shape"))
        for value in equation.params.values():
            for inner in jax.tree.leaves(value, is_leaf=lambda x: hasattr(x, "jaxpr") or hasattr(x, "eqns")):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from arrays_of(inner)


@pytest.mark.parametrize("block", [128, 512])
def test_no_array_is_quadratic_in_the_length(block):
    def largest(length):
        q, k, lk = (
            jax.ShapeDtypeStruct(s, jnp.float32) for s in ((1, length, 4, 16), (1, length, 2, 16), (1, 2, length))
        )
        step = jax.grad(lambda *a: gated_attention(*a, window_size=64, block=block).sum(), argnums=(0, 1, 2, 3))
        shapes = list(arrays_of(jax.make_jaxpr(step)(q, k, k, lk).jaxpr))
        assert shapes and all(sum(n >= length for n in shape) <= 1 for shape in shapes)
        return max(np.prod(shape, dtype=int) for shape in shapes)

    assert largest(32768) <= 4 * largest(8192) and largest(32768) < 32768 * 4 * 16 * 4
