"""The TPU kernels of training attention, in interpret mode, against the portable path."""

from functools import cache
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dms_jax.core.chunked_attention import attend_in_blocks
from dms_jax.core.visibility import MASKED
from dms_jax.kernels.block_sizes import TrainBlocks
from dms_jax.kernels.train_attention_tpu import BlockPlan, attend

TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2}


class Case(NamedTuple):
    """Shapes and options of a compiled program, which runs on many arrays."""

    batch: int
    kv_heads: int
    group: int
    length: int
    head_dim: int
    window: int
    blocks: TrainBlocks
    dtype: str = "float32"
    segments: bool = False


SMALL = (
    Case(2, 2, 2, 64, 16, 11, TrainBlocks(16, 8)),
    Case(1, 2, 3, 96, 24, 0, TrainBlocks(8, 32), segments=True),
    Case(2, 1, 1, 32, 8, 100, TrainBlocks(8, 8), segments=True),
)
REAL = (
    # Blocks wider than a register, so that columns are spread and lanes are summed.
    Case(1, 1, 1, 512, 64, 100, TrainBlocks(256, 128), segments=True),
    Case(1, 1, 2, 512, 128, 64, TrainBlocks(128, 256), "bfloat16"),
    Case(1, 1, 4, 128, 64, 20, TrainBlocks(128, 128), "bfloat16", segments=True),  # the length is one block
)


def inputs(case, seed, gates):
    rng = np.random.default_rng(seed)
    batch, heads, length, dtype = case.batch, case.kv_heads, case.length, case.dtype
    shape = (batch, heads, length)
    q = jnp.asarray(rng.normal(size=(batch, heads, case.group, length, case.head_dim)), dtype)
    k, v = (jnp.asarray(rng.normal(size=(*shape, case.head_dim)), dtype) for _ in range(2))
    log_keep = {
        "open": np.zeros(shape),
        "soft": -np.logaddexp(0, rng.normal(size=shape) * 5),
        "hard": np.where(rng.random(shape) < 0.7, MASKED, 0.0),
        "gone": np.where(
            np.repeat(rng.random((batch, heads, length // 8)) < 0.7, 8, axis=2), MASKED, -2 - rng.random(shape)
        ),  # keys with a nearly closed gate (-2) are not evicted
    }[gates]
    ids = jnp.asarray(np.sort(rng.integers(0, 3, (batch, length)), axis=1), jnp.int32) if case.segments else None
    return q, k, v, jnp.asarray(log_keep, jnp.float32), ids


def with_gradients(attention):
    def run(q, k, v, log_keep, ids):
        out, pullback = jax.vjp(lambda *args: attention(*args, ids), q, k, v, log_keep)
        return out, *pullback(jnp.sin(jnp.arange(out.size, dtype=jnp.float32)).astype(out.dtype).reshape(out.shape))

    return jax.jit(run)


@cache
def compiled(case):
    kernels = with_gradients(lambda *args: attend(*args, window_size=case.window, blocks=case.blocks, interpret=True))
    return kernels, with_gradients(lambda *args: attend_in_blocks(*args, case.window, min(case.blocks)))


def assert_equals_the_portable_path(case, args):
    kernels, portable = compiled(case)
    for ours, theirs in zip(kernels(*args), portable(*args), strict=True):
        assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
        ours, theirs = (np.asarray(x, np.float32) for x in (ours, theirs))
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=TOLERANCE[case.dtype] * max(1, np.abs(theirs).max()))


@settings(max_examples=25, deadline=None)
@given(case=st.sampled_from(SMALL), seed=st.integers(0, 9999), gates=st.sampled_from(["open", "soft", "hard", "gone"]))
def test_kernels_equal_the_portable_path(case, seed, gates):
    assert_equals_the_portable_path(case, inputs(case, seed, gates))


@pytest.mark.parametrize("case", REAL)
def test_kernels_equal_the_portable_path_at_hardware_sizes(case):
    for gates in ("soft", "gone"):
        assert_equals_the_portable_path(case, inputs(case, 1, gates))


@pytest.mark.parametrize("case", SMALL[1:])
def test_masked_scores_before_a_real_one_leave_no_trace(case):
    """Earlier blocks have other segments and evicted keys with large values, which must not affect any row."""
    q, k, v, log_keep, _ = inputs(case, 2, "soft")
    half = case.length // 2
    log_keep = log_keep.at[..., : half + 8].set(MASKED).at[..., ::16].set(-0.5)
    ids = jnp.broadcast_to(jnp.arange(case.length, dtype=jnp.int32) // half, (case.batch, case.length))
    assert_equals_the_portable_path(case, (q, k, v.at[:, :, :half].multiply(1e4), log_keep, ids))
    clean, poisoned = (compiled(case)[0](q, k, x, log_keep, ids)[0] for x in (v, v.at[:, :, :half].set(1e30)))
    np.testing.assert_array_equal(poisoned[..., half:, :], clean[..., half:, :])


def test_block_of_evicted_keys_outside_the_window_is_not_read():
    case = SMALL[0]
    q, k, v, log_keep, ids = inputs(case, 3, "soft")
    log_keep = log_keep.at[..., 16:32].set(MASKED)
    clean, poisoned = (
        compiled(case)[0](q, *arrays, log_keep, ids)
        for arrays in ((k, v), (x.at[:, :, 16:32].set(jnp.nan) for x in (k, v)))
    )
    beyond = 48  # the first block of queries that are all more than a window past the evicted keys
    for name, ours, theirs in zip(("out", "dq", "dk", "dv", "dkeep"), poisoned, clean, strict=True):
        axis = -1 if name == "dkeep" else -2
        ours, theirs = (np.take(x, range(beyond, case.length), axis) for x in (ours, theirs))
        np.testing.assert_array_equal(ours, theirs, err_msg=name)


@pytest.mark.parametrize("window", [0, 1, 7, 8, 20, 64])
@pytest.mark.parametrize(("q", "k"), [(8, 8), (8, 16), (16, 8), (4, 16)])
def test_needed_blocks_and_their_places_equal_the_definition(window, q, k):
    """Compare with the definition, pair by pair.

    A block is needed if one of its pairs is inside the window, or outside it with a key that is not evicted. A step
    that is not needed must name a block that is needed.
    """
    length, gone = 64, np.random.default_rng(window + q).random(64 // k) < 0.6
    plan = BlockPlan(window, q, k, length // q, length // k)
    next_alive = np.minimum.accumulate(np.where(gone, plan.num_k, np.arange(plan.num_k))[::-1])[::-1]
    distance = (np.arange(length)[:, None] - np.arange(length)).reshape(plan.num_q, q, plan.num_k, k).swapaxes(1, 2)
    needed = ((distance >= 0) & ((distance <= window) | ~gone[None, :, None, None])).any((2, 3))

    i, j, following = np.broadcast_arrays(np.arange(plan.num_q)[:, None], np.arange(plan.num_k), next_alive)
    i, j, following = (jnp.asarray(x, jnp.int32) for x in (i, j, following))
    key_block, query_block = np.asarray(plan.key_block(i, j, following)), np.asarray(plan.query_block(i, j, following))
    assert needed[i, key_block].all() and needed[query_block, j].all()
    np.testing.assert_array_equal(key_block == j, needed)
    np.testing.assert_array_equal(query_block == i, needed)

    inside, outside = ((distance >= 0) & (distance <= window)).all((2, 3)), (distance > window).all((2, 3))
    for (condition, _), is_here in zip(plan.cases(i, j, needed), (inside, outside, ~inside & ~outside), strict=True):
        np.testing.assert_array_equal(condition, needed & is_here)
