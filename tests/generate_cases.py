"""Model folders and calls of `python -m infer.generate` that its tests share."""

import os
import subprocess
import sys
from pathlib import Path

from golden_folders import DENSE, DMS, model_folder

from dms_jax.command import DOORS
from dms_jax.commands.generate import NAME, main

ROOT = Path(__file__).parents[1]
DOOR = DOORS[NAME]


def learned_model(tmp_path_factory) -> Path:
    """Write the golden model with a policy, under a path that is not ASCII."""
    return model_folder(tmp_path_factory.mktemp("models") / "modèle", DMS)


def plain_model(tmp_path_factory) -> Path:
    """Write the golden model without a policy and without a chat template."""
    return model_folder(tmp_path_factory.mktemp("models") / "plain", DENSE, template=None)


def run(folder, *argv, new: int = 8) -> int:
    return main(["--model", str(folder), "--max-new-tokens", str(new), *map(str, argv)])


def chat(folder, lines: str, *argv) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", DOOR, "--model", str(folder), "--chat", "--max-new-tokens", "6", *map(str, argv)]
    return subprocess.run(command, cwd=ROOT, input=lines.encode(), capture_output=True, timeout=300)


def command(*argv: str, stdin: str = "", **variables) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", DOOR, *argv],
        cwd=ROOT,
        input=stdin,
        capture_output=True,
        text=True,
        env=os.environ | variables,
        timeout=300,
    )
