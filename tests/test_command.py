"""The console script, the shared argument parser, and the exit codes of commands."""

import errno
import os
import shlex
import subprocess
import sys
import tempfile

import pytest

from dms_jax import __version__
from dms_jax.__main__ import SUMMARIES
from dms_jax.command import DOORS, Parser, one_line, run_command, start_devices, typed_as
from dms_jax.errors import ConfigError


def dms_jax(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "dms_jax", *arguments], capture_output=True, text=True, timeout=120)


def test_console_script_lists_its_commands():
    for arguments in ((), ("--help",), ("-h",)):
        done = dms_jax(*arguments)
        assert done.returncode == 0 and all(name in done.stdout for name in DOORS) and not done.stderr
    assert dms_jax("--version").stdout == f"dms-jax {__version__}\n"


def test_every_command_has_a_summary():
    assert list(SUMMARIES) == list(DOORS)


def test_unknown_command_exits_with_2_and_one_line():
    done = dms_jax("nope")
    assert done.returncode == 2 and not done.stdout
    assert "'nope'" in done.stderr and len(done.stderr.splitlines()) == 1
    assert "did you mean retrofit?" in dms_jax("retrofitt").stderr


def test_help_shows_commands_as_the_user_typed_them():
    done = dms_jax("report", "--help")
    assert done.returncode == 0 and "dms-jax report" in done.stdout and "python -m infer" not in done.stdout


def test_shared_modules_load_no_jax():
    code = "import sys, dms_jax.__main__, dms_jax.config, dms_jax.files; assert 'jax' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_typed_form_of_a_command_follows_the_way_it_was_started(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/x/train/retrofit.py"])
    assert typed_as("retrofit") == "python -m train.retrofit"
    monkeypatch.setattr(sys, "argv", ["/usr/bin/dms-jax"])
    assert typed_as("retrofit") == "dms-jax retrofit"


def test_unknown_option_gets_a_suggestion(capsys):
    parser = Parser("report", "What it does.")
    parser.add_argument("--output")
    with pytest.raises(SystemExit) as stop:
        parser.parse_args(["--outptu=x"])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and "--outptu" in error and "did you mean --output?" in error
    assert len(error.splitlines()) == 1


def fail(why: BaseException):
    def main():
        raise why

    return main


