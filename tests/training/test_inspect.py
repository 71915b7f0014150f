"""The inspection before a retrofit: its proxy by brute force, the order of its rules, its files and its refusals."""

import dataclasses
import json
import math
import subprocess
import sys
from functools import partial

import jax
import numpy as np
import pytest
from cases import GOLDEN
from train_runs import ROOT, arguments, run_settings, sharing_functions

import dms_jax
from dms_jax.commands.inspect import FILES, configuration, main
from dms_jax.commands.retrofit import start_mesh
from dms_jax.core.cr_schedule import realised_cr
from dms_jax.core.eviction import live_counts
from dms_jax.errors import ConfigError
from dms_jax.models.layers import unit_rms
from dms_jax.training.eviction_curve import highest_scores, highest_scores_per_head, pairs_to_evict, proxy
from dms_jax.training.fisher_init import gate_information
from dms_jax.training.inspection import RATIOS, curve_of, fitted_heads, held_out_pairs, label_function, reachable_ratios
from dms_jax.training.inspection_report import TOLERATED_KL, Curve, Inspection, Measured
from dms_jax.training.label_pass import place_rows
from dms_jax.training.prepare import prepare
from dms_jax.training.step import EVICT_PROJECTION
from dms_jax.training.validate import first_batches

WINDOW, LENGTH = 6, 64
KEYS = {"length": LENGTH, "dms.window_size": WINDOW, "label_rows": 12, "eval_rows": 5}
KEYS["data.held_out_fraction"] = 0.2


@pytest.fixture
def settings(tmp_path):
    found = run_settings(tmp_path)
    return {key: found[key] for key in ("model", "data", "data.cache_dir", "output")} | KEYS


def prepared(settings, **changes):
    assignments = [part for part in arguments(settings, **changes)[:-2] if part != "--set"]
    with sharing_functions():
        return prepare(start_mesh(configuration(None, assignments, "4x2"), ""))


@pytest.fixture
def costs(rng):
    """The costs and the scores of 3 layers, 2 heads and 2 rows, with heads that differ."""
    cost = np.exp(rng.normal(size=(3, 2, 2 * (LENGTH - 1 - WINDOW))) + 2 * rng.normal(size=(3, 2, 1)))
    return cost.astype(np.float32), (rng.normal(size=cost.shape) - np.log(cost)).astype(np.float32)


@pytest.mark.parametrize("cr", RATIOS)
def test_rules_evict_the_highest_scores_and_add_up_half_of_their_costs(costs, cr):
    """Against sorted lists of Python."""
    cost, score = costs
    number = pairs_to_evict(cr, 2, LENGTH)
    together, alone = highest_scores(score, number), highest_scores_per_head(score, number)
    every = sorted(((s, c) for s, c in zip(score.flat, cost.flat, strict=True)), reverse=True)
    wanted = sum(float(c) for _, c in every[: 6 * number]) / 2 / 128
    assert proxy(cost, together, 128) == pytest.approx(wanted, rel=1e-6)
    wanted = 0.0
    for layer in range(3):
        for head in range(2):
            order = sorted(range(cost.shape[-1]), key=lambda i: -score[layer, head, i])
            wanted += sum(float(cost[layer, head, i]) for i in order[:number]) / 2 / 128
    assert proxy(cost, alone, 128) == pytest.approx(wanted, rel=1e-6)
    assert together.sum() == alone.sum() == 6 * number and (alone.sum(axis=-1) == number).all()
    # A cache that evicts as many pairs holds 1 / cr of the tokens at the end of the rows.
    evict = np.zeros((3, 2, 2, LENGTH), bool)
    evict[..., : LENGTH - 1 - WINDOW] = together.reshape(3, 2, 2, -1)
    assert LENGTH / np.mean(live_counts(evict, WINDOW, 0)) == pytest.approx(cr, rel=0.02)


