"""`--help` of every command, both as a door and under `dms-jax`, in an environment where importing JAX fails."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dms_jax.command import DOORS

ROOT = Path(__file__).parent.parent


@pytest.fixture
def without_jax(tmp_path) -> dict[str, str]:
    """An environment in which `import jax` raises."""
    for name in ("jax", "jaxlib", "flax"):
        (tmp_path / f"{name}.py").write_text("raise ImportError('--help must not import it')\n")
    return os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}


@pytest.mark.parametrize("arguments", [*([door] for door in DOORS.values()), *(["dms_jax", name] for name in DOORS)])
def test_help_imports_no_jax_and_shows_how_to_type_the_command(arguments, without_jax):
    command = [sys.executable, "-m", *arguments, "--help"]
    done = subprocess.run(command, cwd=ROOT, env=without_jax, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    typed = f"dms-jax {arguments[1]}" if len(arguments) > 1 else f"python -m {arguments[0]}"
    assert f"usage: {typed}" in done.stdout and f"\n    {typed} " in done.stdout
    assert ("python -m" in done.stdout) == (len(arguments) == 1)


@pytest.mark.parametrize("name", DOORS)
def test_help_takes_less_than_half_a_second_of_cpu(name, without_jax):
    code = f"""
import time
from dms_jax.commands import {name}
try:
    {name}.main(["--help"])
except SystemExit as done:
    assert not done.code
assert time.process_time() < 0.5, time.process_time()
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=without_jax, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_unknown_option_is_refused_without_jax(without_jax):
    command = [sys.executable, "-m", "infer.evaluate", "--modle", "x"]
    done = subprocess.run(command, cwd=ROOT, env=without_jax, capture_output=True, text=True)
    assert done.returncode == 2 and "--model" in done.stderr and "Traceback" not in done.stderr