@pytest.mark.parametrize(
    "main, code, line",
    [
        (lambda: None, 0, ""),
        (lambda: 3, 3, ""),
        (fail(ConfigError("steps\nmust be >= 1")), 2, "steps must be >= 1"),
        (fail(KeyboardInterrupt()), 130, "interrupted"),
        (fail(MemoryError()), 2, "out of memory"),
        (fail(RecursionError("maximum recursion depth exceeded")), 2, "nested too deeply"),
        (fail(type("PanicException", (BaseException,), {})("index out of range")), 2, "index out of range"),
        (fail(RuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 9 bytes\nmore")), 2, "device"),
        (fail(RuntimeError("INTERNAL: CUDA_ERROR_OUT_OF_MEMORY: out of memory")), 2, "device memory"),
        (fail(OSError(errno.ENOSPC, "No space left on device", "x.png")), 2, "x.png"),
        (fail(PermissionError(errno.EACCES, "Permission denied", "y.json")), 2, "y.json"),
    ],
)
def test_exit_code_and_line_of_a_command(main, code, line, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.raises(SystemExit) as stop:
        run_command("report", main)
    error = capsys.readouterr().err
    assert stop.value.code == code and line in error and len(error.splitlines()) == bool(line)
    assert all(str(path) in error for path in tmp_path.iterdir())  # details of an error that may be a defect


@pytest.mark.parametrize(
    "command",
    [
        ["-c", "from dms_jax.command import run_command; run_command('report', lambda: print('x' * 10**6))"],
        ["-m", "dms_jax"],
        ["-m", "dms_jax", "--version"],
        ["-m", "dms_jax", "report", "--help"],
    ],
)
def test_closed_pipe_ends_a_command_quietly(command):
    read, write = os.pipe()
    os.close(read)
    env = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    done = subprocess.run([sys.executable, *command], stdout=write, stderr=subprocess.PIPE, env=env, timeout=120)
    os.close(write)
    assert done.returncode == 141 and not done.stderr


def test_unexpected_error_names_a_file_with_its_traceback(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.raises(SystemExit) as stop:
        run_command("report", fail(KeyError("a defect")))
    error = capsys.readouterr().err
    (file,) = tmp_path.iterdir()
    assert stop.value.code == 1 and error.count("\n") == 1 and str(file) in error and "a defect" in error
    assert "Traceback" in file.read_text() and "KeyError: 'a defect'" in file.read_text()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "absent"))
    with pytest.raises(SystemExit):
        run_command("report", fail(KeyError("a defect")))
    assert "Traceback" in capsys.readouterr().err  # where no file can be written, nothing is lost


READS = "input()"
WRITES = "print('hello')"
COMPLAINS = "(_ for _ in ()).throw(ConfigError('wrong'))"


def under_shell(code: str, redirection: str) -> subprocess.CompletedProcess:
    code = f"from dms_jax.command import run_command, ConfigError; run_command('report', lambda: {code})"
    line = f"{shlex.quote(sys.executable)} -c {shlex.quote(code)} {redirection}"
    return subprocess.run(["sh", "-c", line], capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize(
    "code, redirection, exit_code, words",
    [
        (WRITES, ">&-", 2, "stdout is closed"),
        (WRITES, "<&- >&-", 2, "stdout is closed"),
        (READS, "<&-", 2, "stdin is closed"),
        (WRITES, "<&-", 0, ""),
        (WRITES, "2>&-", 0, ""),
        (COMPLAINS, "2>&-", 2, ""),
        (WRITES, "> /dev/full", 2, "No space left"),
        (COMPLAINS, "> /dev/full", 2, "wrong"),
        (WRITES, "2> /dev/full", 0, ""),
        (COMPLAINS, "2> /dev/full", 2, ""),
    ],
)
def test_closed_and_full_streams_end_in_one_line(code, redirection, exit_code, words):
    if "/dev/full" in redirection and not os.path.exists("/dev/full"):
        pytest.skip("needs /dev/full")
    done = under_shell(code, redirection)
    assert done.returncode == exit_code and words in done.stderr and done.stderr.count("\n") <= 1, done
    assert done.stdout == ("hello\n" if exit_code == 0 else "")


def test_files_do_not_get_the_number_of_a_closed_stream(tmp_path):
    done = under_shell(f"(print(open({str(tmp_path / 'x')!r}, 'w').fileno()), None)[1]", "<&- 2>&-")
    assert int(done.stdout) > 2


@pytest.mark.parametrize("name, former, code", [("SIGTERM", "DFL", 143), ("SIGHUP", "DFL", 129), ("SIGHUP", "IGN", 0)])
def test_signal_unwinds_a_command_unless_it_is_ignored(name, former, code, tmp_path):
    """What the command holds is released; `nohup` ignores SIGHUP."""
    program = f"""
import os, signal, sys
from dms_jax.command import run_command
from dms_jax.writer_lock import only_writer
signal.signal(signal.{name}, signal.SIG_{former})
def main():
    with only_writer({str(tmp_path / "r.jsonl")!r}, ""):
        os.kill(os.getpid(), signal.{name})
        sum(range(10**6))
run_command("report", main)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == code and not list(tmp_path.iterdir())
    assert done.stderr.count("\n") == (code != 0) and (code == 0 or name in done.stderr)


@pytest.mark.parametrize("platform", ["cuda", "tpu", "nonsense"])
def test_platform_without_a_device_is_one_line(platform):
    code = "from dms_jax.command import run_command, start_devices; run_command('report', lambda: start_devices(1))"
    env = os.environ | {"JAX_PLATFORMS": platform}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)
    if platform != "nonsense" and done.returncode == 0:
        pytest.skip(f"there is a {platform} here")
    assert done.returncode == 2 and "JAX_PLATFORMS" in done.stderr and "Traceback" not in done.stderr
    assert "report: JAX found no usable device" in done.stderr.splitlines()[-1]


def test_one_line_is_printable_and_short():
    assert one_line("a\nb\0c") == "a b\ufffdc"
    assert len(one_line("x" * 10**6, 100)) < 120


@pytest.mark.parametrize("value", ["x", "host:1,two,0", "host:1,2", "host:1,3,0"])
def test_wrong_distributed_option_is_refused_before_jax_starts(value):
    with pytest.raises(ConfigError, match="(--distributed|processes)"):
        start_devices(8, value)
