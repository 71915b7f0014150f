"""Budgets of heads: their sums, the common threshold behind them, and what they keep."""

import numpy as np
import pytest
from cases import tiny_model, tokens

import dms_jax
from dms_jax.config import DMSConfig
from dms_jax.engine.head_budgets import head_budgets, head_shares, shares_of
from dms_jax.hf.head_budget_file import load_head_shares, save_head_shares
from dms_jax.policies import BudgetedEviction
from dms_jax.policies.head_shares import HeadShares

DMS = DMSConfig(window_size=4, evict_logit_bias=0.0)


@pytest.mark.parametrize("pairs", [5, 6, 20, 59, 60, 90])
def test_budgets_have_the_mean_and_lie_between_window_and_row(rng, pairs):
    model = tiny_model(DMS, 3)
    table = np.array(head_budgets(model, tokens(rng, 2, 60), pairs))
    assert table.shape == (3, 4) and table.sum() == pairs * table.size
    assert table.min() >= 5 and table.max() <= max(60, pairs)
    assert (table.std() > 1) == (5 < pairs < 60)


def test_first_pass_gives_each_head_its_pairs_below_one_common_threshold(rng):
    model, ids = tiny_model(DMS, 3), tokens(rng, 3, 60)
    table = np.array(head_budgets(model, ids, 20, passes=1))
    logits = np.asarray(model.hard_scores(ids, None, np.inf))[..., 1:56]  # token t + 1 decides about pair t
    threshold = np.sort(logits.ravel())[15 * 12 * 3 - 1]
    kept = (logits <= threshold).sum(-1).mean(axis=1)
    assert abs(5 + kept - table).max() < 1


def test_later_passes_measure_logits_under_the_budgets(rng):
    """The budgets are a fixed point of measuring: the logits under them give the same budgets again, nearly."""
    model, ids = tiny_model(DMS, 3), tokens(rng, 3, 60)

    def change(passes):
        one, next_ = (np.array(head_budgets(model, ids, 12, passes=n)) for n in (passes, passes + 1))
        return np.abs(one - next_).sum()

    assert change(4) < change(1)


def test_untrained_head_shares_equally(rng):
    model = tiny_model(DMS, 3, evict_scale=0.0)
    assert head_budgets(model, tokens(rng, 2, 60), 13) == ((13,) * 4,) * 3


def test_budgets_serve_a_cache_at_their_mean(rng):
    model, ids = tiny_model(DMS, 3), tokens(rng, 4, 60)
    lazy = BudgetedEviction(DMS, 20, head_budgets(model, ids[:2], 20))
    config = dms_jax.GenerationConfig(max_new_tokens=4, stop_ids=(), policy=lazy)
    out = dms_jax.generate(model, ids[2:], config)
    np.testing.assert_array_equal(out.live_pairs, [20, 20])


def test_shares_between_two_means_are_interpolated(rng):
    model, ids = tiny_model(DMS, 3), tokens(rng, 2, 60)
    shares = head_shares(model, ids, (0.25, 0.5))
    np.testing.assert_allclose(shares.share.mean(axis=(1, 2)), [0, 0.25, 0.5, 1], atol=1e-2)
    for pairs, length in ((5, 60), (30, 60), (100, 245), (11, 12), (300, 245)):
        table = np.array(shares.budgets(pairs, length, 4))
        assert table.sum() == pairs * table.size and table.min() >= 5 and table.max() <= max(length, pairs)
    measured = HeadShares.between_edges(np.array([[[0.2, 0.6]]]))
    assert measured.budgets(10 + 20, 110, 9) == ((10 + 10, 10 + 30),)  # half of the way to the mean of 0.4
    assert measured.budgets(10 + 70, 110, 9) == ((10 + 60, 10 + 80),)


