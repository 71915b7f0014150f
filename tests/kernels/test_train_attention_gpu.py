"""The Hopper kernels of training attention, in interpret mode, against the chunked path: value and gradients."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dms_jax.core.chunked_attention import attend_in_blocks, with_heads_folded
from dms_jax.core.visibility import MASKED
from dms_jax.kernels.block_sizes import TrainBlocks
from dms_jax.kernels.train_attention_gpu import attend


def inputs(seed, length, kv_heads, group, head_dim, gate, segments, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    q, k, v = (
        jnp.asarray(rng.normal(size=(1, length, heads, head_dim)), dtype)
        for heads in (kv_heads * group, kv_heads, kv_heads)
    )
    shape = (1, kv_heads, length)
    log_keep = -np.logaddexp(0, rng.normal(size=shape) * 5)
    if gate == "hard":
        log_keep = np.where(rng.random(shape) < 0.5, MASKED, 0.0)
    if gate == "gone":  # evict all but the last quarter, so that whole blocks are evicted
        log_keep[:, :, : length * 3 // 4] = MASKED
    ids = jnp.asarray(np.sort(rng.integers(0, 3, (1, length)), axis=1), jnp.int32) if segments else None
    return q, k, v, jnp.asarray(log_keep, jnp.float32), ids


def value_and_gradients(attend, multiple, q, k, v, log_keep, ids):
    def loss(*args):
        out = with_heads_folded(attend, multiple, *args, ids)
        return jnp.sum(jnp.sin(out.astype(jnp.float32) * 3)), out

    (_, out), gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2, 3), has_aux=True))(q, k, v, log_keep)
    return out, *gradients


def assert_equals_the_chunked_path(args, window, blocks, tolerance, exact_args=None):
    kernel = partial(attend, window_size=window, blocks=blocks, interpret=True)
    oracle = lambda *args: attend_in_blocks(*args, window, 8)
    actual = value_and_gradients(kernel, math.lcm(blocks.q, blocks.k), *args)
    for ours, theirs in zip(actual, value_and_gradients(oracle, 8, *(exact_args or args)), strict=True):
        ours, theirs = np.asarray(ours, np.float32), np.asarray(theirs)
        np.testing.assert_allclose(ours, theirs, rtol=tolerance, atol=tolerance * max(1, np.abs(theirs).max()))


@settings(max_examples=2, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 9999),
    length=st.integers(1, 40),
    heads=st.sampled_from([(1, 1), (1, 2), (2, 1)]),
    window=st.integers(0, 45),
    blocks=st.sampled_from([TrainBlocks(16, 8), TrainBlocks(8, 16, 3), TrainBlocks(16, 16)]),
    gate=st.sampled_from(["soft", "hard", "gone"]),
    segments=st.booleans(),
)
@example(seed=0, length=48, heads=(1, 2), window=17, blocks=TrainBlocks(16, 8), gate="soft", segments=False)
@example(seed=1, length=43, heads=(1, 1), window=3, blocks=TrainBlocks(16, 8, 3), gate="gone", segments=True)
def test_kernels_equal_the_chunked_path(seed, length, heads, window, blocks, gate, segments):
    assert_equals_the_chunked_path(inputs(seed, length, *heads, 8, gate, segments), window, blocks, 1e-5)


def test_bf16_is_close_to_fp32():
    args = inputs(2, 32, 1, 2, 16, "soft", False, jnp.bfloat16)
    exact = [x.astype(jnp.float32) for x in args[:4]]
    assert_equals_the_chunked_path(args, 9, TrainBlocks(16, 8), 2e-2, [*exact, None])


def folded(seed, length):
    q, k, v, log_keep, _ = inputs(seed, length, 1, 1, 8, "soft", False)
    return (
        q.reshape(1, 1, 1, length, 8),
        k.reshape(1, 1, length, 8),
        v.reshape(1, 1, length, 8),
        log_keep.at[..., :16].set(MASKED),
    )


def test_evicted_blocks_outside_the_window_are_never_read():
    q, k, v, log_keep = folded(3, 48)
    kernel = partial(attend, segments=None, window_size=4, blocks=TrainBlocks(16, 8), interpret=True)

    @jax.jit
    def results(k, v, d_out):
        out, pull = jax.vjp(lambda q, k, v, log_keep: kernel(q, k, v, log_keep), q, k, v, log_keep)
        return out, *pull(d_out)

    late, ones = jnp.arange(48)[:, None] >= 32, jnp.ones_like(q)
    clean_out, _, *clean_keys = results(k, v, jnp.where(late, 0.0, ones))
    poison = lambda x: x.at[:, :, :16].set(jnp.nan)
    out, dq, *_ = results(poison(k), poison(v), jnp.where(late, ones, 0.0))
    np.testing.assert_array_equal(out[..., 32:, :], clean_out[..., 32:, :])
    assert np.all(np.isnan(out[..., :16, :])) and np.all(np.isfinite(dq[..., 32:, :]))
    _, _, *keys = results(k, v, jnp.where(late, jnp.nan, ones))
    for ours, theirs in zip(keys, clean_keys, strict=True):
        np.testing.assert_array_equal(ours[:, :, :16], theirs[:, :, :16])
        assert np.all(np.isnan(ours[:, :, 34:40]))


def equations_of(jaxpr):
    """Yield every equation of a program, also those inside loops and kernels."""
    for equation in jaxpr.eqns:
        yield equation
        for value in equation.params.values():
            for inner in jax.tree.leaves(value, is_leaf=lambda x: hasattr(x, "jaxpr") or hasattr(x, "eqns")):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from equations_of(inner)


def equations(length, transform):
    """Return the equations of the gradient of `transform(attend)` for rows of `length` tokens."""
    loss = lambda *args: transform(partial(attend, segments=None, window_size=256, blocks=TrainBlocks(128, 128)))(
        *args
    ).sum()
    shapes = (1, 2, 4, length, 64), (1, 2, length, 64), (1, 2, length, 64), (1, 2, length)
    args = [jax.ShapeDtypeStruct(s, jnp.bfloat16 if len(s) > 3 else jnp.float32) for s in shapes]
    return list(equations_of(jax.make_jaxpr(jax.grad(loss, argnums=(0, 1, 2, 3)))(*args).jaxpr))


def test_no_array_is_quadratic_in_the_length():
    largest = {}
    for length in (8192, 32768):
        shapes = [
            v.aval.shape
            for e in equations(length, lambda attend: attend)
            for v in e.outvars
            if hasattr(v.aval, "shape")
        ]
        assert shapes and all(sum(n >= length for n in shape) <= 1 for shape in shapes)
        largest[length] = max(math.prod(shape) for shape in shapes)
    assert largest[32768] == 4 * largest[8192] == 4 * 8 * 8192 * 64


@pytest.mark.parametrize("names, forward_passes", [(["attention"], 1), ([], 2)])
def test_checkpoint_policy_by_name_saves_what_the_gradient_needs(names, forward_passes):
    checkpoint = partial(jax.checkpoint, policy=jax.checkpoint_policies.save_only_these_names(*names))
    kernels = [str(e.params.get("name") or e.params.get("name_and_src_info", "")) for e in equations(1024, checkpoint)]
    assert sum("train_attention_forward" in name for name in kernels) == forward_passes, set(kernels)
