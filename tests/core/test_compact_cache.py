"""The compact cache against the NumPy oracle of visibility: attention, live slots, and overflow."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import decode, visible
from hypothesis import given, settings
from hypothesis import strategies as st

from dms_jax.config import DMSConfig
from dms_jax.core import cache_base, compact_cache
from dms_jax.core.compact_cache import EMPTY, NEVER_VISIBLE, CompactCache, Expiries, LayerCache, empty_layer
from dms_jax.core.slot_attention import CacheOps, Chunk, extend_layer, slot_attention
from dms_jax.errors import ConfigError
from dms_jax.policies.keep_all import KeepAll
from dms_jax.policies.learned_eviction import LearnedEviction

B, K, G, H, T, C = 2, 2, 2, 8, 24, 24
WINDOWS = [0, 1, 4, T - 1, T, 60]


@partial(jax.jit, static_argnames=("policy", "block"))
def extend(layer, q, k, v, logits, seen, count, policy, block=5):
    """Do what an attention layer does with a chunk. A block of 5 divides neither the capacity nor a chunk of 6."""
    position = seen[:, None] + jnp.arange(q.shape[1])[None]
    expiries = policy.mark(logits, position, count, 0.0)
    ops = CacheOps(partial(slot_attention, block=block), compact_cache.write_pairs)
    return extend_layer(layer, q, k, v, expiries, Chunk(position, count, 0.0), policy, ops)


def poisoned(layer: LayerCache, seen) -> LayerCache:
    dead = (np.asarray(layer.expiry) < np.asarray(seen)[:, None, None] - 1)[..., None]
    return dataclasses.replace(layer, k=jnp.where(dead, jnp.nan, layer.k), v=jnp.where(dead, jnp.nan, layer.v))


def attend(q, k, v, mask):
    scores = np.where(mask, q @ k.T * H**-0.5, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True) @ v


def run(seed: int, window: int, shift: int, fraction: float, schedule: list[int]):
    """Feed random rows in ragged chunks, and check every output and every live count against the oracle."""
    rng = np.random.default_rng(seed)
    q, k, v = rng.normal(size=(B, T, K * G, H)), rng.normal(size=(B, K, T, H)), rng.normal(size=(B, K, T, H))
    evict = (rng.random((B, K, T)) < fraction).astype(int)
    logits = np.where(evict, 1.0, -1.0) * (1 + rng.random((B, K, T)))
    policy = LearnedEviction(DMSConfig(window_size=window, decision_shift=shift))
    layer, seen, lengths = empty_layer(B, K, C, H, jnp.float32), np.zeros(B, np.int32), rng.integers(1, T + 1, B)
    masks = [[visible(evict[b, h], window, shift) for h in range(K)] for b in range(B)]
    for size in [*schedule, *[6] * T]:
        if (seen == lengths).all():
            break
        count = np.minimum(rng.integers(0, size + 1, B), lengths - seen).astype(np.int32)
        rows = np.minimum(seen[:, None] + np.arange(size), T - 1)
        part = lambda x: jnp.asarray(np.stack([x[b][:, rows[b]] for b in range(B)]), jnp.float32)  # noqa: B023
        chunk_q = jnp.asarray(np.stack([q[b, rows[b]] for b in range(B)]), jnp.float32)
        out, layer = extend(poisoned(layer, seen), chunk_q, part(k), part(v), part(logits), seen, count, policy)
        for b in range(B):
            for t in range(seen[b], seen[b] + count[b]):
                for n in range(K * G):
                    want = attend(q[b, t, n], k[b, n // G], v[b, n // G], masks[b][n // G][t])
                    np.testing.assert_allclose(out[b, t - seen[b], n], want, atol=1e-5)
        seen = seen + count
        live = np.asarray(layer.expiry) >= seen[:, None, None] - 1
        for b in range(B):
            for h in range(K):
                n = decode(evict[b, h, : seen[b]], window, shift)[1][-1] if seen[b] else 0
                assert live[b, h].sum() == n and live[b, h, :n].all(), "live slots must be 0..n-1"
                assert len(set(np.asarray(layer.position)[b, h, :n].tolist())) == n
    assert not np.asarray(layer.forced_evictions).any()


CASES = {
    "seed": st.integers(0, 2**31),
    "shift": st.integers(0, 1),
    "fraction": st.sampled_from([0.0, 0.3, 0.7, 1.0]),
    "schedule": st.lists(st.sampled_from([1, 6]), max_size=30),
}


@settings(max_examples=40, deadline=None)
@given(**CASES, window=st.sampled_from([0, 4, T]))
def test_slots_equal_the_mask(seed, window, shift, fraction, schedule):
    run(seed, window, shift, fraction, schedule)


@pytest.mark.slow
@settings(max_examples=1500, deadline=None)
@given(**CASES, window=st.sampled_from(WINDOWS))
def test_slots_equal_the_mask_in_many_cases(seed, window, shift, fraction, schedule):
    run(seed, window, shift, fraction, schedule)


def test_final_slots_equal_the_golden_case():
    """Check the final token of each slot in the golden case G1 of `test_visibility`."""
    evict = jnp.asarray([0, 1, 1, 0, 1, 0, 1, 1])
    layer, policy = empty_layer(1, 1, 8, H, jnp.float32), LearnedEviction(DMSConfig(window_size=2))
    one = jnp.zeros((1, 1, 1, H))
    for t in range(8):
        logits = jnp.where(evict[t], 1.0, -1.0).reshape(1, 1, 1)
        _, layer = extend(layer, one, one, one, logits, np.array([t], np.int32), np.ones(1, np.int32), policy)
    assert np.asarray(layer.position)[0, 0, :5].tolist() == [6, 4, 2, 5, 7] and int(layer.position[0, 0, 5]) == EMPTY


def victim_oracle(alive, position, score, now, window):
    slots = [s for s in range(len(alive)) if alive[s]]
    outside = [s for s in slots if now - position[s] > window]
    return min(outside, key=lambda s: (-score[s], position[s])) if outside else min(slots, key=lambda s: position[s])


def test_victim_has_the_highest_score_outside_the_window(rng):
    for window in (0, 2, 6, 100):
        for _ in range(40):
            position = rng.permutation(12)[None, None]
            alive = rng.random((1, 1, 12)) < 0.7
            alive[..., 0] = True
            score = rng.integers(-2, 2, (1, 1, 12)).astype(np.float32)  # few values, so that many scores are equal
            got = compact_cache.victim(alive, position.astype(np.int32), score, np.array([12], np.int32), window)
            assert int(got[0, 0]) == victim_oracle(alive[0, 0], position[0, 0], score[0, 0], 12, window)


def test_overflowing_head_loses_pairs_one_by_one_and_its_neighbor_none(rng):
    """Compare with a list of live pairs, token by token and in chunks. Head 0 marks no pair, head 1 every pair."""
    window, capacity, length = 3, 6, 40
    policy = LearnedEviction(DMSConfig(window_size=window))
    logits = -1 - rng.random((1, 2, length)).astype(np.float32)
    logits[:, 1] = 1
    k, v = (rng.normal(size=(1, 2, length, H)).astype(np.float32) for _ in "kv")
    for size in (1, 5):
        layer, pairs, forced = empty_layer(1, 2, capacity, H, jnp.float32), [], 0
        for start in range(0, length, size):
            part = slice(start, start + size)
            at = np.array([start], np.int32)
            q = jnp.zeros((1, size, 4, H))
            _, layer = extend(
                layer, q, k[:, :, part], v[:, :, part], logits[:, :, part], at, np.full(1, size, np.int32), policy
            )
            pairs += range(start, start + size)
            now = start + size - 1
            score = np.append(logits[0, 0, 1 : now + 1], 0.0)
            while len(pairs) > capacity:
                pairs.pop(victim_oracle([True] * len(pairs), pairs, score[pairs], now, window))
                forced += 1
            held = np.asarray(layer.position)
            assert sorted(held[0, 0, held[0, 0] != EMPTY].tolist()) == pairs
            for head in range(2):
                live = np.flatnonzero(np.asarray(layer.expiry)[0, head] >= now)
                np.testing.assert_array_equal(np.asarray(layer.k)[0, head, live], k[0, head, held[0, head, live]])
                np.testing.assert_array_equal(np.asarray(layer.v)[0, head, live], v[0, head, held[0, head, live]])
            assert len(live) == min(window + 1, now + 1), "the head that evicts must hold its window"
        assert np.asarray(layer.forced_evictions).tolist() == [[forced, 0]] and forced == length - capacity


def test_grown_buffer_keeps_its_pairs(rng):
    layer = empty_layer(1, 1, 4, H, jnp.float32)
    policy = LearnedEviction(DMSConfig(window_size=2))
    x = jnp.asarray(rng.normal(size=(1, 1, 3, H)), jnp.float32)
    _, layer = extend(
        layer,
        jnp.zeros((1, 3, 1, H)),
        x,
        x,
        -jnp.ones((1, 1, 3)),
        np.zeros(1, np.int32),
        np.full(1, 3, np.int32),
        policy,
    )
    larger = compact_cache.grown(layer, 9)
    assert larger.capacity == 9
    np.testing.assert_array_equal(larger.k[:, :, :4], layer.k)
    assert np.all(np.asarray(larger.expiry)[..., 4:] == NEVER_VISIBLE) and np.all(
        np.asarray(larger.position)[..., 4:] == EMPTY
    )


def test_row_without_tokens_leaves_the_pending_pair_undecided():
    layer = dataclasses.replace(empty_layer(1, 1, 2, H, jnp.float32), position=jnp.asarray([[[0, EMPTY]]], jnp.int32))
    gone = Expiries(
        jnp.zeros((1, 1, 1), jnp.int32), jnp.zeros((1, 1, 1)), jnp.full((1, 1), 5, jnp.int32), jnp.zeros((1, 1))
    )
    one = np.ones(1, np.int32)
    assert int(compact_cache.apply_pending(layer, gone, one, one).expiry[0, 0, 0]) == 5
    assert int(compact_cache.apply_pending(layer, gone, one, one * 0).expiry[0, 0, 0]) == NEVER_VISIBLE
    # A row that has seen no token has no pair before its first one, and no empty slot is mistaken for that pair.
    fresh = compact_cache.apply_pending(empty_layer(1, 1, 2, H, jnp.float32), gone, one * 0, one)
    assert np.all(np.asarray(fresh.expiry) == NEVER_VISIBLE)


def test_compression_ratio_is_tokens_over_live_pairs():
    expiry = [[[9] * n + [NEVER_VISIBLE] * (8 - n) for n in row] for row in ([2, 4], [1, 1])]
    layer = dataclasses.replace(empty_layer(2, 2, 8, H, jnp.float32), expiry=jnp.asarray(expiry))
    cache = CompactCache((layer,), jnp.asarray([8, 4], jnp.int32), KeepAll())
    assert cache_base.compression_ratio(cache) == 6 / 2
    assert cache_base.row_compression_ratios(cache).tolist() == [8 / 3, 4.0]
    empty = CompactCache((empty_layer(1, 1, 4, H, jnp.float32),), jnp.zeros(1, jnp.int32), KeepAll())
    assert cache_base.compression_ratio(empty) == 1.0 and cache_base.row_compression_ratios(empty).tolist() == [1.0]
    assert cache.bytes == 2 * 2 * 8 * (2 * H * 4 + 12) + 16 + 8


def test_fork_copies_rows_next_to_each_other():
    cache = CompactCache((empty_layer(2, 1, 4, H, jnp.float32),), jnp.asarray([3, 5], jnp.int32), KeepAll())
    assert cache_base.fork(cache, 3).seen.tolist() == [3, 3, 3, 5, 5, 5]
    with pytest.raises(ConfigError, match="chains.*0"):
        cache_base.fork(cache, 0)