def test_rows_without_settled_pairs_and_models_without_a_head_are_refused(rng):
    with pytest.raises(dms_jax.ConfigError, match=r"more than window_size \+ 1 = 5"):
        head_shares(tiny_model(DMS), tokens(rng, 1, 5), (0.5,))
    with pytest.raises(dms_jax.ConfigError, match="window_size"):
        head_budgets(tiny_model(DMS), tokens(rng, 1, 50), 4)
    with pytest.raises(dms_jax.ConfigError, match="head_budgets .*dms=DMSConfig"):
        head_budgets(tiny_model(None), tokens(rng, 1, 50), 9)


def test_folder_brings_budgets_for_any_mean(rng, tmp_path):
    made = tiny_model(DMS, 3)
    dms_jax.save(made, tmp_path / "model")
    model, ids = dms_jax.load(tmp_path / "model"), tokens(rng, 2, 60)
    config = dms_jax.GenerationConfig(max_new_tokens=4, stop_ids=(), policy="dms_budget:20")
    live = lambda: np.asarray(dms_jax.generate(model, ids, config).cache.live_counts)
    assert (live() == 20).all()
    shares = head_shares(model, ids, (0.25, 0.5))
    save_head_shares(tmp_path / "model", shares, 4)
    loaded = load_head_shares(tmp_path / "model", model.config)
    np.testing.assert_allclose(loaded.share, shares.share, atol=1e-6)
    want = np.array(shares.budgets(20, 64, 4))
    np.testing.assert_array_equal(live(), np.broadcast_to(want[:, None], (3, 2, 4)))
    assert want.std() > 1 and live().mean() == 20
    equal = dms_jax.GenerationConfig(max_new_tokens=4, stop_ids=(), policy=BudgetedEviction(DMS, 20))
    assert (np.asarray(dms_jax.generate(model, ids, equal).cache.live_counts) == 20).all()


def test_overwritten_folder_does_not_keep_budgets_of_other_weights(rng, tmp_path):
    model = tiny_model(DMS, 3)
    dms_jax.save(model, tmp_path / "model", head_shares=head_shares(model, tokens(rng, 1, 60), (0.25, 0.5)))
    assert load_head_shares(tmp_path / "model", model.config) is not None
    (tmp_path / "model" / "notes.txt").write_text("mine")
    dms_jax.save(tiny_model(DMS, 4), tmp_path / "model", overwrite=True)
    assert load_head_shares(tmp_path / "model", model.config) is None
    assert (tmp_path / "model" / "notes.txt").read_text() == "mine"


def test_shares_of_given_logits_follow_one_common_threshold():
    """Of eight pairs of two heads, the lowest two are the first head's, and the lowest four are divided 3 to 1."""
    score = np.array([[0.0, 1.0, 3.0, 9.0], [2.0, 5.0, 6.0, 7.0]], np.float32)[None, None]
    shares = shares_of(score, (0.25, 0.5))
    np.testing.assert_array_equal(shares.share[1:-1, 0], [[0.5, 0.0], [0.75, 0.25]])


@pytest.mark.parametrize(
    "content",
    [
        '{"window_size": 9, "shares": [[[0.1, 0.2]]]}',
        '{"shares": [[[0.1, 0.2]]]}',
        '{"window_size": 4, "shares": [[[0.1, 0.2, 0.3]]]}',
        '{"window_size": 4, "shares": []}',
        '{"window_size": 4, "shares": [[[0.1, 1.2]]]}',
        '{"window_size": 4, "shares": [[[0.4, 0.4]], [[0.1, 0.2]]]}',
        '{"window_size": 4, "shares": [[[0.4, "x"]]]}',
        '{"window_size": 4, "shares": [[[0.4, NaN]]]}',
        '{"window_size": 4, "shares": [[[0.4], [0.1, 0.2]]]}',
    ],
)
def test_damaged_file_of_shares_is_refused(tmp_path, content):
    config = tiny_model(DMS, num_layers=1, num_kv_heads=2).config
    (tmp_path / "head_budgets.json").write_text(content)
    with pytest.raises(dms_jax.ConfigError, match=r"head_budgets\.json") as why:
        load_head_shares(tmp_path, config)
    assert "\n" not in str(why.value)
