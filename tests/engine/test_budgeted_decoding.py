"""Lazy eviction within exact budgets: the mask path equals any interleaving of prefill, chunks and decoding."""

import functools
from dataclasses import replace

import jax
import numpy as np
import pytest
from cases import TINY, tiny_model, tokens
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from interleavings import LENGTH, OPERATIONS, ROWS, check_interleaving, heads, policy
from jax.sharding import AxisType, Mesh

import dms_jax
from dms_jax.engine import decode_loop, decoding
from dms_jax.models.parameters import ModelStructure, flatten
from dms_jax.policies import BudgetedEviction

MODELS = {  # evict head, shape of the model, budgets of the KV heads of both layers
    "uneven": (policy(3), heads(4, 2, 8), ((4, 9, LENGTH, 13), (11, 4, 6, 9))),
    "w0": (policy(0), heads(2, 2, 8), ((1, 7), (3, 13))),
    "w0, own decision": (policy(0, 0), heads(3, 1, 8), ((1, 2, 9), (4, 4, 4))),
    "own decision, one for all heads": (policy(5, 0, "layer"), heads(2, 4, 8), ((9, 9), (12, 6))),
    "borrowed": (policy(4, variant="borrowed"), heads(2, 2, 8) | {"qk_norm": True}, ((8, 10), (6, 16))),
}


@functools.cache
def build(name):
    """Return a model, its policy and its mask path, jitted once: rows -> (logits, expiry and score [L B K T])."""
    dms, fields, budgets = MODELS[name]
    model, table = tiny_model(dms, 3, num_layers=2, **fields), np.array(budgets, np.int32)
    mean = table.mean()
    assert mean == int(mean)
    return model, BudgetedEviction(dms, int(mean), budgets), jax.jit(functools.partial(mask_path, model, table))


def mask_path(model, budgets, ids, segment_ids=None):
    hidden, expiry, score = model.budgeted_hidden(ids, budgets, segment_ids)
    return model.logits(hidden), expiry, score


def distinct(rng, rows=ROWS, length=LENGTH):
    """Draw rows that repeat no token: in the first layer, both would have one score, and rounding errors would rank."""
    return np.stack([rng.permutation(TINY.vocab_size)[:length] for _ in range(rows)]).astype(np.int32)


def live_after(expiry):
    """Return the live pairs after each token [... T], from the expiries of its pairs [... T]."""
    q = np.arange(expiry.shape[-1])[:, None]
    return ((np.arange(expiry.shape[-1]) <= q) & (q <= np.asarray(expiry)[..., None, :])).sum(-1)


def has_ties(score, tolerance=2e-4):
    return (np.diff(np.sort(score, axis=-1)) < tolerance).any()