@pytest.mark.parametrize("cr", RATIOS)
def test_oracle_costs_least_and_equal_budgets_cost_it_more(costs, cr):
    cost, score = costs
    number = pairs_to_evict(cr, 2, LENGTH)
    oracle = proxy(cost, highest_scores(-cost, number), 128)
    equal = proxy(cost, highest_scores_per_head(-cost, number), 128)
    assert oracle < equal <= proxy(cost, highest_scores_per_head(score, number), 128)
    assert oracle < proxy(cost, highest_scores(score, number), 128)


def test_costs_and_scores_of_held_out_rows_by_definition(settings):
    """Costs are `gate_information`, scores are u @ projection; both from the model that a user loads."""
    run = prepared(settings)
    add = label_function(run)
    heads = {shift: np.asarray(head) for shift, head in fitted_heads(run, add).items()}
    state = run.steps.initial_state(run.trainable)
    states = {s: state._replace(trainable=state.trainable | {EVICT_PROJECTION: h}) for s, h in heads.items()}
    batches = first_batches(run, run.held_out, 5)
    pairs = held_out_pairs(run, add, states, batches)
    settled = LENGTH - 1 - WINDOW
    assert pairs.num_rows == 8 and pairs.num_tokens == 8 * LENGTH and pairs.cost.shape[-1] == 8 * settled
    dms = run.steps.math.dms
    model = dms_jax.load(settings["model"], dms=dms)
    information = jax.jit(partial(gate_information, model, seed=0))
    for index, batch in enumerate(batches):
        values, stream = information(tokens=batch.tokens, segment_ids=batch.segment_ids, examples=batch.examples)
        for row in range(4):
            columns = slice((4 * index + row) * settled, (4 * index + row + 1) * settled)
            np.testing.assert_allclose(pairs.cost[..., columns], values[:, row, :, :settled], rtol=1e-3, atol=1e-7)
            u = np.asarray(unit_rms(stream[:, row], model.config.rms_norm_eps))
            for shift in (0, 1):
                logits = dms.evict_logit_scale * np.einsum("ltd,ldk->lkt", u, heads[shift]) - dms.evict_logit_bias
                wanted = logits[..., shift : settled + shift]
                np.testing.assert_allclose(pairs.scores[shift][..., columns], wanted, rtol=1e-3, atol=2e-3)
    first = pairs.first(2, 2 * LENGTH)
    np.testing.assert_array_equal(first.cost, pairs.cost[..., : 2 * settled])

    curve = curve_of(pairs, dms, LENGTH, RATIOS)
    assert (np.array(curve.oracle) < np.minimum(curve.common, curve.equal)).all()
    assert (np.array(curve.oracle) < curve.other_shift).all() and (np.diff(curve.common) > 0).all()
    for cr, common, kept in zip(curve.ratios, curve.common, curve.kept, strict=True):
        assert 1 / kept.mean() == pytest.approx(cr, rel=0.01)
        evicted = highest_scores(pairs.scores[0], pairs_to_evict(cr, 8, LENGTH))
        assert common == pytest.approx(pairs.cost[evicted].sum() / 2 / (8 * LENGTH), rel=1e-5)
    # All heads of a layer decide together: the oracle then knows only what their pairs cost together.
    shared = curve_of(pairs, dataclasses.replace(dms, granularity="layer"), LENGTH, RATIOS)
    assert (np.array(shared.oracle) > curve.oracle).all() and shared.common == curve.common


@pytest.mark.parametrize("shift", [0, 1])
def test_inspected_head_is_the_one_that_a_retrofit_starts_from(settings, shift):
    run = prepared(settings, dms__decision_shift=shift)
    sums, state = run.steps.no_labels(), run.steps.initial_state(run.trainable)
    for start in (0, 4, 8):
        sums = run.steps.add_labels(sums, state, run.frozen, place_rows(run, start, 4))
    wanted = run.steps.fitted_state(state, sums).trainable[EVICT_PROJECTION]
    np.testing.assert_allclose(fitted_heads(run, label_function(run))[shift], wanted, rtol=1e-3, atol=1e-5)


