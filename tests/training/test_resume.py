"""Runs that are resumed on other meshes, stopped in several processes or killed; and the dry run."""

import dataclasses
import json
import signal
import subprocess
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from train_runs import ROOT, arguments, command, main, remove, run_settings, start_two_processes, trace, wait_for_step

from benchmarks import chaos
from dms_jax.errors import ConfigError
from dms_jax.training.data.token_store import DataConfig
from dms_jax.training.metrics import read_steps
from dms_jax.training.restore import check_checkpoint, checkpoint_metadata
from dms_jax.training.retrofit_config import RetrofitConfig


@pytest.fixture
def settings(tmp_path):
    return run_settings(tmp_path)


def run_on_one_device(settings, *extra) -> str:
    """Run the command in a process of its own, because this one has eight devices. Returns its stderr."""
    done = subprocess.run(command(settings, *extra, mesh="1x1"), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stderr


@pytest.mark.parametrize("mode", ["adapter", pytest.param("full", marks=pytest.mark.slow)])
def test_run_over_three_meshes_equals_the_run_on_one_device(settings, tmp_path, capsys, mode):
    """Meshes 8x1, 4x2 and 1x1, each resumed from the checkpoint of the one before without any other option."""
    settings |= {"mode": mode, "keep": 10}
    whole, moved = settings | {"output": tmp_path / "whole"}, settings | {"output": tmp_path / "moved"}
    run_on_one_device(whole)
    for mesh, first in (("8x1", 0), ("4x2", 2), ("1x1", 4)):
        if mesh == "1x1":
            stderr = run_on_one_device(moved, "--resume")
        else:
            assert main(arguments(moved, "--resume", mesh=mesh)) == 0
            stderr = capsys.readouterr().err
        assert first == 0 or f"resumed at step {first} of 6" in stderr, stderr[-2000:]
        for path in (moved["output"] / "checkpoints").iterdir():  # as if the run had been stopped two steps later
            if int(path.name) > first + 2 and mesh != "1x1":
                remove(path)
    keys = "loss/total", "loss/distill", "loss/compression"
    one, three = (read_steps(run["output"] / "metrics.jsonl") for run in (whole, moved))
    assert [line["step"] for line in one] == [line["step"] for line in three] == list(range(6))
    for a, b in zip(one, three, strict=True):
        np.testing.assert_allclose([b[key] for key in keys], [a[key] for key in keys], rtol=1e-5, atol=1e-6)
        # The norm sums products of both signs in fp32, which depends on their order: 3e-5 was seen.
        np.testing.assert_allclose(b["optim/grad_norm"], a["optim/grad_norm"], rtol=2e-4)


def test_signal_to_one_process_stops_both_at_the_same_step(settings):
    settings |= {"steps": 400, "save_every": 1000}
    both = start_two_processes(settings, subprocess.DEVNULL)
    wait_for_step(both[0], settings["output"] / "metrics.jsonl", 3)
    both[1].send_signal(signal.SIGINT)
    errors = [process.communicate(timeout=200)[1] for process in both]
    assert [process.returncode for process in both] == [128 + signal.SIGINT] * 2, errors
    (saved,) = [int(p.name) for p in (settings["output"] / "checkpoints").iterdir() if p.name.isdigit()]
    assert "saved at step" in errors[0] and saved == max(trace(settings["output"])) + 1


@pytest.mark.slow  # one kill, bit for bit: test_retrofit.py
def test_few_kills_change_nothing(tmp_path):
    found = chaos.chaos(tmp_path, kills=2, seed=3, steps=12, mode="adapter")
    assert found["kills"] == 2 and found["wrong"] == [] and found["most_steps_lost"] <= chaos.SAVE_EVERY + 1


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["adapter", "full", "borrowed"])
def test_thirty_kills_change_nothing(tmp_path, mode):
    found = chaos.chaos(tmp_path, kills=30, seed=0, steps=120, mode=mode)
    assert found["kills"] == 30 and found["wrong"] == [] and min(found["by_signal"].values()) >= 5, found


def test_chaos_reports_faults(tmp_path):
    assert (
        "exit code 1" in chaos.faults_of(1, signal.SIGTERM, False, "")[0]
        and chaos.faults_of(-9, signal.SIGKILL, False, "") == []
    )
    assert "traceback" in chaos.faults_of(143, signal.SIGTERM, False, "Traceback (most recent call last)")[0]
    assert "damaged" in chaos.faults_of(0, signal.SIGTERM, True, "resumed at step 3 of 6; skipped checkpoint 6: cut")[0]
    for name, loss in (("a", 1.0), ("b", 1.001)):
        (tmp_path / name).mkdir()
        line = {
            "step": 0,
            "loss/total": loss,
            "loss/distill": 1,
            "loss/compression": 1,
            "optim/grad_norm": 1,
            "cache/evict_fraction": 0,
        }
        (tmp_path / name / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    (tmp_path / "b" / "metrics.jsonl").open("a").write(json.dumps(line) + "\n")
    assert chaos.differences(tmp_path / "a", tmp_path / "b") == ["b logs a step twice"]


def test_dry_run_prints_its_plan_and_writes_nothing(settings, capsys):
    settings |= {"steps": 40, "optimizer.warmup_steps": 4}
    assert main(arguments(settings, "--dry-run")) == 0
    out = capsys.readouterr().out
    assert not Path(settings["output"]).exists()
    for phrase in (
        "attention.evict_proj",
        "P(None, 'data', 'model')",
        "MiB",
        "8 rows of 48 tokens",
        "checkpoint every 2",
        "memory of the compiled step",
    ):
        assert phrase in out, phrase
    table = {
        int(cells[0]): cells[1:] for line in out.splitlines() if len(cells := line.split()) == 3 and cells[0].isdigit()
    }
    # The target is reached after nine tenths of the steps.
    assert float(table[0][0]) == 1.0 and float(table[36][0]) == 3.0
    assert float(table[0][1]) == pytest.approx(0.001 / 5, rel=1e-2)


def test_changed_data_and_nested_keys_are_listed(settings, tmp_path):
    assert main(arguments(settings)) == 0
    other = tmp_path / "other.npy"
    np.save(other, np.zeros((60, 70), np.int32))
    with pytest.raises(
        ConfigError,
        match=r"data\.paths: .*ids\.npy.* -> .*other\.npy.*; optimizer\.b2: 0\.95 -> 0\.9\).*--accept-changes",
    ) as refusal:
        main(arguments(settings, "--resume", data=other, optimizer__b2=0.9))
    assert "\n" not in str(refusal.value)


def test_other_text_under_the_same_path_is_refused(settings):
    assert main(arguments(settings)) == 0
    np.save(settings["data"], np.ones((60, 70), np.int32))
    with pytest.raises(ConfigError, match="other data.*--accept-changes"):
        main(arguments(settings, "--resume"))


def test_key_that_is_newer_than_a_checkpoint_had_its_default():
    data = types.SimpleNamespace(content_hash="d")
    run: Any = types.SimpleNamespace(config=RetrofitConfig(), output=Path("o"), base_hash="b", data=data)
    metadata = checkpoint_metadata(run)
    del metadata["config"]["data"]["allow_control_tokens"]
    check_checkpoint(run, metadata, accept_changes=False)
    run.config = dataclasses.replace(run.config, data=DataConfig(allow_control_tokens="all"))
    with pytest.raises(ConfigError, match=r"settings \(data.allow_control_tokens: text -> all\)"):
        check_checkpoint(run, metadata, accept_changes=False)
