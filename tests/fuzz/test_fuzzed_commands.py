"""Damaged inputs given to the commands: exit code 0, or 2 with one line on stderr, and no input file changes."""

import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from fuzz.fuzz_case import Target, listing
from fuzz.model_targets import make_folder, make_tokenizer
from fuzz.targets import TARGETS
from train_runs import ROOT, run_settings

SEEDS = 8  # seeds per command, of which the default suite runs the first
DEADLINE = 240  # seconds; several times as long as the slowest command takes


def dry_run(*options: str, **changes) -> Callable[[Path, Path], list[str]]:
    """A dry run of a retrofit on the damaged folder. Model and data are undamaged unless `changes` replace them."""

    def command(folder: Path, beside: Path) -> list[str]:
        settings = run_settings(beside) | {
            key.replace("__", "."): str(value).format(folder=folder) for key, value in changes.items()
        }
        pairs = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
        return [
            "train.retrofit",
            "--dry-run",
            "--mesh",
            "1x1",
            *pairs,
            *(option.format(folder=folder) for option in options),
        ]

    return command


def generate(*options: str) -> Callable[[Path, Path], list[str]]:
    def command(folder: Path, beside: Path) -> list[str]:
        make_folder(beside)
        make_tokenizer(beside)
        return [
            "infer.generate",
            "--model",
            str(beside),
            "--max-new-tokens",
            "2",
            *(option.format(folder=folder) for option in options),
        ]

    return command


def inspect(folder: Path, beside: Path) -> list[str]:
    """An inspection of a tiny model with the damaged configuration."""
    found = run_settings(beside)
    settings = {key: found[key] for key in ("model", "data", "data.cache_dir", "output", "length", "dms.window_size")}
    settings |= {"dtype": "float32", "data.held_out_fraction": 0.2, "label_rows": 4, "eval_rows": 2}
    pairs = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    return ["train.inspect", "--mesh", "1x1", "--config", f"{folder}/run.yaml", *pairs]


COMMANDS = {
    "run YAML": dry_run("--config", "{folder}/run.yaml"),
    "inspection YAML": inspect,
    "model config.json": lambda folder, beside: [
        "train.plan",
        "--model",
        str(folder),
        "--hardware",
        "h100x8",
        "--analytic",
        "--length",
        "64",
    ],
    "model weights": dry_run(model="{folder}"),
    "GGUF file": lambda folder, beside: [
        "train.plan",
        "--model",
        f"{folder}/model.gguf",
        "--hardware",
        "cpu",
        "--analytic",
        "--length",
        "64",
    ],
    "token ids": dry_run(data="{folder}/ids.npy"),
    "prompts": generate("--prompts", "{folder}/prompts.jsonl"),
    "adapter file": generate("--adapter", "{folder}/policy.safetensors", "--prompt", "one"),
    "cache file, tova": generate("--load-cache", "{folder}/prompt.cache", "--prompt", "one"),
    "results.jsonl": lambda folder, beside: ["infer.report", f"{folder}/results.jsonl", "--output", f"{beside}/report"],
}


def run(command: list[str]) -> subprocess.CompletedProcess:
    module, *arguments = command
    return subprocess.run(
        [sys.executable, "-m", module, *arguments],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        timeout=DEADLINE,
        capture_output=True,
        text=True,
    )


def inputs(name: str, tmp_path: Path) -> tuple[Target, Path, Path]:
    """A target, a folder with its undamaged input, and an empty folder beside it."""
    target = next(target for target in TARGETS if target.name == name)
    folder, beside = tmp_path / "input", tmp_path / "beside"
    folder.mkdir()
    beside.mkdir()
    target.make(folder)
    return target, folder, beside


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_undamaged_input_is_accepted(name, tmp_path):
    _, folder, beside = inputs(name, tmp_path)
    done = run(COMMANDS[name](folder, beside))
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize(
    "name, seed",
    [
        pytest.param(name, seed, id=f"{name}-{seed}", marks=[] if seed == 0 else pytest.mark.slow)
        for name in COMMANDS
        for seed in range(SEEDS)
    ],
)
def test_command_reports_damaged_input_in_one_line(name, seed, tmp_path):
    target, folder, beside = inputs(name, tmp_path)
    how = target.mutate(random.Random(f"command {name}/{seed}"), folder)
    before, command = listing(folder), COMMANDS[name](folder, beside)
    done = run(command)
    details = f"{how}: exit code {done.returncode}\n{done.stderr[-3000:]}"
    assert done.returncode in (0, 2) and "Traceback" not in done.stderr, details
    if done.returncode == 2:
        assert [
            line for line in done.stderr.splitlines() if line.startswith(f"{command[0]}:")
        ] == done.stderr.splitlines()[-1:], details
    assert listing(folder) == before, details