@pytest.mark.parametrize("cases, any_width", [(12, False), pytest.param(150, True, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "name, pages", [*((name, False) for name in MODELS), ("uneven", True), ("w0, own decision", True)]
)
def test_every_path_equals_the_mask_path(name, pages, cases, any_width):
    @settings(max_examples=cases, deadline=None)
    @given(seed=st.integers(0, 2**31), operations=OPERATIONS)
    def run(seed, operations):
        rng = np.random.default_rng(seed)
        model, lazy, masked = build(name)
        ids = distinct(rng)
        want, expiry, score = map(np.asarray, masked(ids))
        assume(not has_ties(score[..., :-1]))  # rounding errors may rank them differently
        if pages:
            cache = dms_jax.init_pages(model, ROWS, LENGTH, policy=lazy, page_size=4, num_pages=400)
        else:
            cache = dms_jax.init_cache(model, ROWS, lazy.slot_bounds().max_of_layer, policy=lazy)
        check_interleaving(model, cache, rng, ids, want, live_after(expiry), operations, any_width, threshold=-7.0)

    run()


@pytest.mark.parametrize("name", MODELS)
def test_live_pairs_are_exactly_the_budget(rng, name):
    _, lazy, masked = build(name)
    live = live_after(masked(distinct(rng))[1])
    table = np.array(lazy.head_budgets)[:, None, :, None]
    np.testing.assert_array_equal(live, np.broadcast_to(np.minimum(np.arange(1, LENGTH + 1), table), live.shape))


def test_budgets_of_at_least_the_row_give_the_dense_model(rng):
    model, ids = build("uneven")[0], distinct(rng, 1)
    budgets = np.array([[LENGTH + 5, LENGTH, 90, 61]] * 2, np.int32)
    want, cache = model.dense(ids), dms_jax.init_cache(model, 1, LENGTH, policy=f"dms_budget:{LENGTH}")
    for logits in (mask_path(model, budgets, ids)[0], dms_jax.prefill(model, cache, ids, chunk_size=16)[0]):
        np.testing.assert_array_equal(logits.argmax(-1), want.argmax(-1))
        np.testing.assert_allclose(logits, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("pages", [False, True])
def test_untrained_head_with_equal_budgets_is_a_sliding_window(rng, pages):
    model, ids = tiny_model(policy(2), 3, evict_scale=0.0, num_layers=2), tokens(rng, 2, 30)
    hidden = model.marked_hidden(ids, np.ones(30, bool), 7 - 1)
    cache = dms_jax.init_cache(model, 2, 7, policy="dms_budget:7")
    if pages:
        cache = dms_jax.init_pages(model, 2, 30, policy="dms_budget:7", page_size=2)
    logits, cache = dms_jax.prefill(model, cache, ids, chunk_size=11)
    np.testing.assert_allclose(logits, model.logits(hidden), rtol=1e-5, atol=1e-5)
    assert (np.asarray(cache.live_counts) == 7).all() and dms_jax.compression_ratio(cache) == 30 / 7


@pytest.mark.parametrize("name", ["uneven", "w0", "borrowed"])
def test_segments_of_a_packed_row_equal_rows_of_their_own(rng, name):
    model, _, _ = build(name)
    table, ids = np.array(MODELS[name][2], np.int32), distinct(rng, 1)
    segments = np.repeat([[4, 2, 7]], [11, 1, 28], axis=1).astype(np.int32)
    packed, expiry, score = jax.jit(functools.partial(mask_path, model, table))(ids, segments)
    assert not has_ties(np.asarray(score)[..., :-1])
    for start, stop in ((0, 11), (11, 12), (12, LENGTH)):
        alone, own_expiry, _ = mask_path(model, table, ids[:, start:stop])
        np.testing.assert_allclose(packed[:, start:stop], alone, rtol=1e-5, atol=1e-5)
        np.testing.assert_array_equal(live_after(expiry[..., start:stop] - start), live_after(own_expiry))


@pytest.mark.parametrize(
    "data, model_axis", [(2, 4), *(pytest.param(*sizes, marks=pytest.mark.slow) for sizes in ((4, 2), (1, 8)))]
)
def test_mesh_does_not_change_results(rng, data, model_axis):
    kv_heads = 4 if model_axis == 4 else 3
    model = tiny_model(policy(3), 3, num_layers=2, num_kv_heads=kv_heads, num_q_heads=2 * kv_heads)
    table = 4 + rng.integers(0, 12, (2, kv_heads)).astype(np.int32)
    table.flat[-1] += -table.sum() % table.size
    lazy = BudgetedEviction(model.config.dms, int(table.mean()), tuple(map(tuple, table.tolist())))
    ids, lengths = distinct(rng, 8), np.array([30, 5, 20, 21, 13, 30, 1, 27])
    want, expiry, score = mask_path(model, table, ids)
    assert not has_ties(np.asarray(score)[..., :-1])
    grid = np.array(jax.devices()).reshape(data, model_axis)
    mesh = Mesh(grid, ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    template, params = ModelStructure(model), flatten(model)
    placed = template.build(jax.device_put(params, template.shardings(list(params), mesh)))
    with jax.set_mesh(mesh):
        hidden, sharded_expiry, _ = jax.jit(lambda rows: placed.budgeted_hidden(rows, table))(ids)
        np.testing.assert_allclose(placed.logits(hidden), want, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(sharded_expiry, expiry)
    cache = dms_jax.init_cache(placed, 8, lazy.slot_bounds().max_of_layer, policy=lazy)
    logits, cache = dms_jax.prefill(placed, cache, ids[:, :30], lengths, chunk_size=7)
    for row, length in enumerate(lengths):
        np.testing.assert_allclose(logits[row, :length], want[row, :length], rtol=1e-5, atol=1e-5)
    for step in range(3):
        logits, cache = dms_jax.decode_step(placed, cache, ids[np.arange(8), lengths + step])
        np.testing.assert_allclose(logits, want[np.arange(8), lengths + step], rtol=1e-5, atol=1e-5)
    assert len(cache.layers[0].k.sharding.device_set) == 8
    np.testing.assert_array_equal(cache.live_counts, np.minimum(table[:, None], (lengths + 3)[None, :, None]))


def test_programs_depend_on_capacities_and_not_on_the_budgets_of_heads(rng):
    model = tiny_model(policy(2), 3, num_layers=2)
    config = dms_jax.GenerationConfig(max_new_tokens=6, stop_ids=(), capacity=32)

    def use(budgets):
        lazy = BudgetedEviction(model.config.dms, 9, budgets)
        out = dms_jax.generate(model, tokens(rng, 2, 20), config=replace(config, policy=lazy))
        for layer, row, head in np.ndindex(2, 2, 4):
            assert out.cache.live_counts[layer, row, head] == min(budgets[layer][head], 26)
        assert not out.forced_evictions.any()
        return decoding.num_compilations(), decode_loop.num_loop_compilations()

    warm = use(((9,) * 4, (9,) * 4))
    assert use(((3, 4, 20, 9), (9, 9, 9, 9))) == use(((5, 6, 7, 18), (4, 4, 4, 24))) == warm


def test_buffers_are_as_large_as_the_largest_budget_of_their_layer(rng):
    model = tiny_model(policy(2), 3, num_layers=2)
    budgets = ((3, 4, 100, 13), (30, 30, 30, 30))
    lazy = BudgetedEviction(model.config.dms, 30, budgets)
    config = dms_jax.GenerationConfig(max_new_tokens=9, stop_ids=(), policy=lazy, threshold=5.0, cache="slots")
    out = dms_jax.generate(model, tokens(rng, 1, 150), config)
    assert out.cache.capacities == (128, 64)  # a CPU rounds up to multiples of 64
    np.testing.assert_array_equal(out.cache.live_counts[:, 0], budgets)
    assert out.live_pairs[0] == 30 and not out.forced_evictions.any()
    assert dms_jax.fork(out.cache, 3).policy == out.cache.policy == BudgetedEviction(model.config.dms, 30)


def test_small_buffer_is_refused_when_it_overflows(rng):
    model = tiny_model(policy(2), 3, num_layers=1)
    cache = dms_jax.init_cache(model, 1, 20, policy="dms_budget:30")
    _, cache = dms_jax.prefill(model, cache, tokens(rng, 1, 20))
    with pytest.raises(dms_jax.ConfigError, match="capacity 20 must be at least 21"):
        dms_jax.decode_step(model, cache, tokens(rng, 1, 1)[0])


def test_buffers_grow_up_to_the_budget(rng):
    model = tiny_model(policy(2), 3, num_layers=2)
    lazy = BudgetedEviction(model.config.dms, 40, ((40,) * 4, (10, 100, 30, 20)))
    cache, ids = dms_jax.init_cache(model, 1, 16, policy=lazy, overflow="grow"), tokens(rng, 1, 130)
    logits, cache = dms_jax.prefill(model, cache, ids, chunk_size=16)
    assert cache.capacities == (64, 128) and not np.asarray(cache.forced_evictions).any()
    np.testing.assert_array_equal(cache.live_counts[:, 0], lazy.head_budgets)


def test_impossible_budgets_are_refused():
    model, dms = tiny_model(policy(3), 0, num_layers=2, num_kv_heads=2), policy(3)
    for make, message in {
        lambda: dms_jax.init_cache(model, 1, 8, policy="dms_budget:3"): r"'dms_budget:3'.*window_size \+ 1 = 4",
        lambda: dms_jax.init_cache(model, 1, 8, policy="dms_budget"): "'dms_budget'.*budget",
        lambda: dms_jax.init_cache(tiny_model(None), 1, 8, policy="dms_budget:9"): "no evict head",
        lambda: BudgetedEviction(dms, 5, ((4, 4), (4, 9))): "mean of 5.*got 5.25",
        lambda: BudgetedEviction(dms, 5, ((3, 7), (5, 5))): "window_size",
        lambda: BudgetedEviction(dms, 2**31): r"at most 2\*\*30",
        lambda: BudgetedEviction(dms, 5, [[5, 5], [5, 5]]): "tuple of tuples",
        lambda: BudgetedEviction(dms, 5, ()): "tuple of tuples",
        lambda: dms_jax.init_cache(model, 1, 8, policy=BudgetedEviction(dms, 5, ((5, 5),))): "2 numbers for each of 2",
    }.items():
        with pytest.raises(dms_jax.ConfigError, match=message):
            make()
