"""Make all measurements of docs/performance.md on the device at hand, as JSON lines with their provenance.

    python -m benchmarks.everything --output results.jsonl                      # all parts, one after the other
    python -m benchmarks.everything --part decode --output results.jsonl

The parts are kernels (each kernel compared with XLA, dense attention and the ceilings of the device), train (a retrofit
step of the shape of Llama-3.2-1B, and its model-FLOPs utilization), and decode and prefill (the shapes of Llama-3.2-1B
and Qwen3-8B with random weights, dense and at CR 2, 4 and 8). Decode and its attention are also measured with heads
that differ as those of a real model. The command ends within --minutes. A measurement for which no time is left gets a
line that says so; run its part alone with --part. Lines are appended whenever a measurement ends. On a CPU the shapes
are small.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import get_args

from benchmarks.benchmark_options import check_output
from dms_jax.command import Parser, run_command
from dms_jax.config import ImplementationName
from dms_jax.errors import ConfigError
from dms_jax.files import parse_json

NAME = "benchmarks.everything"
PARTS = ("kernels", "train", "decode", "prefill")
RAGGED = "0.7"  # the coefficient of variation in benchmarks/smollm2_135m_live_counts.json, rounded


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(NAME, __doc__)
    parser.add_argument("--part", choices=PARTS, action="append", help="run only this part; may be repeated")
    parser.add_argument(
        "--output",
        metavar="FILE",
        default="benchmark_results.jsonl",
        help="the file to which the lines are appended (default %(default)s)",
    )
    parser.add_argument("--minutes", type=float, default=9.0, help="time limit of the whole command (default 9)")
    parser.add_argument(
        "--implementation",
        choices=get_args(ImplementationName),
        default="auto",
        help="implementation of attention and cache in decode, prefill and train (default auto)",
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    output = Path(options.output)
    check_output(output)
    # Ask for the platform in another process, because a process that has touched a TPU keeps it from others.
    asked = subprocess.run(
        [sys.executable, "-c", "import jax; print(jax.default_backend())"], capture_output=True, text=True
    )
    if asked.returncode:
        raise ConfigError(
            f"JAX found no usable device: {(asked.stderr.strip().splitlines() or ['it gave no reason'])[-1]}"
        )
    deadline, failed = time.monotonic() + 60 * options.minutes, 0
    for part in options.part or PARTS:
        for command in commands(part, asked.stdout.split()[-1] == "cpu", options.implementation):
            failed += run(part, command, deadline - time.monotonic(), output)
    return 1 if failed else 0


def commands(part: str, on_cpu: bool, implementation: str) -> list[list[str]]:
    """Return the arguments of `python -m`, the most important ones first. Each command runs in a process of its own, so
    that its memory is free for the next one."""
    which = ["--implementation", implementation]
    if part == "kernels":
        ragged = ["benchmarks.kernels", "--json", "--kernel", "decode_attention", "--ragged", RAGGED]
        return [["benchmarks.kernels", "--json", "--quick"]] if on_cpu else [["benchmarks.kernels", "--json"], ragged]
    if on_cpu:
        small = ["--model", "smollm2-135m", "--layers", "4", *which]
        return {
            "train": [["benchmarks.retrofit_step", "--layers", "2", "--length", "256", "--memory-lengths", "256"]],
            "decode": [["benchmarks.decode", *small, "--context", "1024", "--cr", "1,2,4", "--json"]],
            "prefill": [["benchmarks.prefill", *small, "--context", "1024", "--json"]],
        }[part]
    decode = [
        ("qwen3-8b", 8, 32768, ["--equal-memory"]),
        ("qwen3-8b", 8, 32768, ["--equal-memory", "--ragged", RAGGED]),
        ("qwen3-8b", 8, 32768, ["--equal-memory", "--ragged", RAGGED, "--cache", "slots"]),
        ("qwen3-8b", 32, 32768, []),
        ("llama-3.2-1b", 8, 8192, ["--equal-memory"]),
        ("llama-3.2-1b", 64, 8192, []),
        ("qwen3-8b", 1, 32768, []),
    ]
    return {
        "train": [
            [
                "benchmarks.retrofit_step",
                "--model",
                "llama-3.2-1b",
                "--length",
                str(length),
                "--memory-lengths",
                str(length),
                *which,
            ]
            for length in (8192, 4096)
        ],
        "decode": [
            [
                "benchmarks.decode",
                "--model",
                model,
                "--batch",
                str(batch),
                "--context",
                str(context),
                *("--cr", "1,2,4,8", "--steps", "8", "--json"),
                *more,
                *which,
            ]
            for model, batch, context, more in decode
        ],
        "prefill": [
            ["benchmarks.prefill", "--model", model, "--batch", str(batch), "--context", str(context), "--json", *which]
            for model, batch, context in (("qwen3-8b", 1, 32768), ("llama-3.2-1b", 4, 8192))
        ],
    }[part]


def run(part: str, command: list[str], seconds: float, output: Path) -> int:
    """Run a command and append the JSON lines that it prints. Returns 1 if it failed, else 0."""
    print(f"python -m {' '.join(command)}", file=sys.stderr)
    start = time.monotonic()
    if seconds < 20:
        return append(output, part, command, [], "not started: no time left")
    try:
        done = subprocess.run([sys.executable, "-m", *command], stdout=subprocess.PIPE, text=True, timeout=seconds)
        text, problem = done.stdout, f"exit code {done.returncode}" if done.returncode else None
    except subprocess.TimeoutExpired as why:
        text, problem = (
            (why.stdout or b"").decode() if isinstance(why.stdout, bytes) else why.stdout or "",
            f"stopped after {seconds:.0f} s",
        )
    where = f"the output of {command[0]}"
    records = [parse_json(line, where) for line in text.splitlines() if line.startswith("{") and line.endswith("}")]
    print(f"  {len(records)} lines in {time.monotonic() - start:.0f} s", file=sys.stderr)
    return append(output, part, command, records, problem)


def append(output: Path, part: str, command: list[str], records: list[dict], problem: str | None) -> int:
    """Append the records, with the problem if there was one. Returns 1 if there was a problem, else 0."""
    extra = {} if problem is None else {"problem": problem}
    with output.open("a", encoding="utf-8") as file:
        for record in records or [{}]:
            file.write(
                json.dumps({"part": part, "command": f"python -m {' '.join(command)}", **extra, **record}) + "\n"
            )
    if problem is not None:
        print(f"  {problem}", file=sys.stderr)
    return 0 if problem is None else 1


if __name__ == "__main__":
    run_command(NAME, main)
