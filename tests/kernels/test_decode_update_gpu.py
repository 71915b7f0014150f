"""The fused decode update for Hopper, in interpret mode, against `core.rotary` and `core.compact_cache`."""

from dataclasses import replace
from functools import partial

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from dms_jax.config import DMSConfig
from dms_jax.core.compact_cache import EMPTY, NEVER_VISIBLE, LayerCache, append, apply_pending
from dms_jax.core.rotary import rope
from dms_jax.core.visibility import NEVER
from dms_jax.kernels.decode_update_gpu import decode_update
from dms_jax.kernels.operands import Pairs, Token
from dms_jax.policies.keep_all import KeepAll
from dms_jax.policies.learned_eviction import LearnedEviction

RUN = jax.jit(partial(decode_update, interpret=True), static_argnames=("window_size", "decision_shift"))


def random_layer(rng, heads, capacity, seen, window, filled, marked, head_dim=8, dtype=jnp.float32):
    """Draw a layer whose rows have seen `seen` tokens.

    A fraction `filled` of the slots has distinct positions in random order, including that of the last token. A
    fraction `marked` of these leaves after the window. There are few different scores, so that some are equal.
    """
    shape = (len(seen), heads, capacity)
    position, expiry = np.full(shape, EMPTY, np.int64), np.full(shape, NEVER_VISIBLE, np.int64)
    for row, tokens in enumerate(seen):
        for head in range(heads):
            number = min(int(filled * capacity), tokens)
            held = (
                np.append(rng.choice(tokens - 1, number - 1, replace=False), tokens - 1) if number else np.zeros(0, int)
            )
            at = rng.choice(capacity, number, replace=False)
            position[row, head, at] = held
            leaves = (rng.random(number) < marked) & (held < tokens - 1)
            expiry[row, head, at] = np.where(leaves, held + window, NEVER)
    k, v = (jnp.asarray(rng.normal(size=(*shape, head_dim)), dtype) for _ in range(2))
    score = jnp.asarray(rng.integers(0, 3, shape), jnp.float32)
    return LayerCache(
        k, v, jnp.asarray(position, jnp.int32), jnp.asarray(expiry, jnp.int32), score, jnp.zeros(shape[:2], jnp.int32)
    )


def layer_of(position, expiry, score):
    """Make a layer with one head and the given slots."""
    layer = random_layer(np.random.default_rng(0), 1, len(position), [1], 0, 0.0, 0.0)
    given = (jnp.asarray(x)[None, None] for x in (position, expiry, score))
    return replace(
        layer,
        **{
            name: x.astype(getattr(layer, name).dtype)
            for name, x in zip(("position", "expiry", "score"), given, strict=True)
        },
    )


