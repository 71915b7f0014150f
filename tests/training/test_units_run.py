"""Runs of the training command whose evict head has hidden units: fit, resume, meshes, disk, and the first step."""

import dataclasses
import json
import signal
import subprocess

import jax
import numpy as np
import pytest
from cases import tiny_model, tokens
from flax import nnx
from retrofit_cases import CONFIG, DMS, advance, batch, run_of
from safetensors.numpy import load_file
from train_runs import arguments, main, run_settings, send_signal, start_two_processes

import dms_jax
from dms_jax.config import DMSConfig
from dms_jax.errors import ConfigError
from dms_jax.training.label_file import label_file_bytes
from dms_jax.training.metrics import read_steps
from dms_jax.training.prepare import trained_policy
from dms_jax.training.retrofit_config import read_config

PARTS = ("evict_units_in", "evict_units_bias", "evict_units_out")


@pytest.fixture
def settings(tmp_path):
    found = run_settings(tmp_path) | {"init": "fisher", "label_rows": 12, "dms.decision_shift": 0, "length": 64}
    return found | {"optimizer.learning_rate": 1e-4, "dms.target_cr": 2, "dms.head_units": 6, "steps": 0}


def tensors(output) -> dict[str, np.ndarray]:
    return load_file(output / "export" / "model.safetensors")


def test_run_without_a_step_is_a_complete_retrofit(settings, capsys):
    """The export and the adapter hold the fitted units beside a linear head."""
    assert main(arguments(settings)) == 0
    printed, output = capsys.readouterr(), settings["output"]
    assert "hidden units" in printed.err and "streaming_llm" in printed.out
    assert not (output / "checkpoints" / "labels").exists()
    assert json.loads((output / "export" / "config.json").read_text())["dms_head_units"] == 6
    model = dms_jax.load(output / "export")
    head, layers = model.layers.attention, model.config.num_layers
    assert all(np.any(np.asarray(getattr(head, part)[...])) for part in PARTS)
    base = load_file(settings["model"] / "model.safetensors")
    assert len([name for name in tensors(output) if name not in base]) == 5 * layers
    ids = tokens(np.random.default_rng(5), 2, 40)
    np.testing.assert_array_equal(model.dense(ids), dms_jax.load(settings["model"]).dense(ids))
    adapted = dms_jax.load_adapter(dms_jax.load(settings["model"]), output / "adapter.safetensors")
    np.testing.assert_array_equal(adapted.hard(ids)[1], model.hard(ids)[1])
    np.testing.assert_array_equal(adapted.hard_scores(ids), model.hard_scores(ids))
    # The logits have the wanted spread, and their threshold realises the target.
    report = json.loads((output / "report.json").read_text())
    assert report["held_out/realised_cr"] == pytest.approx(64 / 35, rel=0.15)


def test_run_stopped_in_the_labels_or_in_the_fit_is_the_same(settings, tmp_path, monkeypatch, capsys):
    assert main(arguments(settings, output=tmp_path / "whole")) == 0
    send_signal(monkeypatch, signal.SIGTERM, step=0)
    assert main(arguments(settings)) == 128 + signal.SIGTERM
    (kept,) = (settings["output"] / "checkpoints/labels").glob("pairs-*")
    config = dms_jax.load(settings["model"], dms=DMSConfig(window_size=6, head_units=6)).config
    assert kept.stat().st_size == label_file_bytes(config, 8, 64), "the first batch is in the first rows"
    monkeypatch.undo()
    send_signal(monkeypatch, signal.SIGTERM, step=2)  # after the other batch, and before the second layer
    assert main(arguments(settings, "--resume")) == 128 + signal.SIGTERM
    err = capsys.readouterr().err
    assert "resumed at row 8 of the 12 label rows" in err and "labels are saved" in err
    monkeypatch.undo()
    assert main(arguments(settings, "--resume")) == 0
    assert "resumed at row 12 of the 12 label rows" in capsys.readouterr().err
    for name in ("model.safetensors", "config.json"):
        whole, ours = (folder / "export" / name for folder in (tmp_path / "whole", settings["output"]))
        assert whole.read_bytes() == ours.read_bytes()


def test_label_pass_without_its_rows_begins_again(settings, tmp_path, monkeypatch, capsys):
    assert main(arguments(settings, output=tmp_path / "whole")) == 0
    send_signal(monkeypatch, signal.SIGTERM, step=0)
    assert main(arguments(settings)) == 128 + signal.SIGTERM
    monkeypatch.undo()
    (kept,) = (settings["output"] / "checkpoints/labels").glob("pairs-*")
    kept.write_bytes(kept.read_bytes()[:-1])
    assert main(arguments(settings, "--resume")) == 0
    assert "begin at row 0" in capsys.readouterr().err
    for name, value in tensors(tmp_path / "whole").items():
        np.testing.assert_array_equal(tensors(settings["output"])[name], value, err_msg=name)


