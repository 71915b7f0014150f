"""One writer at a time: races of many processes, stale locks, other machines, and file systems without flock."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from dms_jax import writer_lock
from dms_jax.errors import ConfigError
from dms_jax.writer_lock import only_writer

ROOT = Path(__file__).parents[1]
# Takes the lock, notes when it has it and when it gives it back, and says so with its exit code.
WORKER = """
import os, sys, time
from dms_jax import writer_lock
from dms_jax.command import run_command
if "no flock" in sys.argv:
    writer_lock.fcntl = None
writer_lock.BEAT, writer_lock.SILENCE = 0.2, 3.0
def main():
    open(f"{sys.argv[2]}.{os.getpid()}", "w").close()
    while not os.path.exists(sys.argv[2]):
        time.sleep(0.001)
    with writer_lock.only_writer(sys.argv[1], "use another file"):
        with open(sys.argv[1], "a") as file:
            file.write("begin\\n")
            file.flush()
            time.sleep(float(sys.argv[3]))
            file.write("end\\n")
run_command("x", main)
"""


def start(target: Path, go: Path, seconds: float, *more: str) -> subprocess.Popen:
    command = [sys.executable, "-c", WORKER, str(target), str(go), str(seconds), *more]
    return subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)


def race(target: Path, go: Path, count: int, kind: str) -> tuple[list[subprocess.Popen], list[str]]:
    """Let `count` processes want the lock at the same moment. Returns them and what each wrote to stderr."""
    workers = [start(target, go, 1.5, kind) for _ in range(count)]
    wait_for(lambda: all(Path(f"{go}.{worker.pid}").exists() for worker in workers))
    go.touch()
    return workers, [worker.communicate(timeout=120)[1] for worker in workers]


@pytest.fixture(params=["flock", "no flock"])
def kind(request, monkeypatch):
    if request.param == "no flock":
        monkeypatch.setattr(writer_lock, "fcntl", None)
    monkeypatch.setattr(writer_lock, "SILENCE", 0.5)
    return request.param


def wait_for(condition, seconds=60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def lock_of(path: Path) -> Path:
    return path.with_name(path.name + ".lock")


def test_of_many_processes_at_once_exactly_one_wins(tmp_path, kind):
    target, go = tmp_path / "r.jsonl", tmp_path / "go"
    workers, errors = race(target, go, 8, kind)
    codes = [worker.returncode for worker in workers]
    assert sorted(codes) == [0] + [2] * 7, errors
    winner = workers[codes.index(0)].pid
    for code, error in zip(codes, errors, strict=True):
        assert code == 0 or (error.count("\n") == 1 and f"process {winner} on " in error), error
    assert target.read_text() == "begin\nend\n" and not list(tmp_path.glob("*.lock*"))


def test_of_many_processes_that_find_a_stale_lock_exactly_one_takes_it_over(tmp_path, kind):
    target, go = tmp_path / "r.jsonl", tmp_path / "go"
    go.touch()
    killed = start(target, go, 600, kind)
    wait_for(target.exists)
    os.kill(killed.pid, signal.SIGKILL)
    killed.communicate()
    assert lock_of(target).exists()
    go.unlink()
    workers, errors = race(target, go, 6, kind)
    codes = [worker.returncode for worker in workers]
    assert sorted(codes) == [0] + [2] * 5, errors
    told = [line for error in errors for line in error.splitlines() if "taking over" in line]
    assert len(told) == 1 and f"process {killed.pid} on " in told[0]
    assert target.read_text() == "begin\nbegin\nend\n" and not list(tmp_path.glob("*.lock*"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_lock_is_released_by_signals(tmp_path, number):
    target, go = tmp_path / "r.jsonl", tmp_path / "go"
    go.touch()
    worker = start(target, go, 600)
    wait_for(target.exists)
    worker.send_signal(number)
    assert worker.wait(60) == 128 + number and not lock_of(target).exists()
    worker.communicate()


def test_lock_is_released_after_an_error_and_made_folders_are_removed_if_empty(tmp_path, kind):
    with pytest.raises(ZeroDivisionError), only_writer(tmp_path / "a" / "b", "", is_folder=True):
        assert [p.name for p in (tmp_path / "a" / "b").iterdir()] == ["run.lock"]
        raise ZeroDivisionError
    assert not list(tmp_path.iterdir())
    with only_writer(tmp_path / "a" / "b", "", is_folder=True):
        (tmp_path / "a" / "b" / "x").touch()
    assert [p.name for p in (tmp_path / "a" / "b").iterdir()] == ["x"]


def write_lock(path: Path, **changes) -> dict:
    me = writer_lock.Holder("elsewhere", os.getpid(), "0", "another boot/pid:[1]", "nonce")
    raw = {"dms_jax_lock": 1, **me._replace(**changes)._asdict()}
    path.write_text(json.dumps(raw))
    return raw


def test_lock_of_another_machine_is_live_while_it_is_renewed(tmp_path, kind, capsys):
    path = lock_of(tmp_path / "r.jsonl")
    raw, ended = write_lock(path), threading.Event()

    def renew():
        while not ended.wait(0.05):
            os.utime(path)

    threading.Thread(target=renew).start()
    try:
        words = f"process {os.getpid()} on elsewhere.*use another"
        with pytest.raises(ConfigError, match=words), only_writer(tmp_path / "r.jsonl", "use another"):
            raise AssertionError
    finally:
        ended.set()
    assert json.loads(path.read_text()) == raw  # nothing is touched
    time.sleep(0.1)
    with only_writer(tmp_path / "r.jsonl", "use another"):
        assert json.loads(path.read_text())["host"] != "elsewhere"
    assert "taking over" in capsys.readouterr().err and not path.exists()


def test_reused_pid_is_not_taken_for_the_holder(tmp_path, monkeypatch):
    monkeypatch.setattr(writer_lock, "fcntl", None)
    path, here = lock_of(tmp_path / "r.jsonl"), writer_lock._machine()
    if not here:
        pytest.skip("needs /proc")
    write_lock(path, machine=here)  # our own pid, started at another time
    with only_writer(tmp_path / "r.jsonl", ""):
        pass
    write_lock(path, machine=here, start=writer_lock._start_of(os.getpid()))
    with pytest.raises(ConfigError, match="being written"), only_writer(tmp_path / "r.jsonl", ""):
        pass


def test_live_holder_renews_its_lock(tmp_path, monkeypatch):
    monkeypatch.setattr(writer_lock, "BEAT", 0.02)
    with only_writer(tmp_path / "r.jsonl", ""):
        first = lock_of(tmp_path / "r.jsonl").stat().st_mtime_ns
        wait_for(lambda: lock_of(tmp_path / "r.jsonl").stat().st_mtime_ns > first)


@pytest.mark.parametrize("content", ["mine", "{}", '{"dms_jax_lock": 2}', "[1]", "\0"])
def test_file_of_another_program_is_refused_and_left(tmp_path, kind, content):
    path = lock_of(tmp_path / "r.jsonl")
    path.write_text(content)
    with pytest.raises(ConfigError, match="r.jsonl.lock.*move it away"), only_writer(tmp_path / "r.jsonl", ""):
        pass
    assert path.read_text() == content


def test_lock_of_a_process_that_was_killed_before_it_wrote_its_name_is_free(tmp_path, kind):
    lock_of(tmp_path / "r.jsonl").touch()
    with only_writer(tmp_path / "r.jsonl", ""):
        pass


def test_folder_that_cannot_be_written_to_is_one_line():
    with pytest.raises(ConfigError, match="/proc/nothing.*use another"), only_writer("/proc/nothing/x", "use another"):
        pass