def test_padding_costs_nothing_and_is_not_counted(settings):
    run = prepared(settings, data__rows="packed", length=80)
    batches = first_batches(run, run.held_out, 4)
    states = dict.fromkeys((0, 1), run.steps.initial_state(run.trainable))
    pairs = held_out_pairs(run, label_function(run), states, batches)
    tokens = sum(int((batch.segment_ids >= 0).sum()) for batch in batches)
    assert pairs.num_tokens == tokens < pairs.num_rows * 80
    cost = pairs.cost.reshape(*pairs.cost.shape[:2], pairs.num_rows, -1)
    padding = np.concatenate([batch.segment_ids for batch in batches])[:, : cost.shape[-1]] < 0
    assert padding.any() and (cost[:, :, padding] == 0).all() and (cost[:, :, ~padding] > 0).any()


def test_command_prints_the_curve_and_writes_numbers_and_picture(settings, capsys):
    assert main(arguments(settings)) == 0
    printed = capsys.readouterr()
    output = settings["output"]
    assert sorted(path.name for path in output.iterdir()) == sorted(FILES)
    assert (output / "inspect.png").read_bytes().startswith(b"\x89PNG")
    found = json.loads((output / "inspect.json").read_text())
    assert found["ratios"] == list(RATIOS) and found["versions"]["jax"] == jax.__version__
    assert [m["cr"] for m in found["measured"]] == [2, 4] and found["measured_rows"] == 8
    for m in found["measured"]:
        assert m["realised_cr"] == pytest.approx(m["cr"], rel=0.02) and m["factor"] == m["kl"] / m["proxy"]
        assert f"{m['kl']:.4f}" in printed.out
    for name, values in found["proxy"].items():
        assert len(values) == len(RATIOS) and all(f"{value:.5f}" in printed.out for value in values), name
    for cr, kept in found["kept_per_head"].items():
        assert 1 / np.mean(kept) == pytest.approx(float(cr), rel=0.01)
    assert "labels: 100%" in printed.err and "held-out rows: 100%" in printed.err

    # A second inspection does not replace the first one.
    with pytest.raises(ConfigError, match=f"{output} already contains an inspection.*output=FOLDER"):
        main(arguments(settings))


def test_ratios_that_rows_cannot_realise_are_named(capsys):
    """Rows of 64 tokens with a window of 28 realise at most 64 / 29; with a window of 31, exactly 2."""
    assert reachable_ratios(64, 28) == reachable_ratios(64, 31) == (1.5, 2) and reachable_ratios(64, 7) == RATIOS
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and "CR 2.21" in lines[0] and "CR 3 and 4 and 6 and 8" in lines[0]


@pytest.mark.parametrize(
    "length, window, pattern", [(40, 30, r"CR 1\.29.*dms\.window_size"), (38, 6, r"32 queries.*window_size")]
)
def test_rows_that_are_too_short_are_refused(settings, length, window, pattern):
    with pytest.raises(ConfigError, match=pattern):
        main(arguments(settings, length=length, dms__window_size=window))
    assert not settings["output"].exists() or not list(settings["output"].iterdir())


def inspection(kls: list[float], ratios=(2.0, 4.0, 8.0), measured=((2.0, 10.0), (4.0, 20.0))) -> Inspection:
    """An inspection whose proxies are a tenth, a twentieth and a twentieth of the KLs."""
    proxies = [kl / factor for kl, factor in zip(kls, (10, 20, 20), strict=True)]
    curve = Curve(ratios, proxies, proxies, proxies, proxies, np.ones((3, 25, 2)))
    points = [Measured(cr, cr, factor * 1e-3, 0.1, 0.01, 1e-3) for cr, factor in measured]
    return Inspection("m", 1024, 128, 0, 8, 4, 4096, 2, curve, points)