def test_first_step_from_zero_is_that_of_a_linear_head():
    config = dataclasses.replace(CONFIG, steps=10)
    base = tiny_model(None, 3, num_layers=1)
    metrics, changed = [], []
    for units in (0, 6):
        dms = dataclasses.replace(DMS, head_units=units)
        fresh = type(base)(dataclasses.replace(base.config, dms=dms), rngs=nnx.Rngs(3))
        run = run_of(fresh, None, config, (1, 1))
        before = {name: np.asarray(value) for name, value in run.state.trainable.items()}
        metrics.append(jax.tree.map(np.asarray, advance(run, batch())))
        changed.append(
            {n.rpartition(".")[2] for n, v in run.state.trainable.items() if not np.array_equal(v, before[n])}
        )
    for name, value in metrics[0].items():
        if name != "optim/grad_norm":  # that of the units is added
            np.testing.assert_array_equal(metrics[1][name], value, err_msg=name)
    assert changed[0] == {"evict_proj"} and changed[1] == {"evict_proj", "evict_units_out"}


@pytest.mark.slow  # gradients of all parts: tests/training/test_sharding_table.py
def test_steps_after_the_fit_train_both_parts(settings):
    settings |= {"steps": 2, "optimizer.learning_rate": 1e-2}
    assert main(arguments(settings, output=settings["output"].parent / "fit", steps=0)) == 0
    assert main(arguments(settings)) == 0
    assert len(read_steps(settings["output"] / "metrics.jsonl")) == 2
    fit, trained = tensors(settings["output"].parent / "fit"), tensors(settings["output"])
    moved = {name.rpartition("self_attn.")[2] for name in fit if not np.array_equal(fit[name], trained[name])}
    assert moved == {
        "dms_proj_alpha.weight",
        "dms_proj_alpha_norm.weight",
        "dms_proj_alpha_units_in.weight",
        "dms_proj_alpha_units_in.bias",
        "dms_proj_alpha_units_out.weight",
    }


def test_fitted_units_are_the_same_on_another_mesh(settings, tmp_path):
    settings |= {"calibration_rows": 0}
    assert main(arguments(settings, output=tmp_path / "one")) == 0
    assert main(arguments(settings, mesh="2x2x2")) == 0
    ids = tokens(np.random.default_rng(5), 2, 60)
    one, other = (dms_jax.load(folder / "export").hard_scores(ids) for folder in (tmp_path / "one", settings["output"]))
    # Rounding of features and labels, in fp16 and fp32, moves the fit by this much of the spread of the logits, 4.
    np.testing.assert_allclose(other, one, atol=0.02)


@pytest.mark.slow  # one process on other meshes: the test above
def test_two_processes_fit_the_units_of_one(settings, tmp_path):
    settings |= {"calibration_rows": 0}
    assert main(arguments(settings, output=tmp_path / "one")) == 0
    both = start_two_processes(settings, subprocess.DEVNULL)
    errors = [process.communicate(timeout=400)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], errors[0][-2000:] + errors[1][-2000:]
    ids = tokens(np.random.default_rng(5), 2, 60)
    one, other = (dms_jax.load(folder / "export").hard_scores(ids) for folder in (tmp_path / "one", settings["output"]))
    np.testing.assert_allclose(other, one, atol=0.02)


def test_dry_run_names_the_units_and_their_disk(settings, capsys):
    assert main(arguments(settings, "--dry-run")) == 0
    printed = capsys.readouterr().out
    assert "6 hidden units" in printed and "GiB of disk" in printed and "evict_units_in" in printed
    assert not settings["output"].exists()


def test_head_of_another_number_of_units_is_refused_and_that_of_the_model_goes_on():
    base = tiny_model(DMSConfig(window_size=6, head_units=6)).config
    with pytest.raises(ConfigError, match=r"dms.head_units must be 6, as in the policy that FOLDER.*got 7") as refusal:
        trained_policy(read_config(None, ["dms.head_units=7"], None), base, "FOLDER")
    assert "\n" not in str(refusal.value)
    for given in ([], ["dms.head_units=6"]):
        assert trained_policy(read_config(None, given, None), base, "FOLDER").head_units == 6
    linear = tiny_model(DMSConfig(window_size=6)).config
    with pytest.raises(ConfigError, match=r"dms.head_units must be 0, .*got 7"):
        trained_policy(read_config(None, ["dms.head_units=7"], None), linear, "FOLDER")
