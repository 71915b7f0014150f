"""Policies that read given text in chunks through a cache, compared with the full-sequence paths."""

import jax
import numpy as np
import pytest
from cases import tiny_model, tokens

from dms_jax.config import DMSConfig
from dms_jax.core.cache_base import compression_ratio, nominal_compression_ratio
from dms_jax.errors import ConfigError
from dms_jax.evaluation.held_out import retrofit_rows, streaming_llm_rows
from dms_jax.evaluation.teacher_forced import dense_hidden, online_rows
from dms_jax.models.decoder import with_window
from dms_jax.policies import ImmediateEviction, StreamingLLM, policy_of

B, T = 2, 48


def equal(got, want):
    for name in ("kl_teacher_student", "kl_student_teacher", "student_nll", "teacher_nll"):
        np.testing.assert_allclose(getattr(got, name), getattr(want, name), atol=2e-5, err_msg=name)
    np.testing.assert_array_equal(got.agree, want.agree)


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("chunk", [1, 16, 48])
def test_dms_equals_the_hard_path_at_any_chunk(rng, shift, chunk):
    dms = DMSConfig(window_size=5, evict_logit_bias=0.0, decision_shift=shift)
    model, ids = tiny_model(dms, 3, num_layers=2), tokens(rng, B, T)
    got = online_rows(model, dense_hidden(model, ids), ids, policy_of(model.config), 0.1, chunk)
    want = retrofit_rows(model, model, model.dense_hidden(ids), ids, None, 0.1)
    equal(got.tokens, want.tokens)
    np.testing.assert_array_equal(got.cache.live_counts, want.live)
    assert got.tokens.kl_teacher_student[:, :-1].mean() > 1e-4, "the model evicts nothing"
    # With shift 1, no token decides about the last pair, so it is not evicted.
    evicting = np.asarray(want.evict_fraction) * T - (
        np.asarray(model.hard(ids, threshold=0.1)[1])[..., 0] if shift else 0
    )
    np.testing.assert_allclose(nominal_compression_ratio(got.cache), 1 / (1 - evicting.mean() / T), rtol=1e-6)
    assert compression_ratio(got.cache) < nominal_compression_ratio(got.cache)
    np.testing.assert_allclose(got.live_by_chunk[:, -1], np.asarray(want.live).mean(axis=(0, 2)), rtol=1e-6)


def test_dense_policy_equals_the_dense_model(rng):
    model, ids = tiny_model(None, 3, num_layers=2), tokens(rng, B, T)
    got = online_rows(model, dense_hidden(model, ids), ids, policy_of(model.config, "dense"))
    assert np.abs(got.tokens.kl_teacher_student).max() < 1e-5 and got.tokens.agree.all()
    np.testing.assert_array_equal(got.live_by_chunk, [[16, 32, 48]] * B)


def test_streaming_llm_equals_the_mask_path_at_any_chunk(rng):
    model, ids = tiny_model(None, 3, num_layers=2), tokens(rng, B, T)
    hidden, policy = dense_hidden(model, ids), StreamingLLM(12)
    want = streaming_llm_rows(model, model.dense_hidden(ids), ids, None, policy)
    for chunk in (1, 16):
        got = online_rows(model, hidden, ids, policy, chunk=chunk)
        equal(got.tokens, want)
        np.testing.assert_array_equal(got.cache.live_counts, 12)


def test_immediate_eviction_equals_a_window_of_zero(rng):
    model, ids = tiny_model(DMSConfig(window_size=5, evict_logit_bias=0.0), 3, num_layers=2), tokens(rng, B, T)
    got = online_rows(model, dense_hidden(model, ids), ids, ImmediateEviction(model.config.require_dms()))
    other = with_window(model, 0)
    equal(got.tokens, retrofit_rows(other, model, model.dense_hidden(ids), ids, None).tokens)
    assert model.config.require_dms().window_size == 5, "the model lost its own window"


def test_exact_budgets_give_the_same_at_any_chunk_and_cost_nothing_before_they_are_full(rng):
    model, ids = tiny_model(DMSConfig(window_size=5, evict_logit_bias=0.0), 3, num_layers=2), tokens(rng, B, T)
    hidden, policy = dense_hidden(model, ids), policy_of(model.config, "dms_budget:11")
    one, *others = (online_rows(model, hidden, ids, policy, threshold=-9.0, chunk=chunk) for chunk in (1, 16, 48))
    for other in others:
        equal(other.tokens, one.tokens)
    np.testing.assert_array_equal(one.cache.live_counts, 11)
    assert compression_ratio(one.cache) == nominal_compression_ratio(one.cache) == T / 11
    assert np.abs(one.tokens.kl_teacher_student[:, :11]).max() < 1e-5 < one.tokens.kl_teacher_student[:, 20:-1].mean()


@pytest.mark.parametrize("name", ["tova:9", "h2o:9", "quest:32"])
def test_policies_keep_to_their_budget_and_diverge_from_dense(rng, name):
    model, ids = tiny_model(None, 3, num_layers=2), tokens(rng, B, T)
    policy = policy_of(model.config, name)
    got = online_rows(model, dense_hidden(model, ids), ids, policy)
    live = np.asarray(got.cache.live_counts)
    np.testing.assert_array_equal(live, policy.slot_bounds().max or T)
    np.testing.assert_array_equal(policy.pairs_read(live), policy.budget + (name != "quest:32"))
    assert np.abs(got.tokens.kl_teacher_student[:, : policy.budget]).max() < 1e-5, (
        "pairs are missing before the budget is full"
    )
    assert got.tokens.kl_teacher_student[:, 33:-1].mean() > 1e-4


def test_rows_must_be_a_multiple_of_the_chunk(rng):
    model, ids = tiny_model(None, 3, num_layers=1), tokens(rng, B, 40)
    with pytest.raises(ConfigError, match=r"multiple of.*16, got 40.*32"):
        online_rows(model, jax.numpy.zeros((B, 40, 32)), ids, policy_of(model.config))
