"""The console script, the shared argument parser, and the exit codes of commands."""

import os
import subprocess
import sys

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
    ],
)
def test_exit_code_and_line_of_a_command(main, code, line, capsys):
    with pytest.raises(SystemExit) as stop:
        run_command("report", main)
    error = capsys.readouterr().err
    assert stop.value.code == code and line in error and len(error.splitlines()) == bool(line)


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


def test_stdout_that_was_closed_at_the_start_is_no_error():
    code = "import os, subprocess, sys; sys.exit(subprocess.call([sys.executable, '-m', 'dms_jax'], close_fds=False))"
    done = subprocess.run(["sh", "-c", f'"{sys.executable}" -c "{code}" >&-'], stderr=subprocess.PIPE, timeout=120)
    assert done.returncode == 0 and not done.stderr


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_full_disk_under_stdout_is_one_line():
    code = "from dms_jax.command import run_command; run_command('report', lambda: print('x'))"
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-c", code], stdout=full, stderr=subprocess.PIPE, text=True, timeout=120)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "No space" in done.stderr


def test_one_line_is_printable_and_short():
    assert one_line("a\nb\0c") == "a b\ufffdc"
    assert len(one_line("x" * 10**6, 100)) < 120


@pytest.mark.parametrize("value", ["x", "host:1,two,0", "host:1,2", "host:1,3,0"])
def test_wrong_distributed_option_is_refused_before_jax_starts(value):
    with pytest.raises(ConfigError, match="(--distributed|processes)"):
        start_devices(8, value)
