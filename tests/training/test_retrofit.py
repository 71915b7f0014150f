"""The retrofit command: a whole run, resuming after every kind of stop, several processes, and wrong input."""

import contextlib
import json
import os
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest
from cases import tokens
from train_runs import (
    GOLDEN,
    ROOT,
    arguments,
    command,
    main,
    remove,
    run_settings,
    send_signal,
    start_two_processes,
    trace,
    wait_for_step,
)

import dms_jax
from dms_jax.commands import retrofit
from dms_jax.errors import ConfigError
from dms_jax.training.loop import StepLog
from dms_jax.training.metrics import MetricsFile, read_steps
from dms_jax.training.step import TrainState
from dms_jax.training.step_functions import OnMesh


@pytest.fixture
def settings(tmp_path):
    return run_settings(tmp_path)


def refuses(argv, *fragments):
    with pytest.raises(ConfigError) as refusal:
        main(argv)
    assert "\n" not in str(refusal.value)
    for fragment in fragments:
        assert fragment in str(refusal.value)


def test_run_leaves_metrics_plots_report_and_export(settings, tmp_path, capsys):
    assert main(arguments(settings, eval_every=3)) == 0
    output = tmp_path / "run"
    printed = capsys.readouterr()
    assert (
        "streaming_llm" in printed.out
        and "vs dense" in printed.out
        and "infer.evaluate" in printed.out
        and printed.err.count("held out,") >= 1
    )
    for name in ("training.png", "kept_fraction.png"):
        assert (output / name).read_bytes().startswith(b"\x89PNG")
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert {"jax", "device", "commit", "base_hash", "data_hash"} <= lines[0]["header"].keys() and lines[0]["config"][
        "steps"
    ] == 6
    steps = read_steps(output / "metrics.jsonl")
    assert [line["step"] for line in steps] == list(range(6))
    for line in steps:
        assert line["loss/total"] == pytest.approx(line["loss/distill"] + line["loss/compression"], rel=1e-5)
    assert [line["step"] for line in lines if "held_out/kl_mean" in line] == [2, 6]
    report = json.loads((output / "report.json").read_text())

    base, exported = dms_jax.load(settings["model"]), dms_jax.load(output / "export")
    ids = tokens(np.random.default_rng(5), 2, 40)
    # An adapter leaves the base unchanged, bit for bit.
    np.testing.assert_array_equal(exported.dense(ids), base.dense(ids))
    assert exported.config.dms.window_size == 6 and report["held_out/perplexity"] > 0
    adapted = dms_jax.load_adapter(base, output / "adapter.safetensors")
    np.testing.assert_array_equal(adapted.hard(ids)[0], exported.hard(ids)[0])
    assert np.any(np.asarray(exported.layers.attention.evict_proj[...]) != 0)


def test_overshooting_run_exports_a_threshold_that_meets_the_target(optimized, settings, capsys):
    assert main(arguments(settings, steps=20, optimizer__learning_rate=0.05, dms__target_cr=1.5)) == 0
    wanted, report = 48 / (48 - (1 - 1 / 1.5) * (47 - 6)), json.loads((settings["output"] / "report.json").read_text())
    exported = dms_jax.load(settings["output"] / "export")
    assert exported.config.dms.evict_logit_bias > 5 and "threshold" in capsys.readouterr().err
    # In training, with its noise and without the threshold, the ratio overshoots.
    assert read_steps(settings["output"] / "metrics.jsonl")[-1]["cache/realised_cr"] > wanted
    # These are other rows than those that the threshold was chosen on.
    assert report["held_out/realised_cr"] == pytest.approx(wanted, rel=0.1)


@pytest.mark.parametrize("mode", ["full", "borrowed"])
def test_modes_that_train_all_weights_export_too(settings, mode):
    with pytest.warns(UserWarning, match="borrowed-channel") if mode == "borrowed" else contextlib.nullcontext():
        assert main(arguments(settings, mode=mode, steps=4)) == 0
    exported, base = dms_jax.load(settings["output"] / "export"), dms_jax.load(settings["model"])
    assert exported.config.dms.variant == ("borrowed" if mode == "borrowed" else "projection")
    ids = tokens(np.random.default_rng(5), 2, 40)
    assert not np.array_equal(exported.dense(ids), base.dense(ids))
    refuses(arguments(settings, mode=mode, steps=4), str(settings["output"]), "--resume")


def test_killed_run_resumes_bit_for_bit(settings, tmp_path):
    settings |= {"steps": 40, "save_every": 3}
    assert main(arguments(settings, output=tmp_path / "whole")) == 0
    for attempt, wait_for in enumerate((1, 8, 17)):  # SIGKILL at three steps, the first one before any checkpoint
        process = subprocess.Popen(
            command(settings, "--resume"), cwd=ROOT, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
        )
        wait_for_step(process, settings["output"] / "metrics.jsonl", wait_for)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, f"attempt {attempt} ended before it was killed"
    assert main(arguments(settings, "--resume")) == 0
    assert trace(tmp_path / "whole") == trace(settings["output"])
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "whole" / "export" / name).read_bytes() == (
            settings["output"] / "export" / name
        ).read_bytes()


