"""Kill a run at random moments, resume it each time, and compare it with a run that was left alone.

    python -m benchmarks.chaos --kills 30 --seed 0

The real command retrofits a tiny random model in a process of its own. Each process gets SIGTERM, SIGINT or SIGKILL at
a random moment, which may be during its start, compilation, training, saving, evaluation or export. After the last
kill, the run is resumed once more and finishes. Exit code 0 means that every step is logged once, that losses and
export equal those of the undisturbed run (1e-5), that no kill cost more steps than the distance between two checkpoints
plus one, and that no checkpoint was found damaged. The last line is JSON.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.benchmark_options import check_at_least
from dms_jax.command import Parser, run_command
from dms_jax.errors import ConfigError
from dms_jax.training.metrics import read_steps

NAME = "benchmarks.chaos"
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGKILL)
SAVE_EVERY = 3
LATEST_KILL = 1.2  # as a fraction of the time of an undisturbed run, so that some runs end before they are killed
TOLERANCE = 1e-5


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(NAME, __doc__)
    add = parser.add_argument
    add("--kills", type=int, default=30, metavar="N", help="how often to kill (default %(default)s)")
    add("--seed", type=int, default=0, metavar="N", help="seed of signals and moments (default %(default)s)")
    add("--steps", type=int, default=60, metavar="N", help="steps of the run that is killed (default %(default)s)")
    modes = ("adapter", "full", "borrowed")
    add("--mode", choices=modes, default="adapter", help="mode of the retrofit (default %(default)s)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    check_at_least(options, kills=1, steps=2)
    with tempfile.TemporaryDirectory() as folder:
        found = chaos(Path(folder), options.kills, options.seed, options.steps, options.mode)
    print(json.dumps(found))
    return 0 if not found["wrong"] else 1


def chaos(folder: Path, kills: int, seed: int, steps: int, mode: str) -> dict:
    """Run the experiment. Returns counts of kills and lost steps, and the list of faults under the key `wrong`."""
    settings = prepare(folder, steps, mode)
    start = time.monotonic()
    whole = run(settings | {"output": folder / "whole"})
    _must_end(whole, folder / "whole")
    run(settings | {"output": folder / "warm"})  # fills the compilation cache for the run that is timed
    again = time.monotonic()
    _must_end(run(settings | {"output": folder / "timed"}), folder / "timed")
    life = time.monotonic() - again
    draw, output = random.Random(seed), folder / "killed"
    counts = {
        "kills": 0,
        "by_signal": {number.name: 0 for number in SIGNALS},
        "by_phase": {},
        "most_steps_lost": 0,
        "runs": 0,
        "ended_before": 0,
    }
    wrong: list[str] = []
    while counts["kills"] < kills:
        if (output / "export").exists():  # the run has finished, so start another one
            wrong += differences(folder / "whole", output)
            output = folder / f"killed{counts['runs']}"
        number, moment = draw.choice(SIGNALS), draw.uniform(0.0, LATEST_KILL * life)
        process = subprocess.Popen(**command(settings | {"output": output}, resume=True))
        counts["runs"] += 1
        try:
            process.wait(moment)
            ended = True
        except subprocess.TimeoutExpired:
            ended = False
        before = last_step(output)
        phase = phase_of(output, before, steps)
        if not ended:
            process.send_signal(number)
        _, stderr = process.communicate(timeout=300)
        wrong += faults_of(process.returncode, number, ended, stderr)
        if ended:
            counts["ended_before"] += 1
            continue
        counts["kills"] += 1
        counts["by_signal"][number.name] += 1
        counts["by_phase"][phase] = counts["by_phase"].get(phase, 0) + 1
        if before is not None and "saved at step" not in stderr:
            counts["most_steps_lost"] = max(counts["most_steps_lost"], before + 1 - newest_checkpoint(output))
        print(f"kill {counts['kills']}: {number.name} after {moment:.1f} s, {phase}", file=sys.stderr, flush=True)
    last = run(settings | {"output": output}, resume=True)
    _must_end(last, output)
    wrong += differences(folder / "whole", output)
    if counts["most_steps_lost"] > SAVE_EVERY + 1:  # one more step is logged while the next checkpoint is being written
        wrong.append(f"{counts['most_steps_lost']} steps were lost, checkpoints are {SAVE_EVERY} apart")
    return counts | {
        "seed": seed,
        "mode": mode,
        "steps": steps,
        "save_every": SAVE_EVERY,
        "seconds": round(time.monotonic() - start),
        "wrong": wrong,
    }


def prepare(folder: Path, steps: int, mode: str) -> dict:
    """Write a tiny random model and random ids. Returns the settings of a run that takes seconds."""
    import jax
    import numpy as np
    from flax import nnx

    import dms_jax
    from dms_jax.config import ModelConfig
    from dms_jax.models.decoder import Decoder

    jax.config.update("jax_platforms", "cpu")
    config = ModelConfig("llama", 97, 32, 48, 2, 4, 2, 8, max_position_embeddings=512)
    dms_jax.save(Decoder(config, rngs=nnx.Rngs(0)), folder / "model")
    np.save(folder / "ids.npy", np.random.default_rng(0).integers(0, 97, (80, 70)).astype(np.int32))
    return {
        "model": folder / "model",
        "data": folder / "ids.npy",
        "data.cache_dir": folder / "cache",
        "steps": steps,
        "length": 48,
        "batch_size": 4,
        "dms.window_size": 6,
        "dms.target_cr": 3,
        "save_every": SAVE_EVERY,
        "eval_every": 10,
        "eval_rows": 4,
        "mode": mode,
        "optimizer.learning_rate": 0.001,
        "init": "zero",
        "cache": folder / "compiled",
    }


def command(settings: dict, resume: bool) -> dict:
    pairs = [part for key, value in settings.items() if key != "cache" for part in ("--set", f"{key}={value}")]
    # All processes share one compilation cache, so that most of their time is training.
    compiled = {
        "JAX_COMPILATION_CACHE_DIR": str(settings["cache"]),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PLATFORMS": "cpu",
    }
    return {
        "args": [sys.executable, "-m", "train.retrofit", *pairs, *(["--resume"] if resume else [])],
        "env": os.environ | compiled,
        "stdout": subprocess.PIPE,
        "stderr": subprocess.PIPE,
        "text": True,
        "cwd": Path(__file__).parent.parent,
    }


def run(settings: dict, resume: bool = False) -> subprocess.CompletedProcess:
    how = command(settings, resume)
    return subprocess.run(how.pop("args"), **how, timeout=600)


def _must_end(done: subprocess.CompletedProcess, output: Path) -> None:
    if done.returncode or not (output / "export").exists():
        raise ConfigError(f"an undisturbed run ended with exit code {done.returncode}: {done.stderr.strip()[-300:]}")


def faults_of(code: int, number: int, ended: bool, stderr: str) -> list[str]:
    """The faults of a process that was killed, by its exit code and stderr."""
    wrong = [f"traceback after {signal.Signals(number).name}: {stderr.strip()[-300:]}"] if "Traceback" in stderr else []
    # A process may end before its kill, or be killed before its handler is installed.
    allowed = {0} if ended else {0, -number, 128 + number}
    if code not in allowed:
        wrong.append(f"exit code {code} after {signal.Signals(number).name}: {stderr.strip()[-300:]}")
    if "skipped checkpoint" in stderr or "usable" in stderr:
        wrong.append(f"a checkpoint was damaged: {stderr.strip()[-300:]}")
    return wrong


def steps_of(output: Path) -> list[dict]:
    """The steps that a run has logged so far."""
    path = output / "metrics.jsonl"
    return read_steps(path) if path.exists() else []


def last_step(output: Path) -> int | None:
    return max((line["step"] for line in steps_of(output)), default=None)


def newest_checkpoint(output: Path) -> int:
    folder = output / "checkpoints"
    return max((int(p.name) for p in folder.iterdir() if p.name.isdigit()), default=0) if folder.exists() else 0


def phase_of(output: Path, logged: int | None, steps: int) -> str:
    """The phase of a run, by what it has written."""
    if (output / "export").exists():
        return "report"
    if logged is None:
        return "before the first step"
    if logged + 1 >= steps:
        return "evaluation and export"
    return "training and saving"


def differences(whole: Path, other: Path) -> list[str]:
    """The differences between the undisturbed run and one that was killed, at most 5."""
    import numpy as np

    traces = []
    for output in (whole, other):
        lines = steps_of(output)
        traces.append({line["step"]: line for line in lines})
        if len(traces[-1]) != len(lines):
            return [f"{output.name} logs a step twice"]
    if traces[0].keys() != traces[1].keys():
        return [f"steps {sorted(traces[0].keys() ^ traces[1].keys())} are in one trace only"]
    keys = "loss/total", "loss/distill", "loss/compression", "optim/grad_norm", "cache/evict_fraction"
    wrong = [
        f"step {step}: {key} {traces[1][step][key]} instead of {line[key]}"
        for step, line in traces[0].items()
        for key in keys
        if not np.isclose(traces[1][step][key], line[key], rtol=TOLERANCE, atol=TOLERANCE)
    ]
    names = sorted(p.name for p in (whole / "export").iterdir())
    if names != sorted(p.name for p in (other / "export").iterdir()):
        return [*wrong, "the exports hold different files"]
    import dms_jax

    one, two = (dms_jax.load(output / "export") for output in (whole, other))
    ids = np.random.default_rng(1).integers(0, 97, (2, 40)).astype(np.int32)
    if not np.allclose(one.hard(ids)[0], two.hard(ids)[0], atol=1e-4):
        wrong.append("the exports compute different logits")
    return wrong[:5]


if __name__ == "__main__":
    run_command(NAME, main)
