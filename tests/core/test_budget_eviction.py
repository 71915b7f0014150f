"""Lazy eviction within a budget against an oracle that ranks all pairs anew at each query."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dms_jax.config import DMSConfig
from dms_jax.core import compact_cache
from dms_jax.core.budget_eviction import budgeted_row_expiry
from dms_jax.core.slot_attention import CacheOps, Chunk, expiring_attention, extend_layer, slot_attention
from dms_jax.policies.budgeted_eviction import BudgetedEviction

B, K, T, C, H = 2, 3, 24, 14, 4


def lazy_oracle(score: np.ndarray, budget: int, window: int) -> np.ndarray:
    """Return which query sees which pair [T T] of one head whose pairs have the scores [T]. The definition in words."""
    seen = np.zeros((len(score), len(score)), bool)
    for q in range(len(score)):
        recent, settled = list(range(max(0, q - window), q + 1)), range(0, max(0, q - window))
        ranked = sorted(settled, key=lambda p: (score[p], -p))  # the oldest of equals is the first to leave
        seen[q, recent + ranked[: budget - window - 1]] = True
    return seen


def visible_of(expiry: np.ndarray) -> np.ndarray:
    """Return which query sees which pair [... T T] by the expiries [... T]."""
    q = np.arange(expiry.shape[-1])[:, None]
    return (np.arange(expiry.shape[-1]) <= q) & (q <= expiry[..., None, :])


def scores(rng, shape, num_values):
    """Draw scores; with few values, most are tied, and 0.0 and -0.0 are among them."""
    drawn = rng.integers(-num_values // 2, num_values // 2 + 1, shape)
    return np.where(drawn == 0, rng.choice([0.0, -0.0], shape), drawn).astype(np.float32)


@functools.partial(jax.jit, static_argnames="window")
def rows_expiry(score, budget, segment_ids, window):
    return budgeted_row_expiry(score, budget, window, segment_ids)


CASE = {
    "seed": st.integers(0, 2**31),
    "window": st.sampled_from([0, 1, 3, 7]),
    "num_values": st.sampled_from([0, 2, 1000]),
}


@settings(max_examples=60, deadline=None)
@given(**CASE)
def test_expiries_of_rows_equal_the_oracle(seed, window, num_values):
    rng = np.random.default_rng(seed)
    score = scores(rng, (B, K, T), num_values)
    budget = window + 1 + rng.integers(0, T + 2 - window, (B, K)).astype(np.int32)
    got = visible_of(np.asarray(rows_expiry(score, budget, None, window)))
    for b, h in np.ndindex(B, K):
        np.testing.assert_array_equal(got[b, h], lazy_oracle(score[b, h], budget[b, h], window))


@settings(max_examples=60, deadline=None)
@given(**CASE)
def test_each_segment_of_a_packed_row_is_a_stream_of_its_own(seed, window, num_values):
    rng = np.random.default_rng(seed)
    score = scores(rng, (B, K, T), num_values)
    budget = window + 1 + rng.integers(0, 6, (B, K)).astype(np.int32)
    segments = np.cumsum(rng.random((B, T)) < 0.15, axis=1).astype(np.int32)
    expiry = np.asarray(rows_expiry(score, budget, segments, window))
    for b, h in np.ndindex(B, K):
        for segment in np.unique(segments[b]):
            at = np.flatnonzero(segments[b] == segment)
            got = visible_of(np.clip(expiry[b, h, at].astype(np.int64) - at[0], None, T))
            np.testing.assert_array_equal(got, lazy_oracle(score[b, h, at], budget[b, h], window))


@functools.partial(jax.jit, static_argnames="policy")
def extend(layer, q, k, v, logits, seen, count, policy):
    """Do what an attention layer does with a chunk."""
    position = seen[:, None] + np.arange(q.shape[1])[None]
    expiries = policy.mark(logits, position, count, 0.0)
    ops = CacheOps(slot_attention, compact_cache.write_pairs)
    return extend_layer(layer, q, k, v, expiries, Chunk(position, count, 0.0), policy, ops)


@pytest.mark.parametrize("window, shift", [(0, 0), (0, 1), (3, 1)])
def test_chunks_of_any_size_see_the_pairs_of_the_oracle(window, shift):
    """Ragged chunks, single tokens and rows without tokens; dead slots and padding hold NaN."""

    @settings(max_examples=12, deadline=None)
    @given(seed=CASE["seed"], num_values=CASE["num_values"])
    def run(seed, num_values):
        check_chunks(seed, window, shift, num_values)

    run()


def check_chunks(seed, window, shift, num_values):
    rng = np.random.default_rng(seed)
    logits = scores(rng, (B, K, T + 8), num_values)
    q, k, v = (
        rng.normal(size=s).astype(np.float32) for s in ((B, T + 8, 2 * K, H), (B, K, T + 8, H), (B, K, T + 8, H))
    )
    pair_score = np.roll(logits, -shift, axis=-1)[..., :T]  # entry t is the score of pair t
    budget = window + 1 + rng.integers(0, C - window, (B, K)).astype(np.int32)
    policy = BudgetedEviction(DMSConfig(window_size=window, decision_shift=shift), C)
    seen_by = np.array([[lazy_oracle(pair_score[b, h], budget[b, h], window) for h in range(K)] for b in range(B)])
    layer = dataclasses.replace(compact_cache.empty_layer(B, K, C, H, np.float32), budget=jnp.asarray(budget))
    seen, length = np.zeros(B, np.int32), rng.integers(T - 6, T + 1, B)
    while (seen < length).any():
        size = int(rng.choice([1, 7]))
        count = np.minimum(rng.integers(0, size + 1, B), length - seen).astype(np.int32)
        at = seen[:, None] + np.arange(size)
        part = lambda x: np.stack([x[b][:, at[b]] for b in range(B)])  # noqa: B023
        padding = (np.arange(size) >= count[:, None])[:, None]
        chunk_logits = np.where(padding, np.nan, part(logits))
        rows = np.stack([q[b, at[b]] for b in range(B)])
        out, layer = extend(layer, rows, part(k), part(v), chunk_logits, seen, count, policy)
        for b in range(B):
            for t in range(seen[b], seen[b] + count[b]):
                for n in range(2 * K):
                    there = np.flatnonzero(seen_by[b, n // 2, t])
                    weight = np.exp(q[b, t, n] @ k[b, n // 2, there].T * H**-0.5)
                    want = weight / weight.sum() @ v[b, n // 2, there]
                    np.testing.assert_allclose(out[b, t - seen[b], n], want, atol=1e-5)
        seen = seen + count
        alive = np.asarray(layer.expiry) >= (seen - 1)[:, None, None]
        for b, h in np.ndindex(B, K):
            held = np.sort(np.asarray(layer.position)[b, h][alive[b, h]])
            want = np.flatnonzero(seen_by[b, h, seen[b] - 1]) if seen[b] else []
            np.testing.assert_array_equal(held, want)
        dead = jnp.asarray(~alive)
        layer = dataclasses.replace(
            layer,
            k=jnp.where(dead[..., None], jnp.nan, layer.k),
            v=jnp.where(dead[..., None], jnp.nan, layer.v),
            score=jnp.where(dead, jnp.nan, layer.score),
        )
    assert not np.asarray(layer.forced_evictions).any()


def test_attention_until_an_expiry_equals_its_definition(rng):
    q, k, v = (rng.normal(size=(B, T, heads, H)).astype(np.float32) for heads in (2 * K, K, K))
    expiry = (np.arange(T) + rng.integers(0, T, (B, K, T))).astype(np.int32)
    mask = np.repeat(visible_of(expiry), 2, axis=1)
    score = np.einsum("btnh,bsnh->bnts", q, np.repeat(k, 2, axis=2)) * H**-0.5
    weight = np.where(mask, np.exp(score), 0)
    want = np.einsum("bnts,bsnh->btnh", weight / weight.sum(-1, keepdims=True), np.repeat(v, 2, axis=2))
    np.testing.assert_allclose(expiring_attention(q, k, v, expiry), want, atol=1e-5)


def test_equal_scores_and_budgets_are_a_sliding_window():
    expiry = budgeted_row_expiry(jnp.full((1, 1, T), -5.0), jnp.full((1, 1), 9), 4)
    np.testing.assert_array_equal(np.asarray(expiry)[0, 0, : T - 9], np.arange(T - 9) + 8)
    assert (np.asarray(expiry)[0, 0, T - 9 :] >= T).all()
