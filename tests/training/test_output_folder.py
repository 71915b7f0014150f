"""The output folder of a run: one run writes to it at a time, and files of the user in it stay."""

import os
import signal
import subprocess
from pathlib import Path

import pytest
from train_runs import ROOT, arguments, command, main, run_settings, start_two_processes, trace

from dms_jax.errors import ConfigError
from dms_jax.sharding import make_mesh
from dms_jax.training.finish import EXPORT, FILES, writing_results
from dms_jax.training.stop_signal import stop_signals
from dms_jax.writer_lock import only_writer


@pytest.fixture
def settings(tmp_path):
    return run_settings(tmp_path)


def test_of_two_runs_begun_at_once_one_runs_and_one_is_refused(settings):
    both = [
        subprocess.Popen(command(settings), cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
        for _ in range(2)
    ]
    errors = [process.communicate(timeout=400)[1] for process in both]
    codes = [process.returncode for process in both]
    assert sorted(codes) == [0, 2], errors
    refused, winner = errors[codes.index(2)], both[codes.index(0)]
    assert refused.count("\n") == 1 and f"process {winner.pid} on " in refused and "output=FOLDER" in refused
    assert sorted(trace(settings["output"])) == list(range(6)) and not list(settings["output"].glob("*.lock*"))


@pytest.mark.parametrize("extra", [[], ["--resume"], ["--resume", "--accept-changes"]])
def test_run_beside_a_live_one_is_refused_before_anything_is_loaded(settings, extra):
    settings |= {"model": "nowhere"}  # a model that is loaded would be refused in other words
    output = settings["output"]
    with only_writer(output, "", is_folder=True):
        (output / "metrics.jsonl").write_text("as it is")
        before = sorted(output.iterdir())
        with pytest.raises(ConfigError, match=f"{output}.* process {os.getpid()} on .*output=FOLDER") as refusal:
            main(arguments(settings, *extra))
        assert "\n" not in str(refusal.value) and sorted(output.iterdir()) == before
    assert (output / "metrics.jsonl").read_text() == "as it is"


def test_dry_run_needs_no_lock(settings, capsys):
    with only_writer(settings["output"], "", is_folder=True):
        assert main(arguments(settings, "--dry-run")) == 0
    assert "rows of 48 tokens" in capsys.readouterr().out


def test_all_processes_of_a_run_that_is_refused_end(settings):
    with only_writer(settings["output"], "", is_folder=True):
        both = start_two_processes(settings, subprocess.DEVNULL)
        errors = [process.communicate(timeout=200)[1] for process in both]
    assert [process.returncode for process in both] == [2, 2], errors
    assert f"process {os.getpid()} on " in errors[0] and "first process" in errors[1]


def test_resuming_where_there_is_nothing_says_so_at_once_and_names_a_run_nearby(settings, tmp_path, capsys):
    (tmp_path / "runs" / "mine" / "checkpoints").mkdir(parents=True)
    with pytest.raises(ConfigError, match="nowhere"):
        main(arguments(settings, "--resume", model="nowhere", output=tmp_path / "runs" / "mime"))
    line = capsys.readouterr().err
    assert "begins at step 0" in line and f"did you mean {tmp_path / 'runs' / 'mine'}?" in line
    assert line.count("\n") == 1 and not (tmp_path / "runs" / "mime").exists()


def test_finished_run_that_is_resumed_keeps_the_files_of_the_user(settings):
    assert main(arguments(settings)) == 0
    output = settings["output"]
    theirs = [output / "notes.txt", output / EXPORT / "evaluation.jsonl", output / EXPORT / "sub" / "x"]
    for path in theirs:
        path.parent.mkdir(exist_ok=True)
        path.write_text(path.name)
    names = sorted(p.name for p in (output / EXPORT).iterdir())
    assert main(arguments(settings, "--resume")) == 0
    assert [path.read_text() for path in theirs] == [path.name for path in theirs]
    assert sorted(p.name for p in (output / EXPORT).iterdir()) == names


@pytest.mark.parametrize("name", [*FILES, EXPORT])
def test_target_that_the_end_of_a_run_could_not_write_is_refused_at_its_start(settings, name):
    settings |= {"model": "nowhere"}
    output: Path = settings["output"]
    output.mkdir()
    if name == EXPORT:
        (output / EXPORT).mkdir()
        (output / EXPORT / "notes.txt").touch()
    else:
        (output / name).symlink_to("elsewhere")
    with pytest.raises(ConfigError, match=f"{name} (must be a regular file|exists and is not a model folder)"):
        main(arguments(settings, "--resume"))


def test_error_while_writing_results_names_the_newest_checkpoint(tmp_path):
    class Run:
        output = tmp_path

        class checkpoints:
            @staticmethod
            def steps():
                return [4, 6]

    for error in (OSError(28, "No space left on device"), ConfigError("cannot write export: full")):
        with pytest.raises(ConfigError, match="checkpoint 6 is complete.*--resume") as refusal, writing_results(Run):
            raise error
        assert "\n" not in str(refusal.value)


def test_ignored_sighup_stays_ignored_while_a_run_trains():
    former = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stop_signals(make_mesh(8, 1)) as stop:
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.received == 0
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        with stop_signals(make_mesh(8, 1)) as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.received == signal.SIGHUP
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_DFL
    finally:
        signal.signal(signal.SIGHUP, former)