def test_estimate_is_the_proxy_times_the_measured_factor():
    """At the measured ratios and beyond; the answer is exact where the KL is a power of the ratio."""
    kls = [TOLERATED_KL * (cr / 3) ** 1.7 for cr in (2, 4, 8)]
    found = inspection(kls)
    np.testing.assert_allclose(found.estimated, kls, rtol=1e-12)
    assert found.bearable_cr == pytest.approx(3, rel=1e-12)
    assert "CR 3.0" in found.answer() and f"{found.nominal_cr(3):.2g}" in found.answer()
    assert inspection([1, 1, 1]).bearable_cr is None and "less than CR 2" in inspection([1, 1, 1]).answer()
    assert inspection([0, 0, 0]).bearable_cr == 8 and "at least CR 8" in inspection([0, 0, 0]).answer()
    middle = inspection([1, 1, 1], ratios=(2.0, math.sqrt(8), 4.0))
    assert middle.estimated[1] == pytest.approx(math.sqrt(200) / 20)  # halfway between 10 and 20, in logarithms
    assert all(len(line) <= 120 for line in found.table().splitlines()) and "layers 20-24" in found.table()


@pytest.mark.parametrize("cr", [1.5, 2, 4, 7.5])
def test_nominal_ratio_inverts_the_realised_one(cr):
    assert realised_cr(inspection([1, 1, 1]).nominal_cr(cr), 1024, 128) == pytest.approx(cr, rel=1e-9)


@pytest.mark.parametrize(
    "changes, pattern",
    [
        ({"mode": "full"}, "`mode` .*train"),
        ({"init": "zero"}, "`init`"),
        ({"steps": 3}, "`steps`"),
        ({"optimizer.learning_rate": 1}, "`optimizer`"),
        ({"label_row": 3}, "did you mean label_rows"),
        ({"dms.windw": 3}, "window_size"),
        ({"label_rows": 0}, "label_rows must be"),
        ({"eval_rows": 0}, "eval_rows must be"),
        ({"dms.target_cr": 1}, "dms.target_cr"),
        ({"dms.variant": "borrowed"}, "dms.variant"),
        ({"output": "''"}, "output"),
    ],
)
def test_keys_without_a_meaning_are_refused(settings, changes, pattern):
    with pytest.raises(ConfigError, match=pattern):
        main(arguments(settings | changes))
    assert not settings["output"].exists()


def test_model_that_already_has_a_policy_is_refused(settings):
    with pytest.raises(ConfigError, match="already has a policy.*evaluate"):
        main(arguments(settings, model=GOLDEN / "qwen3_dms_projection_per_head"))
    assert not settings["output"].exists() or not list(settings["output"].iterdir())


def test_data_without_held_out_rows_is_refused(settings):
    with pytest.raises(ConfigError, match="held_out_fraction"):
        main(arguments(settings, data__held_out_fraction=0))


def test_place_that_cannot_be_written_is_refused_before_the_model_is_read(settings, tmp_path):
    output = settings["output"]
    output.mkdir()
    (output / "inspect.png").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match=r"inspect\.png.*symbolic link"):
        main(arguments(settings, model="nowhere"))


def test_refusal_is_one_line_and_exit_code_2():
    command = [sys.executable, "-m", "train.inspect", "--set", "steps=3"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "steps" in done.stderr and not done.stdout


def test_file_of_a_retrofit_is_inspected_without_the_keys_of_training(tmp_path, capsys):
    path = tmp_path / "run.yaml"
    path.write_text("model: m\nmode: full\nsteps: 9\noutput: o\nlength: 64\ndms: {window_size: 8, target_cr: 3}\n")
    config = configuration(str(path), ["length=96"], "2x1")
    assert (config.model, config.length, config.mesh, config.dms.window_size) == ("m", 96, "2x1", 8)
    assert (config.mode, config.output, config.label_rows, config.dms.decision_shift) == (
        "adapter",
        "runs/inspect",
        6,
        0,
    )
    assert capsys.readouterr().err.endswith(": mode, steps, output\n")
    path.write_text("model: m\nstepz: 9\n")
    with pytest.raises(ConfigError, match=r"run\.yaml.*stepz"):
        configuration(str(path), [], None)
    path.write_text("label_rows: 9\n")
    assert configuration(str(path), [], None).label_rows == 9 and not capsys.readouterr().err
