"""The cache of compiled programs that commands keep for their next start."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# Compiles one program, and prints how many programs came from the cache, and the folder of the cache.
CODE = """
import sys
from dms_jax.command import Parser, run_command, start_devices
def main():
    Parser("generate", "", compiles=True).parse_args(sys.argv[1:])
    start_devices(1)
    import jax
    found = []
    jax.monitoring.register_event_listener(lambda event, **_: found.append(event))
    jax.jit(lambda x: x * 2 + 1)(3.0)
    print(found.count("/jax/compilation_cache/cache_hits"), jax.config.jax_compilation_cache_dir)
run_command("generate", main)
"""


@pytest.fixture
def start(tmp_path):
    """A function that starts a command with tmp_path as the user's cache folder, and returns its output."""

    def run(*argv, **variables):
        ours = {name: value for name, value in os.environ.items() if "CACHE" not in name}
        env = ours | {"XDG_CACHE_HOME": str(tmp_path / "user"), "PYTHONPATH": str(ROOT)} | variables
        done = subprocess.run([sys.executable, "-c", CODE, *argv], env=env, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        hits, _, folder = done.stdout.strip().partition(" ")
        return int(hits), folder, done.stderr

    return run


def test_second_start_reads_the_programs_of_the_first(start, tmp_path):
    folder = tmp_path / "user" / "dms_jax" / "compiled"
    hits, used, errors = start()
    assert (hits, used, errors) == (0, str(folder), "") and any(folder.glob("*-cache"))
    hits, _, errors = start()
    assert hits > 0 and not errors


def test_folder_that_the_user_has_set_wins(start, tmp_path):
    _, used, _ = start(JAX_COMPILATION_CACHE_DIR=str(tmp_path / "mine"), JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0")
    assert used == str(tmp_path / "mine") and any((tmp_path / "mine").glob("*-cache"))
    assert not (tmp_path / "user").exists()


def test_option_keeps_no_programs(start, tmp_path):
    for variables in ({}, {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "mine")}):
        assert start("--no-compile-cache", **variables)[0] == 0
        assert not list(tmp_path.iterdir())


def test_folder_that_cannot_be_written_is_one_warning(start, tmp_path):
    (tmp_path / "user").write_text("a file in the place of the folder")
    hits, _, errors = start()
    assert hits == 0 and errors.count("\n") == 1
    assert "warning" in errors and str(tmp_path / "user") in errors and "--no-compile-cache" in errors
