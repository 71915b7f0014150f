"""Runs of the real training command, seconds long, on a golden model and random ids."""

import dataclasses
import itertools
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import numpy as np
from cases import tokens

from dms_jax.commands import retrofit
from dms_jax.training import prepare
from dms_jax.training.data.token_store import DataConfig
from dms_jax.training.metrics import read_steps
from dms_jax.training.step_functions import step_functions
from dms_jax.training.stop_signal import StopSignal

ROOT = Path(__file__).parent.parent
GOLDEN = ROOT / "tests" / "golden"

# Keys on which no compiled function of a run depends.
HOST_KEYS = {"data": DataConfig(), "output": "any", "mesh": "any", "eval_every": 0, "eval_rows": 1} | {
    "calibration_rows": 0,
    "label_rows": 1,
    "save_every": 1,
    "keep": 1,
}
_compiled: dict[tuple, object] = {}


def main(argv: list[str]) -> int:
    """Run the training command in this process, with `sharing_functions`."""
    with sharing_functions():
        return retrofit.main(argv)


def sharing_functions():
    """Let runs whose settings differ in `HOST_KEYS` only share their compiled functions.

    Runs of separate processes share them likewise, through JAX's cache of compiled programs.
    """
    return mock.patch.object(prepare, "step_functions", _shared_functions)


def _shared_functions(math, trainable):
    teacher = math.teacher and math.teacher.graph
    key = dataclasses.replace(math.config, **HOST_KEYS), math.mesh, math.student.graph, teacher
    key += math.compute_dtype, math.remat
    if key not in _compiled:
        _compiled[key] = step_functions(math, trainable)
    return _compiled[key]


def run_settings(folder: Path) -> dict:
    ids = folder / "ids.npy"
    np.save(ids, tokens(np.random.default_rng(0), 60, 70))
    return {
        "model": GOLDEN / "llama3_rope_scaled",
        "data": ids,
        "data.cache_dir": folder / "cache",
        "output": folder / "run",
        "init": "zero",
        "steps": 6,
        "length": 48,
        "batch_size": 8,
        "dms.window_size": 6,
        "dms.target_cr": 3,
        "dms.decision_shift": 1,
        "save_every": 2,
        "eval_rows": 4,
        "optimizer.learning_rate": 0.001,
    }


def arguments(settings, *extra, mesh="8x1", **changes) -> list[str]:
    pairs = settings | {key.replace("__", "."): value for key, value in changes.items()}
    return [part for key, value in pairs.items() for part in ("--set", f"{key}={value}")] + ["--mesh", mesh, *extra]


def command(settings, *extra, **changes) -> list[str]:
    return [sys.executable, "-m", "train.retrofit", *arguments(settings, *extra, **changes)]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def start_two_processes(settings, stdout: int) -> list[subprocess.Popen]:
    """Start one run in two processes that form one mesh. Their stderr is a pipe."""
    address = f"localhost:{free_port()}"
    commands = [command(settings, "--distributed", f"{address},2,{i}") for i in range(2)]
    return [subprocess.Popen(c, cwd=ROOT, stderr=subprocess.PIPE, stdout=stdout, text=True) for c in commands]


def trace(output) -> dict[int, tuple]:
    """Return the losses and the evicted fraction that a run logged, by step."""
    steps = read_steps(Path(output) / "metrics.jsonl")
    assert len({line["step"] for line in steps}) == len(steps), "a step is logged twice"
    return {
        line["step"]: (line["loss/total"], line["loss/distill"], line["loss/compression"], line["cache/evict_fraction"])
        for line in steps
    }


def wait_for_step(process: subprocess.Popen, path: Path, step: int) -> None:
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and process.poll() is None:
        lines = path.read_text().splitlines() if path.exists() else []
        if any(f'"step": {step},' in line for line in lines):
            return
        time.sleep(0.02)
    raise AssertionError(f"step {step} was never logged: exit code {process.poll()}")


def send_signal(monkeypatch, number: int, step: int) -> None:
    """Send this process a signal during a step (or batch of label rows) of the run that it begins next."""
    agreed, steps = StopSignal.agreed, itertools.count()

    def sending(self):
        if next(steps) == step:
            os.kill(os.getpid(), number)
        return agreed(self)

    monkeypatch.setattr(StopSignal, "agreed", sending)


def remove(path: Path) -> None:
    shutil.rmtree(path)
