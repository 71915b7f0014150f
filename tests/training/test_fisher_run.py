"""Runs that start from a head fitted to labels: with and without steps, stopped in the label pass, on other meshes."""

import json
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
from cases import tokens
from safetensors.numpy import load_file
from train_runs import ROOT, arguments, command, main, run_settings, send_signal, start_two_processes, trace

import dms_jax
from dms_jax.checkpoint import COMMIT_MARKER
from dms_jax.core.cr_schedule import realised_cr
from dms_jax.errors import ConfigError
from dms_jax.hf.head_budget_file import load_head_shares
from dms_jax.training import label_pass
from dms_jax.training.data.rows import Rows
from dms_jax.training.metrics import read_steps
from dms_jax.training.stop_signal import StopSignal


@pytest.fixture
def settings(tmp_path):
    found = run_settings(tmp_path) | {"init": "fisher", "label_rows": 12, "dms.decision_shift": 0, "length": 64}
    return found | {"optimizer.learning_rate": 1e-4, "dms.target_cr": 2}


def same_export(one: Path, other: Path) -> None:
    for name in ("model.safetensors", "config.json"):
        assert (one / "export" / name).read_bytes() == (other / "export" / name).read_bytes()


def label_checkpoints(output: Path) -> list[int]:
    """Return the numbers of rows of the complete checkpoints of a label pass."""
    folder = output / "checkpoints" / "labels"
    return [int(path.parent.name) for path in folder.glob(f"*/{COMMIT_MARKER}") if path.parent.name.isdigit()]


def test_run_without_a_step_exports_the_fitted_head(settings, capsys):
    """The export is the dense model with Model-Optimizer's two tensors per layer, at the target ratio."""
    settings |= {"steps": 0}
    assert main(arguments(settings)) == 0
    output = settings["output"]
    printed = capsys.readouterr()
    assert "streaming_llm" in printed.out and "infer.evaluate" in printed.out
    assert read_steps(output / "metrics.jsonl") == [] and not (output / "training.png").exists()
    report = json.loads((output / "report.json").read_text())
    assert report["held_out/realised_cr"] == pytest.approx(realised_cr(2, 64, 6), rel=0.15)
    # The arm of exact budgets has as many live tokens, and the export says how to divide them among heads.
    assert "\ndms_budget" in printed.out and report["dms_budget/live_tokens"] == round(report["held_out/live_tokens"])
    exported_config = dms_jax.load(output / "export").config
    shares = load_head_shares(output / "export", exported_config)
    pairs = round(report["held_out/live_tokens"])
    assert np.mean(shares.budgets(pairs, 64, 6)) == pairs

    base, exported = load_file(settings["model"] / "model.safetensors"), load_file(output / "export/model.safetensors")
    added = [name.removeprefix("model.layers.") for name in exported if name not in base]
    layers = dms_jax.load(settings["model"]).config.num_layers
    names = ("dms_proj_alpha_norm.weight", "dms_proj_alpha.weight")
    assert sorted(added) == sorted(f"{i}.self_attn.{name}" for i in range(layers) for name in names)
    model = dms_jax.load(output / "export")
    head = model.layers.attention
    np.testing.assert_array_equal(head.evict_norm[...], np.ones_like(head.evict_norm[...]))
    assert np.all(np.any(np.asarray(head.evict_proj[...]) != 0, axis=1))
    ids = tokens(np.random.default_rng(5), 2, 40)
    np.testing.assert_array_equal(model.dense(ids), dms_jax.load(settings["model"]).dense(ids))
    # The finished run can be resumed, and takes no labels again.
    assert main(arguments(settings, "--resume")) == 0
    assert "resumed at step 0 of 0" in capsys.readouterr().err and not label_checkpoints(output)


def test_rows_without_a_pair_to_label_are_refused(settings):
    """In rows of 38 tokens, 31 queries come after the window of 6 of the first pair."""
    with pytest.raises(ConfigError, match="32 queries.*window_size"):
        main(arguments(settings, length=38))
    assert not (settings["output"] / "export").exists()


def test_dry_run_names_the_label_pass_and_its_memory(settings, capsys):
    assert main(arguments(settings, "--dry-run")) == 0
    printed = capsys.readouterr()
    assert all(phrase in printed.out for phrase in ("12 rows", "compiled label pass", "compiled step"))
    assert "dms.decision_shift" not in printed.err
    # On request, the next token decides, and a note says what that costs.
    assert main(arguments(settings, "--dry-run", init="zero", dms__decision_shift=1)) == 0
    printed = capsys.readouterr()
    assert "label pass" not in printed.out and not settings["output"].exists()
    assert printed.err.count("note: dms.decision_shift=1") == 1


def test_steps_after_the_fit_hold_the_target(settings):
    assert main(arguments(settings)) == 0
    steps = read_steps(settings["output"] / "metrics.jsonl")
    assert [line["step"] for line in steps] == list(range(6))
    for line in steps[1:]:
        assert line["cache/nominal_cr"] == pytest.approx(2, rel=0.15) and line["cache/target_cr"] == 2
    assert not (settings["output"] / "checkpoints" / "labels").exists()


