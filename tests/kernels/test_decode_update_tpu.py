"""The fused decode update for TPUs, in interpret mode, step by step against `core.compact_cache`.

Rows are ragged, some heads are full, and dead slots hold NaN.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dms_jax.config import DMSConfig
from dms_jax.core.compact_cache import EMPTY, NEVER_VISIBLE, LayerCache, append, apply_pending
from dms_jax.core.rotary import rope
from dms_jax.core.visibility import NEVER
from dms_jax.kernels import decode_update_tpu
from dms_jax.kernels.decode_update_tpu import decode_update
from dms_jax.kernels.operands import Pairs, Token
from dms_jax.policies.keep_all import KeepAll
from dms_jax.policies.learned_eviction import LearnedEviction

B, G, THRESHOLD = 3, 2, 0.25


def policy(shift: int | None, window: int):
    return KeepAll() if shift is None else LearnedEviction(DMSConfig(window_size=window, decision_shift=shift))


@partial(jax.jit, static_argnames=("shift", "window"))
def by_core(layer, q, k, v, position, frequency, logit, seen, count, shift, window):
    rules = policy(shift, window)
    expiries = rules.mark(logit[..., None], position, count, THRESHOLD)
    k = rope(k[:, None], position, frequency)[:, 0]
    layer = apply_pending(layer, expiries, seen, count)
    return rope(q[:, None], position, frequency)[:, 0], append(
        layer, k[:, :, None], v[:, :, None], expiries, seen, count, rules.window_size
    )


@partial(jax.jit, static_argnames=("shift", "window"))
def by_kernel(layer, q, k, v, position, frequency, logit, seen, count, shift, window):
    angle = position.astype(jnp.float32) * frequency[None]
    q, slots, forced = decode_update(
        Token(q, k, v, jnp.cos(angle), jnp.sin(angle), logit),
        Pairs.of_layer(layer),
        seen,
        count,
        jnp.float32(THRESHOLD),
        window_size=policy(shift, window).window_size,
        decision_shift=shift,
        interpret=True,
    )
    layer = slots.put_into(layer)
    return q, dataclasses.replace(layer, forced_evictions=layer.forced_evictions + forced)


def start(rng, heads, capacity, head_dim, window, cache_dtype) -> tuple[LayerCache, np.ndarray]:
    """Draw a layer after many tokens, with pairs in random slots, including that of the last token.

    Some pairs have expired and hold NaN. One head is full of pairs that stay, and one head is empty.
    """
    seen = rng.integers(capacity + 1, 2 * capacity + 1, B).astype(np.int32)
    position = np.array([[rng.permutation(n - 1)[:capacity] for _ in range(heads)] for n in seen], np.int32)
    for b in range(B):
        for h in range(heads):
            position[b, h, rng.integers(capacity)] = seen[b] - 1
    expiry = np.where(rng.random(position.shape) < 0.7, NEVER, position + window)
    expiry[0, 0] = NEVER
    position[-1, -1], expiry[-1, -1] = EMPTY, NEVER_VISIBLE
    gone = (expiry < seen[:, None, None] - 1)[..., None]
    k, v = (
        jnp.asarray(np.where(gone, np.nan, rng.normal(size=(B, heads, capacity, head_dim))), cache_dtype)
        for _ in range(2)
    )
    score = jnp.asarray(rng.integers(0, 3, position.shape), jnp.float32)  # few different scores, so that some are equal
    return LayerCache(
        k, v, jnp.asarray(position), jnp.asarray(expiry, jnp.int32), score, jnp.zeros((B, heads), jnp.int32)
    ), seen


def check(shift, window, heads, capacity, head_dim, dtype="float32", cache_dtype=None, steps=12, full=False):
    rng = np.random.default_rng(capacity + window)
    layer, seen = start(rng, heads, capacity, head_dim, window, jnp.dtype(cache_dtype or dtype))
    if full:
        layer = dataclasses.replace(layer, expiry=jnp.where(layer.position < EMPTY, NEVER, NEVER_VISIBLE))
    frequency = jnp.asarray(10000.0 ** -np.linspace(0, 1, head_dim // 2), jnp.float32)
    expected = layer
    for _ in range(steps):
        count = (rng.random(B) < 0.8).astype(np.int32)
        rows = lambda n: jnp.asarray(rng.normal(size=(B, n, head_dim)), dtype)
        token = (rows(heads * G), rows(heads), rows(heads), jnp.asarray(seen)[:, None], frequency)
        logit = jnp.asarray(rng.normal(size=(B, heads)), jnp.float32)
        q, layer = by_kernel(layer, *token, logit, seen, count, shift, window)
        want, expected = by_core(expected, *token, logit, seen, count, shift, window)
        tolerance = 1e-5 if dtype == "float32" else 2e-2
        np.testing.assert_allclose(
            np.asarray(q, np.float32), np.asarray(want, np.float32), rtol=tolerance, atol=tolerance
        )
        for name in (*Pairs._fields[1:], "forced_evictions"):
            np.testing.assert_array_equal(
                *(np.asarray(getattr(x, name), np.float64) for x in (layer, expected)), err_msg=name
            )
        np.testing.assert_allclose(
            *(np.asarray(x.k, np.float32) for x in (layer, expected)), rtol=tolerance, atol=tolerance
        )
        seen = seen + count
    return layer


@pytest.mark.parametrize("shift, window", [(0, 3), (1, 0), (1, 3), (None, 0)])
def test_update_equals_core_token_by_token(shift, window):
    layer = check(shift, window, 2, 6, 8)
    assert np.asarray(layer.forced_evictions).any()  # the overflow rule was used


@pytest.mark.parametrize("shift", [0, 1])
def test_full_heads_push_out_the_pair_that_core_pushes_out(shift):
    layer = check(shift, 4, 2, 20, 8, full=True)
    assert (np.asarray(layer.forced_evictions)[:, 0] > 0).all()


# Tiles of slots in lanes, tiles of rows, and no tiles.
@pytest.mark.parametrize("head_dim, capacity", [(8, 256), (128, 64), (128, 20)])
def test_write_to_a_tile_changes_no_other_tile(head_dim, capacity):
    check(1, 9, 2, capacity, head_dim, steps=6)


def test_several_grid_steps_equal_core(monkeypatch):
    monkeypatch.setattr(decode_update_tpu, "HEADS_AT_ONCE", 8)
    check(1, 9, 16, 24, 8, steps=3)


@pytest.mark.parametrize("head_dim, cache_dtype", [(128, "bfloat16"), (128, "float8_e4m3fn"), (16, "float8_e5m2")])
def test_small_types_equal_core(head_dim, cache_dtype):
    check(1, 9, 2, 128, head_dim, "bfloat16", cache_dtype, steps=5)
