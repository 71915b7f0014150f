"""The Hopper kernel for attention over slots, in interpret mode, against `core.slot_attention`."""

from dataclasses import replace
from functools import partial

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from dms_jax.core.compact_cache import EMPTY, NEVER_VISIBLE, LayerCache
from dms_jax.core.slot_attention import merge_parts, slot_attention, slots_in_use, unfold_queries
from dms_jax.core.visibility import MASKED, NEVER
from dms_jax.kernels.block_sizes import SlotBlocks
from dms_jax.kernels.slot_attention_gpu import attend_slots

RUN = jax.jit(partial(attend_slots, interpret=True), static_argnames="blocks")


def random_slots(seed, heads, slots, head_dim, seen, length, share_used, dtype=jnp.float32):
    """Draw one batch row, with NaN and infinity in the slots that no query sees.

    Of its first blocks of 8 slots, all queries see one, the pairs of one expire during the chunk, one has the chunk's
    own pairs, and one has pairs of the future. The other blocks are random.
    """
    rng = np.random.default_rng(seed)
    position = rng.integers(0, seen + length + 4, (1, heads, slots))
    expiry = np.where(rng.random(position.shape) < 0.4, position + rng.integers(0, 12, position.shape), NEVER)
    kinds = [
        (0, seen, NEVER, NEVER + 1),
        (0, seen, seen - 1, seen + length - 1),
        (seen, seen + length, NEVER, NEVER + 1),
        (seen, seen + length + 3, NEVER, NEVER + 1),
    ]
    for block, (first, last, soonest, latest) in enumerate(kinds[: slots // 8]):
        of_block, shape = np.s_[..., 8 * block : 8 * block + 8], (1, heads, 8)
        position[of_block], expiry[of_block] = (
            rng.integers(first, last, shape),
            rng.integers(soonest, max(latest, soonest + 1), shape),
        )
    empty = np.arange(slots) >= np.array(share_used)[:, None] * slots
    position, expiry = np.where(empty, EMPTY, position), np.where(empty, NEVER_VISIBLE, expiry)
    now = np.arange(seen, seen + length)
    seen_by = (position[..., None] <= now) & (now <= expiry[..., None])
    k, v = rng.normal(size=(2, *position.shape, head_dim)).astype(np.float32)
    bad = np.where(rng.random(k.shape) < 0.5, np.nan, np.inf if dtype == jnp.float32 else np.nan)
    k, v = (jnp.asarray(np.where(seen_by.any(-1)[..., None], x, bad), dtype) for x in (k, v))
    score = jnp.zeros(position.shape, jnp.float32)
    return LayerCache(
        k, v, jnp.asarray(position, jnp.int32), jnp.asarray(expiry, jnp.int32), score, jnp.zeros((1, heads), jnp.int32)
    )


def check(layer, group, seen, length, blocks, tolerance=1e-5, dtype=jnp.float32):
    heads, head_dim = layer.k.shape[1], layer.k.shape[3]
    rows = jnp.asarray(np.random.default_rng(1).normal(size=(1, heads, group * length, head_dim)), dtype)
    position = jnp.arange(seen, seen + length, dtype=jnp.int32)[None]
    used = slots_in_use(layer.expiry, position)
    parts = RUN(
        rows, jnp.tile(position, (1, group)), layer.k, layer.v, layer.position, layer.expiry, used, blocks=blocks
    )
    assert parts.row_max.shape == (blocks.parts * (2 if blocks.rows == 64 else 1), *rows.shape[:3])
    expected = slot_attention(unfold_queries(rows, length), layer, position, None)
    actual = unfold_queries(merge_parts(parts).normalized(), length)
    np.testing.assert_allclose(actual, expected.astype(jnp.float32), rtol=tolerance, atol=tolerance)
    return parts


def test_ragged_cache_is_decoded_in_parts():
    """One head uses all 44 slots, which are not a multiple of a block of 8. The other head is empty."""
    layer = random_slots(0, 2, 44, 16, seen=30, length=1, share_used=[1.0, 0.0])
    parts = check(layer, 3, 30, 1, SlotBlocks(64, 8, 2, 2))
    of_empty_head = jax.tree.map(lambda x: x[:, 0, 1], parts)
    assert (
        (of_empty_head.row_max == jnp.float32(MASKED)).all()
        and not of_empty_head.row_sum.any()
        and not of_empty_head.acc.any()
    )
    # The second part had only the expired block.
    np.testing.assert_array_equal(parts.row_sum[:, 0, 0, 0] > 0, [True, False, True, True])


def test_row_that_sees_nothing_stays_empty_among_rows_that_do():
    """The first of two rows is older than all pairs.

    With 16 channels, a rounding error of MASKED / sqrt(H) would show in exp(s - row_max).
    """
    layer = random_slots(0, 1, 8, 16, 20, 1, [1.0])
    layer = replace(layer, position=jnp.full_like(layer.position, 21))
    parts = merge_parts(check(layer, 1, 20, 2, SlotBlocks(64, 8, 1, 2)))
    np.testing.assert_array_equal(parts.row_sum[0, 0] > 0, [False, True])
    np.testing.assert_array_equal(parts.row_max[0, 0] > MASKED, [False, True])


@hypothesis.settings(max_examples=2, deadline=None, derandomize=True, phases=[hypothesis.Phase.generate])
@hypothesis.given(seed=st.integers(0, 1000), seen=st.integers(1, 30), used=st.sampled_from([0.1, 0.8]))
def test_decode_equals_core(seed, seen, used):
    check(random_slots(seed, 1, 40, 8, seen, 1, [used]), 2, seen, 1, SlotBlocks(64, 8, 1, 2))


@hypothesis.settings(max_examples=2, deadline=None, derandomize=True, phases=[hypothesis.Phase.generate])
@hypothesis.given(seed=st.integers(0, 1000), used=st.sampled_from([0.6, 1.0]))
def test_chunk_over_both_warpgroups_equals_core(seed, used):
    """Use 72 rows, so that the second warpgroup has a few real rows, at other positions than the first."""
    check(random_slots(seed, 1, 40, 8, 20, 24, [used]), 3, 20, 24, SlotBlocks(128, 8, 1, 2))


@pytest.mark.parametrize("rows", [64, 128])
def test_eight_bit_slots_equal_core(rows):
    layer = random_slots(3, 1, 16, 8, 20, 3, [1.0], jnp.float8_e4m3fn if rows == 64 else jnp.float8_e5m2)
    check(layer, 2, 20, 3, SlotBlocks(rows, 8, 1, 2))


def test_bfloat16_is_close_to_core():
    layer = random_slots(4, 1, 16, 8, 20, 1, [1.0], jnp.bfloat16)
    check(layer, 2, 20, 1, SlotBlocks(64, 8, 1, 2), 2e-2, jnp.bfloat16)
