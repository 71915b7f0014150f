"""Heads of a layer that share one budget, as in Ada-KV; tests/policies/test_online.py has the simulation."""

import numpy as np
import pytest
from cases import tiny_model, tokens

import dms_jax
from dms_jax.evaluation.methods import Method, parse_methods
from dms_jax.evaluation.teacher_forced import dense_hidden, online_rows
from dms_jax.policies import H2O, TOVA, PromptCompression, SnapKV, VaSE, policy_of
from dms_jax.policies.budget_policy import best_of_layer, safeguard


def test_kept_pairs_equal_those_of_kvpress(rng):
    """Compare with the steps of kvpress's `adakv_press.py`: prune the lowest of all heads, after raising the safe."""
    heads, slots, budget = 3, 40, 17
    scores = rng.normal(size=(2, heads, slots)).astype(np.float32) + 3 * np.arange(heads, dtype=np.float32)[:, None]
    position = np.broadcast_to(np.arange(slots, dtype=np.int32), scores.shape)
    kept = np.asarray(best_of_layer(scores, np.ones(scores.shape, bool), position, budget))
    for row in range(2):
        raised = scores[row].copy()
        for head in range(heads):
            raised[head, np.argsort(raised[head])[-int(budget * 0.2) :]] = np.finfo(np.float32).max
        pruned = np.argsort(raised.ravel())[: heads * (slots - budget)]
        np.testing.assert_array_equal(np.flatnonzero(~kept[row].ravel()), np.sort(pruned))
    assert kept.sum(-1).min() == safeguard(budget) == 3, "the lowest head must fall to its safeguard"


def test_one_head_holds_at_most_the_bound_and_reaches_it(rng):
    """One head has the highest scores by far: it gets all that the safeguard does not leave to the others."""
    heads, slots, budget = 4, 64, 10
    scores = rng.uniform(size=(1, heads, slots)).astype(np.float32)
    scores[0, 2] += 5
    position = np.broadcast_to(np.arange(slots, dtype=np.int32), scores.shape)
    alive = rng.random(scores.shape) < 0.9
    kept = np.asarray(best_of_layer(scores, alive, position, budget))
    most = heads * budget - (heads - 1) * 2
    assert kept.sum(-1)[0].tolist() == [2, 2, most, 2] and not (kept & ~alive).any()
    assert SnapKV(budget, adakv_heads=heads).slot_bounds().max == most
    assert SnapKV(budget, adakv_heads=1).slot_bounds().max == SnapKV(budget).slot_bounds().max == budget
    assert [safeguard(n) for n in range(5000)] == [n // 5 for n in range(5000)]


@pytest.mark.parametrize("name", ["adakv:h2o:9", "adakv:dropkv:33"])
def test_engine_keeps_the_mean_budget_and_rows_are_independent(rng, name):
    model, ids = tiny_model(None, 3, num_layers=2), tokens(rng, 2, 48)
    policy = policy_of(model.config, name)
    got = online_rows(model, dense_hidden(model, ids), ids, policy)
    live = np.asarray(got.cache.live_counts)
    assert (live.sum(-1) == policy.budget * live.shape[-1]).all() and live.std() > 0
    assert live.max() <= policy.slot_bounds().max and not np.asarray(got.cache.forced_evictions).any()
    np.testing.assert_array_equal(policy.pairs_read(live), live + 1)
    np.testing.assert_array_equal(policy.pairs_read(np.full((2, 4), 5)), 5)
    assert policy.pairs_read(np.float64(policy.budget)) == policy.budget + 1
    alone = online_rows(model, dense_hidden(model, ids[1:]), ids[1:], policy)
    np.testing.assert_array_equal(alone.cache.live_counts[:, 0], live[:, 1])
    out = dms_jax.generate(
        model, [ids[0, :40].tolist()], dms_jax.GenerationConfig(max_new_tokens=4, stop_ids=(), policy=name)
    )
    assert out.live_pairs[0] == policy.budget and out.pairs_read[0] == 4 * (policy.budget + 1)


def test_prompt_is_compressed_to_the_mean_budget(rng):
    model, ids = tiny_model(None, 3, num_layers=1), tokens(rng, 1, 40)
    cache = dms_jax.init_cache(model, 1, 64, policy="prompt:adakv:snapkv:10")
    _, cache = dms_jax.prefill(model, cache, ids)
    most = policy_of(model.config, "adakv:snapkv:10").slot_bounds().max
    live = np.asarray(dms_jax.compress_prompt(cache, most).live_counts)
    assert live.sum() == 10 * live.size and live.std() > 0
    with pytest.raises(dms_jax.ConfigError, match=f"capacity.*{most}.*{most - 1}"):
        dms_jax.compress_prompt(cache, most - 1)


def test_policies_that_cannot_share_and_wrong_numbers_of_heads_are_refused(rng):
    for kind in (TOVA, VaSE):
        with pytest.raises(dms_jax.ConfigError, match=f"{kind.__name__}.*different heads.*snapkv"):
            kind(40, adakv_heads=4)
    with pytest.raises(dms_jax.ConfigError, match="adakv_heads.*got 0"):
        H2O(9, adakv_heads=0)
    model = tiny_model(None, 3, num_layers=1)
    cache = dms_jax.init_cache(model, 1, 64, policy=H2O(9, adakv_heads=3))
    with pytest.raises(dms_jax.ConfigError, match="adakv_heads must be 4.*got 3"):
        dms_jax.prefill(model, cache, tokens(rng, 1, 16))


def test_names_are_methods_of_an_evaluation():
    methods = parse_methods("adakv:h2o,prompt:adakv:snapkv", "64")
    assert methods == [Method("adakv:h2o", "64"), Method("prompt:adakv:snapkv", "64")]
    assert methods[0].kind is H2O and methods[1].kind is SnapKV and methods[1].compresses_prompt
    assert isinstance(policy_of(tiny_model(None, 3, num_layers=1).config, "prompt:adakv:snapkv:64"), PromptCompression)
    with pytest.raises(dms_jax.ConfigError, match="--policies adakv:tova.*TOVA"):
        parse_methods("adakv:tova", "64")