def check(seed, layer, seen, count, group, window, shift, threshold=0.25, dtype=jnp.float32, logit=None):
    rng = np.random.default_rng(seed)
    batch, heads, _, head_dim = layer.k.shape
    seen, count = jnp.asarray(seen, jnp.int32), jnp.asarray(count, jnp.int32)
    q, k, v = (jnp.asarray(rng.normal(size=(batch, n, head_dim)), dtype) for n in (heads * group, heads, heads))
    logit = jnp.asarray(rng.normal(size=(batch, heads)) if logit is None else logit, jnp.float32)
    frequency = 10.0 ** (-jnp.arange(head_dim // 2, dtype=jnp.float32))
    angle = seen[:, None].astype(jnp.float32) * frequency[None]
    policy = KeepAll() if shift is None else LearnedEviction(DMSConfig(window_size=window, decision_shift=shift))

    threshold = jnp.float32(threshold)
    expiries = policy.mark(logit[..., None], seen[:, None], count, threshold)
    rotate = lambda x: rope(x[:, None], seen[:, None], frequency)[:, 0]
    expected = apply_pending(layer, expiries, seen, count)
    expected = append(expected, rotate(k)[:, :, None], v[:, :, None], expiries, seen, count, policy.window_size)

    rotated, updated, forced = RUN(
        Token(q, k, v, jnp.cos(angle), jnp.sin(angle), logit),
        Pairs.of_layer(layer),
        seen,
        count,
        threshold,
        window_size=policy.window_size,
        decision_shift=shift,
    )
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if dtype == jnp.float32 else {"rtol": 2e-2, "atol": 2e-2}
    as_float = lambda x: np.asarray(x, np.float32)
    np.testing.assert_allclose(as_float(rotated), as_float(rotate(q)), **tolerance)
    np.testing.assert_array_equal(forced, expected.forced_evictions)
    for got, name in zip(updated, Pairs._fields, strict=True):
        np.testing.assert_allclose(
            as_float(got),
            as_float(getattr(expected, name)),
            err_msg=name,
            **(tolerance if name in "kv" else {"rtol": 0}),
        )
    return forced, updated.position


@hypothesis.settings(max_examples=2, deadline=None, derandomize=True, phases=[hypothesis.Phase.generate])
@hypothesis.given(seed=st.integers(0, 1000), filled=st.sampled_from([0.5, 1.0]), window=st.sampled_from([0, 4]))
def test_decision_one_token_late_equals_core(seed, filled, window):
    seen = [30, 25]
    layer = random_layer(np.random.default_rng(seed), 1, 8, seen, window, filled, marked=0.4)
    check(seed, layer, seen, [1, 1], 3, window, 1)


@pytest.mark.parametrize("shift, threshold", [(0, -10.0), (None, 0.25)])
def test_decision_at_once_or_never_equals_core(shift, threshold):
    seen = [9, 12, 20]
    layer = random_layer(np.random.default_rng(2), 1, 16, seen, 4, 0.8, marked=0.5)
    check(2, layer, seen, [1, 0, 1], 1, 4, shift, threshold)


@pytest.mark.parametrize("window, shift", [(100, 0), (0, None)])
def test_overflow_inside_the_window_evicts_the_oldest(window, shift):
    seen = [40, 50]
    layer = random_layer(np.random.default_rng(7), 1, 8, seen, window, 1.0, marked=0.0)
    assert check(7, layer, seen, [1, 1], 2, window, shift, threshold=10.0)[0].all()


def test_overflow_outside_the_window_evicts_the_highest_score():
    """Of two pairs with the highest score, the older one leaves. A pair with a higher score is still in the window."""
    layer = layer_of([36, 39, 20, 10, 12, 5, 6, 7], [NEVER] * 8, [9, 0, 1, 1, 0, 0, 0, 0])
    forced, position = check(7, layer, [40], [1], 1, 4, 1, threshold=10.0)
    assert forced.all() and position[0, 0, 3] == 40


def test_overflow_uses_the_score_that_was_just_decided():
    """Without a window, the pair before this token can leave at once, because of the score that the token gives it."""
    layer = layer_of([36, 39, 20, 10], [NEVER] * 4, [2, 0, 1, 1])
    forced, position = check(7, layer, [40], [1], 1, 0, 1, threshold=10.0, logit=[[5.0]])
    assert forced.all() and position[0, 0, 1] == 40


def test_marked_pair_without_a_window_is_replaced_at_once():
    layer = layer_of([36, 20, 39, 10], [NEVER] * 4, [0, 0, 0, 0])
    forced, position = check(7, layer, [40], [1], 1, 0, 1, threshold=-10.0)
    assert not forced.any() and position[0, 0, 2] == 40


def test_new_pair_takes_the_lowest_slot_that_its_token_does_not_see():
    layer = layer_of([36, 20, 39, 10], [40, NEVER, NEVER, 39], [0, 0, 0, 0])
    assert check(7, layer, [40], [1], 1, 4, 1)[1][0, 0, 3] == 40


def test_row_without_a_token_stays_and_empty_row_starts():
    layer = random_layer(np.random.default_rng(3), 1, 8, [20, 1], 4, 1.0, marked=0.0)
    layer = replace(
        layer,
        **{
            name: getattr(layer, name).at[1].set(value)
            for name, value in (("position", EMPTY), ("expiry", NEVER_VISIBLE))
        },
    )
    check(3, layer, [20, 0], [0, 1], 1, 4, 1)


def test_slots_in_overlapping_tiles_equal_core():
    """Use 130 slots, 65 rows of 2, with the free and the pending slot in the last row, then in the first one."""
    seen = [300]
    layer = random_layer(np.random.default_rng(4), 1, 130, seen, 4, 1.0, marked=0.0)
    for free, pending in ((129, 128), (0, 1)):
        position = (
            jnp.where(layer.position == 299, layer.position[..., pending : pending + 1], layer.position)
            .at[..., pending]
            .set(299)
        )
        moved = replace(layer, position=position, expiry=jnp.full_like(layer.expiry, NEVER).at[..., free].set(10))
        assert not check(4, moved, seen, [1], 1, 4, 1)[0].any()


def test_eight_bit_cache_of_a_bfloat16_model_equals_core():
    layer = random_layer(np.random.default_rng(5), 1, 8, [20], 4, 0.5, 0.5, dtype=jnp.float8_e4m3fn)
    check(5, layer, [20], [1], 1, 4, 1, dtype=jnp.bfloat16)
