"""The ratio that a threshold holds: it is the target from the first step on, on any mesh, and after a stop."""

import dataclasses
import json
import types
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import tiny_model
from retrofit_cases import CONFIG, DMS, LENGTH, advance, batch, retrofit, run_of, train
from train_runs import arguments, main, remove, run_settings

import dms_jax
from dms_jax.core.cr_schedule import realised_cr
from dms_jax.core.eviction import live_counts
from dms_jax.errors import ConfigError
from dms_jax.training.metrics import read_steps
from dms_jax.training.placement import place
from dms_jax.training.restore import check_checkpoint, checkpoint_metadata, stored
from dms_jax.training.retrofit_config import OptimizerConfig, RetrofitConfig

HELD = RetrofitConfig(
    seed=1,
    length=LENGTH,
    steps=20,
    remat="full",
    dms=DMS,
    init="zero",  # of the head of `retrofit`, which is random
    ratio_control="threshold",
    optimizer=OptimizerConfig(learning_rate=1e-3),
).resolved()


def hard_ratio(run, host) -> float:
    """Tokens / mean live pairs of rows whose decisions are hard and use the threshold of the state."""
    logits = run.steps.scores(run.state, run.frozen, place(host, run.mesh), run.state.threshold)
    live = live_counts(logits > run.state.threshold, DMS.window_size, run.math.dms.decision_shift)
    return LENGTH / float(jnp.mean(live.astype(jnp.float32)))


@pytest.mark.parametrize("shift, target", [(0, 4.0), (1, 1.5)])
def test_realised_ratio_is_the_target_from_the_first_step_on(shift, target):
    dms = dataclasses.replace(DMS, decision_shift=shift, target_cr=target)
    config = dataclasses.replace(HELD, dms=dms, initial_cr=target)
    run = run_of(tiny_model(dms, evict_scale=1.0), None, config, (1, 1))
    wanted, found = realised_cr(target, LENGTH, DMS.window_size), []
    for step in range(20):
        host = batch(step)._replace(loss_mask=np.ones((8, LENGTH), bool))
        metrics = advance(run, host)
        assert float(metrics["cache/target_cr"]) == pytest.approx(target)
        found.append(hard_ratio(run, host))
    # The threshold is that of earlier batches, and a batch has 256 tokens only: 0.062 was seen.
    np.testing.assert_allclose(found, wanted, rtol=0.1)
    assert np.mean(found) == pytest.approx(wanted, rel=0.02)


def test_threshold_is_subtracted_from_the_logits_and_does_not_train():
    """A threshold has the effect of a larger bias, and the metrics say which one a step used."""
    run, biased = retrofit(config=HELD), retrofit(config=HELD, dms=dataclasses.replace(DMS, evict_logit_bias=2.5))
    run.state = run.state._replace(threshold=jnp.float32(1.5))
    ours, theirs = advance(run, batch()), advance(biased, batch())
    assert float(ours.pop("cache/threshold")) == 1.5 and float(theirs.pop("cache/threshold")) == 0.0
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), ours, theirs)
    assert float(run.state.threshold) == pytest.approx(float(biased.state.threshold) + 1.5, abs=1e-5)
    assert float(ours["loss/total"]) == float(ours["loss/distill"])


@pytest.mark.parametrize("mesh, accumulate", [((1, 1), 4), ((2, 2, 2), 2)])
def test_threshold_is_the_same_on_every_mesh_and_for_micro_batches(mesh, accumulate):
    one, other = retrofit(config=HELD), retrofit(mesh, dataclasses.replace(HELD, accumulate=accumulate))
    a, b = train(one, 1, packed=True), train(other, 1, packed=True)
    assert float(other.state.threshold) == pytest.approx(float(one.state.threshold), rel=1e-5)
    assert b[0]["loss/total"] == pytest.approx(a[0]["loss/total"], rel=1e-5)
    assert other.state.threshold.sharding.is_fully_replicated


def test_batch_without_tokens_keeps_the_threshold():
    run = retrofit(config=HELD)
    run.state = run.state._replace(threshold=jnp.float32(0.25))
    advance(run, batch()._replace(loss_mask=np.zeros((8, LENGTH), bool)))
    assert float(run.state.threshold) == 0.25


def test_state_without_a_threshold_is_stored_as_before_there_was_one():
    """Checkpoints of earlier versions hold these fields, and no entry for the threshold."""
    state = retrofit(config=CONFIG).state
    assert state.threshold is None and stored(state)._fields == ("step", "trainable", "opt_state")
    held = retrofit(config=HELD).state
    assert stored(held) is held


@pytest.mark.parametrize("given, changed", [({"init": "zero"}, None), ({}, "init: zero -> fisher")])
def test_checkpoint_of_before_there_was_a_start_to_choose_began_at_zero(given, changed):
    config = RetrofitConfig(**given).resolved()
    data = types.SimpleNamespace(content_hash="d")
    run: Any = types.SimpleNamespace(config=config, output=Path("o"), base_hash="b", data=data)
    metadata = checkpoint_metadata(run)
    old = metadata["config"]
    for key in ("init", "label_rows", "ratio_control"):
        del old[key]
    old |= {"initial_cr": 1.0}
    old["loss"]["compression_weight"], old["optimizer"]["learning_rate"] = 1.0, 1e-4
    old["optimizer"]["warmup_steps"] = 0
    if changed is None:
        check_checkpoint(run, metadata, accept_changes=False)
        return
    with pytest.raises(ConfigError, match=changed):
        check_checkpoint(run, metadata, accept_changes=False)


def test_resumed_run_goes_on_with_its_threshold_and_folds_it_in(tmp_path):
    settings = run_settings(tmp_path) | {"ratio_control": "threshold", "optimizer.learning_rate": 0.05}
    settings |= {"calibration_rows": 0, "steps": 8}
    whole, output = tmp_path / "whole", settings["output"]
    assert main(arguments(settings, output=whole)) == 0
    assert main(arguments(settings)) == 0
    for path in (output / "checkpoints").iterdir():
        if path.name == "8":
            remove(path)
    assert main(arguments(settings, "--resume")) == 0
    lines = [read_steps(folder / "metrics.jsonl") for folder in (whole, output)]
    for key in ("loss/total", "cache/threshold", "cache/evict_fraction"):
        assert [line[key] for line in lines[0]] == [line[key] for line in lines[1]]
    for name in ("model.safetensors", "config.json"):
        assert (whole / "export" / name).read_bytes() == (output / "export" / name).read_bytes()
    # Without calibration, the threshold of the last step is folded in. The head of this run begins with logits of -5.
    bias = dms_jax.load(output / "export").config.dms.evict_logit_bias
    assert bias != 5.0 and np.isfinite(bias)


def test_calibration_moves_a_held_threshold_both_ways(tmp_path):
    settings = run_settings(tmp_path) | {"ratio_control": "threshold", "optimizer.learning_rate": 0.01}
    assert main(arguments(settings, steps=12, dms__target_cr=1.5)) == 0
    wanted = realised_cr(1.5, 48, 6)
    report = json.loads((settings["output"] / "report.json").read_text())
    assert report["held_out/realised_cr"] == pytest.approx(wanted, rel=0.1)
    # The head began with logits of -5, so only a threshold below 0 evicts as much.
    assert dms_jax.load(settings["output"] / "export").config.dms.evict_logit_bias < 5