def test_killed_label_pass_resumes_bit_for_bit(settings, tmp_path, capsys):
    settings |= {"label_rows": 64}
    assert main(arguments(settings, output=tmp_path / "whole")) == 0
    process = subprocess.Popen(command(settings), cwd=ROOT, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    while process.poll() is None and not label_checkpoints(settings["output"]):
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    (saved,) = label_checkpoints(settings["output"])
    capsys.readouterr()
    assert main(arguments(settings, "--resume")) == 0
    assert f"resumed at row {saved} of the 64 label rows" in capsys.readouterr().err
    assert trace(tmp_path / "whole") == trace(settings["output"])
    same_export(tmp_path / "whole", settings["output"])


def test_first_step_has_the_target_ratio(settings):
    """The head alone has another: its logits are not normally distributed."""
    assert main(arguments(settings, steps=1)) == 0
    (step,) = read_steps(settings["output"] / "metrics.jsonl")
    assert step["cache/threshold"] != 0
    # Noise flips some decisions, and the rows of the step are not those of the threshold.
    assert step["cache/nominal_cr"] == pytest.approx(2, rel=0.15)


@pytest.mark.parametrize("after", [8, 12])
def test_run_stopped_after_any_label_row_is_the_same(settings, tmp_path, monkeypatch, capsys, after):
    """Also after the last row, and when the checkpoint of step 0 is not yet there."""
    assert main(arguments(settings, output=tmp_path / "whole")) == 0
    send_signal(monkeypatch, signal.SIGTERM, step=-(-after // 8) - 1)
    assert main(arguments(settings)) == 128 + signal.SIGTERM
    stderr = capsys.readouterr().err
    assert f"SIGTERM: saved at row {after} of the 12" in stderr and "--resume" in stderr
    assert label_checkpoints(settings["output"]) == [after]
    assert main(arguments(settings, "--resume")) == 0
    assert f"resumed at row {after} of the 12 label rows" in capsys.readouterr().err
    assert trace(tmp_path / "whole") == trace(settings["output"])
    same_export(tmp_path / "whole", settings["output"])


def test_labels_are_the_same_on_another_mesh_and_after_a_change_of_mesh(settings, tmp_path, monkeypatch):
    """12 rows are 1.5 batches of 8, so the last batch has padding."""
    settings |= {"steps": 0, "calibration_rows": 0}
    assert main(arguments(settings, output=tmp_path / "one")) == 0
    monkeypatch.setattr(StopSignal, "agreed", lambda self: signal.SIGINT)
    assert main(arguments(settings, mesh="2x2x2")) == 128 + signal.SIGINT
    monkeypatch.undo()
    assert main(arguments(settings, "--resume", mesh="4x2")) == 0
    one, other = (dms_jax.load(folder / "export").layers.attention for folder in (tmp_path / "one", settings["output"]))
    scale = np.abs(one.evict_proj[...]).max()
    # The solution of the ridge regression magnifies the rounding of the sums by its condition, which is some hundreds.
    np.testing.assert_allclose(other.evict_proj[...], one.evict_proj[...], atol=1e-4 * scale)


@pytest.mark.slow  # one process on other meshes: the test above
def test_two_processes_fit_the_head_of_one(settings, tmp_path):
    settings |= {"steps": 0, "calibration_rows": 0}
    assert main(arguments(settings, output=tmp_path / "one")) == 0
    both = start_two_processes(settings, subprocess.DEVNULL)
    errors = [process.communicate(timeout=400)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], errors[0][-2000:] + errors[1][-2000:]
    one, other = (dms_jax.load(folder / "export").layers.attention for folder in (tmp_path / "one", settings["output"]))
    scale = np.abs(one.evict_proj[...]).max()
    np.testing.assert_allclose(other.evict_proj[...], one.evict_proj[...], atol=1e-4 * scale)


def test_label_rows_are_not_the_first_training_rows():
    rows = Rows(np.arange(8000), np.arange(0, 8000, 10), np.full(800, 10), 10, "contiguous")
    training = {int(row[0]) for row in rows.batch(0, 24, 0).tokens}
    labels = {int(row[0]) for row in rows.batch(0, 24, label_pass.ORDER_SEED).tokens}
    assert len(training) == len(labels) == 24 and len(training & labels) < 4


def test_resumed_label_pass_must_have_the_same_settings(settings, monkeypatch):
    monkeypatch.setattr(StopSignal, "agreed", lambda self: signal.SIGINT)
    assert main(arguments(settings)) == 128 + signal.SIGINT
    with pytest.raises(dms_jax.ConfigError, match=r"label_rows: 12 -> 16.*--accept-changes"):
        main(arguments(settings, "--resume", label_rows=16))