@pytest.mark.slow  # three meshes: test_resume.py
def test_run_resumed_on_another_mesh_gives_the_same_numbers(settings, tmp_path):
    assert main(arguments(settings, output=tmp_path / "whole")) == 0
    main(arguments(settings, output=tmp_path / "run"))
    for path in (settings["output"] / "checkpoints").iterdir():
        if path.name == "6":
            remove(path)
    assert main([*arguments(settings, "--resume")[:-3], "--mesh", "2x2x2", "--resume"]) == 0
    whole, moved = trace(tmp_path / "whole"), trace(settings["output"])
    assert whole.keys() == moved.keys()
    for step in whole:
        np.testing.assert_allclose(moved[step], whole[step], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_signal_saves_and_names_the_option_to_resume(settings, number, monkeypatch, capsys):
    """A signal to another process: test_resume.py."""
    settings |= {"steps": 40, "save_every": 1000}
    send_signal(monkeypatch, number, step=3)
    assert main(arguments(settings)) == 128 + number
    stderr = capsys.readouterr().err
    assert f"{number.name}: saved at step 4" in stderr and "--resume" in stderr
    assert not (settings["output"] / "run.lock").exists()
    (saved,) = [int(p.name) for p in (settings["output"] / "checkpoints").iterdir() if p.name.isdigit()]
    assert saved == max(trace(settings["output"])) + 1 == 4


def test_two_processes_equal_one(settings, tmp_path):
    assert main(arguments(settings, output=tmp_path / "one")) == 0
    both = start_two_processes(settings, subprocess.PIPE)
    outputs = [process.communicate(timeout=400) for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs[0][1][-2000:] + outputs[1][1][-2000:]
    one, two = trace(tmp_path / "one"), trace(settings["output"])
    assert one.keys() == two.keys()
    for step in one:
        np.testing.assert_allclose(two[step], one[step], rtol=1e-5, atol=1e-6)
    ids = tokens(np.random.default_rng(5), 2, 40)
    np.testing.assert_allclose(
        dms_jax.load(settings["output"] / "export").hard(ids)[0],
        dms_jax.load(tmp_path / "one" / "export").hard(ids)[0],
        atol=1e-4,
    )
    # The threads of Gloo interleave their lines, so that the start of one may be missing.
    printed = [
        [line for line in out.splitlines() if line and "[Gloo]" not in line and "peer ranks" not in line]
        for out, _ in outputs
    ]
    assert printed[0] and not printed[1]  # only the first process prints


@pytest.mark.slow
def test_processes_form_one_mesh_under_slurm(settings, tmp_path):
    """Two processes of one CPU each, described by the environment variables of Slurm, split every row between them."""
    assert main(arguments(settings, output=tmp_path / "one")) == 0
    argv = [*command(settings)[:-1], "1x1x2", "--distributed", "auto"]
    # JAX derives the port from the job id.
    slurm = {
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_NTASKS": "2",
    }
    tasks = [
        subprocess.Popen(
            argv,
            cwd=ROOT,
            stderr=subprocess.PIPE,
            env=os.environ | slurm | {"SLURM_PROCID": str(i), "SLURM_LOCALID": str(i)},
        )
        for i in range(2)
    ]
    errors = [task.communicate(timeout=400)[1].decode() for task in tasks]
    assert [task.returncode for task in tasks] == [0, 0], errors[0][-2000:] + errors[1][-2000:]
    one, two = trace(tmp_path / "one"), trace(settings["output"])
    for step in one:
        np.testing.assert_allclose(two[step], one[step], rtol=1e-5, atol=1e-6)


def test_damaged_checkpoints_are_skipped_and_reported(settings, capsys):
    assert main(arguments(settings)) == 0
    checkpoints = settings["output"] / "checkpoints"
    whole = trace(settings["output"])
    (checkpoints / "99").mkdir()  # as a crash leaves it; to Orbax itself it is the latest
    for file in (checkpoints / "6").rglob("*"):
        if file.is_file() and file.name != "commit_success.txt":
            os.truncate(file, 0)
    capsys.readouterr()
    assert main(arguments(settings, "--resume")) == 0
    err = capsys.readouterr().err
    (line,) = [line for line in err.splitlines() if "resumed at step 4 of 6" in line]
    assert (
        "skipped checkpoint 99: it was never completed (kept as 99.not-a-checkpoint)" in line
        and "skipped checkpoint 6:" in line
    )
    assert trace(settings["output"]) == whole and (checkpoints / "99.not-a-checkpoint").is_dir()
    assert main(arguments(settings, "--resume")) == 0  # the damaged one was written again
    assert "resumed at step 6 of 6\n" in capsys.readouterr().err


def test_resumed_run_must_have_the_same_settings_and_base(settings, tmp_path):
    assert main(arguments(settings)) == 0
    refuses(arguments(settings), str(settings["output"]), "--resume")
    refuses(
        arguments(settings, "--resume", dms__window_size=5, seed=3),
        "dms.window_size: 6 -> 5; seed: 0 -> 3",
        "--accept-changes",
    )
    refuses(arguments(settings, "--resume", model=GOLDEN / "llama_untied"), "another base model")
    assert main(arguments(settings, "--resume", "--accept-changes", steps=8)) == 0
    assert max(trace(settings["output"])) == 7


@pytest.mark.parametrize(
    "changes, fragments",
    [
        ({"batch_size": 6}, ["batch_size 6", "multiple of 8"]),
        ({"length": 4096}, ["max_position_embeddings of 512", "4096"]),
        ({"model": "nowhere"}, ["nowhere"]),
        ({"data": "nowhere.txt"}, ["nowhere.txt"]),
        ({"output": "/proc/nothing"}, ["output", "/proc/nothing"]),
        ({"length": 500}, ["length", "500"]),
    ],
)
def test_wrong_input_is_refused_in_one_line(settings, changes, fragments, tmp_path):
    if changes == {"length": 500}:
        np.save(settings["data"], tokens(np.random.default_rng(0), 1, 300))
    refuses(arguments(settings, **changes), *fragments)


def test_wrong_meshes_are_refused(settings):
    meshes = {
        "8": "DATAxMODEL",
        "0x8": "at least 1",
        "axb": "DATAxMODEL",
        "3x1": "needs 3 devices",
        "2x2x2x1": "xCONTEXT",
        "2x2x-2": "at least 1",
        "1x1x5": "length 48 must be a multiple of 5",
        "2x2x3": "mesh 2x2x3 needs 12 devices",
    }
    for mesh, fragment in meshes.items():
        refuses([*arguments(settings, batch_size=0)[:-1], mesh], fragment)


def test_ids_outside_the_vocabulary_are_refused(settings):
    np.save(settings["data"], np.full((10, 60), 131, np.int32))
    refuses(arguments(settings), "131")


def test_target_out_of_reach_is_reported_once(settings, capsys):
    assert main(arguments(settings, dms__window_size=60, steps=3)) == 0
    err = capsys.readouterr().err
    assert err.count("out of reach") == 1 and "at most CR 1.00" in err


def test_run_that_is_not_finite_stops_and_saves_nothing(settings, monkeypatch):
    call, name = OnMesh.__call__, "layers.attention.evict_norm"

    def poisoned(self, state, *rest):
        if isinstance(state, TrainState) and int(state.step) == 3:
            state = state._replace(trainable=state.trainable | {name: state.trainable[name].at[1, 0].set(np.nan)})
        return call(self, state, *rest)

    monkeypatch.setattr(OnMesh, "__call__", poisoned)
    refuses(arguments(settings), "step 3 is not finite", "layer 1", "examples 24 to 31")
    assert [p.name for p in (settings["output"] / "checkpoints").iterdir() if p.name.isdigit()] == ["2"]


def test_log_that_cannot_be_written_does_not_stop_the_run(settings, monkeypatch, capsys):
    append, output = MetricsFile.append, settings["output"]

    def full_disk(self, values):
        if values.get("step") == 2:
            (output / "metrics.jsonl").rename(output / "kept.jsonl")
            (output / "metrics.jsonl").mkdir()  # now it is not a file that can be appended to
        if values.get("step") == 4:
            (output / "metrics.jsonl").rmdir()
            (output / "kept.jsonl").rename(output / "metrics.jsonl")
        append(self, values)

    monkeypatch.setattr(MetricsFile, "append", full_disk)
    assert main(arguments(settings)) == 0
    assert capsys.readouterr().err.count("without its log") == 1 and sorted(trace(output)) == [0, 1, 4, 5]


def test_nothing_is_compiled_after_the_first_step(settings, monkeypatch):
    sizes = []
    write_pending = StepLog.write_pending

    def counting(self, *args):
        sizes.append(self.run.steps.step.num_compiled())
        return write_pending(self, *args)

    monkeypatch.setattr(StepLog, "write_pending", counting)
    with jax.log_compiles(False):
        assert retrofit.main(arguments(settings)) == 0  # with compiled functions of its own
    assert set(sizes) == {1}


def run_command_line(*argv):
    return subprocess.run([sys.executable, "-m", "train.retrofit", *argv], cwd=ROOT, capture_output=True, text=True)


def test_command_line_errors_are_one_line():
    for argv, fragment in (
        (["--mehs", "8x1"], "did you mean --mesh"),
        (["--set", "stesp=3"], "did you mean steps"),
        (["--config", "none.yaml"], "none.yaml"),
        (["--distributed", "auto"], "HOST:PORT,COUNT,INDEX"),
        (["--distributed", "here"], "HOST:PORT,COUNT,INDEX"),
    ):
        done = run_command_line(*argv)
        assert done.returncode == 2 and fragment in done.stderr and done.stderr.count("\n") == 1 and done.stdout == ""


def test_help_does_not_load_jax():
    code = (
        "import sys, train.retrofit\ntry: train.retrofit.main(['--help'])\n"
        "except SystemExit: assert 'jax' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "dms.window_size" in done.stdout, done.stderr
