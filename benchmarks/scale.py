"""Compile retrofits of large models for accelerators that are not at hand, and make the tables of docs/scale.md.

    python -m benchmarks.scale --output docs/measurements/scale.jsonl             # compiles the missing lines
    python -m benchmarks.scale --output docs/measurements/scale.jsonl --table     # prints the tables from the file

Each line of the file is the JSON of one `python -m train.plan ... --json`, with its arguments and provenance, and takes
minutes to compile. To measure a line again, delete it. Memory and communication in the tables are read from the file,
as the compilers reported them. Estimates and times are computed when a table is printed, with the rates of
dms_jax/planning/roofline.py. Part `scale` has large models on as many accelerators as they need; part `estimate` has
the settings to which the estimate of memory was fitted.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.benchmark_options import check_output
from dms_jax.command import Parser, run_command
from dms_jax.errors import ConfigError
from dms_jax.files import read_jsonl

NAME = "benchmarks.scale"
PARTS = {
    "scale": (
        "--model configs/models/qwen3-8b.json --hardware h100x8 --mesh 8x1 --length 32768 --batch 8",
        "--model configs/models/qwen3-8b.json --hardware v5p-8 --mesh 8x1 --length 32768 --batch 8 "
        "--implementation pallas_tpu",
        "--model configs/models/r1-distill-qwen-32b.json --hardware v5p-64 --mesh 8x4x2 --length 32768 --batch 8 "
        "--implementation pallas_tpu",
        "--model configs/models/llama-3.1-70b.json --hardware v5p-256 --mesh 8x8x4 --length 32768 --batch 8 "
        "--implementation pallas_tpu",
        "--model configs/models/qwen3-8b.json --hardware v5p-8 --mesh 8x1 --length 32768 --batch 8",
    ),
    "estimate": (
        "--model configs/models/qwen3-8b.json --hardware h100x8 --mesh 8x1 --length 8192 --batch 8",
        "--model configs/models/qwen3-8b.json --hardware h100x8 --mesh 4x2 --length 8192 --batch 8",
        "--model configs/models/qwen3-8b.json --hardware h100x8 --mesh 8x1 --length 8192 --batch 8 --mode full",
        "--model configs/models/llama-3.2-1b.json --hardware h100x8 --mesh 8x1 --length 4096 --batch 32",
        "--model configs/models/llama-3.2-1b.json --hardware h100x8 --mesh 8x1 --length 8192 --batch 8 --remat matmuls",
        "--model configs/models/llama-3.2-1b.json --hardware h100x1 --length 8192 --batch 2",
        "--model configs/models/llama-3.2-1b.json --hardware v5e-8 --mesh 8x1 --length 8192 --batch 8",
        "--model configs/models/llama-3.2-1b.json --hardware v5e-8 --mesh 8x1 --length 4096 --batch 8 --mode full",
        "--model configs/models/llama-3.2-1b.json --hardware h100x8 --mesh 1x8 --length 8192 --batch 8",
        "--model configs/models/llama-3.2-1b.json --hardware h100x8 --mesh 2x2x2 --length 8192 --batch 8",
        "--model configs/models/llama-3.2-1b.json --hardware h100x8 --mesh 8x1 --length 4096 --batch 32 "
        "--accumulate 4 --mode full",
        "--model configs/models/llama-3.2-1b.json --hardware h200x1 --length 4096 --batch 4 --mode borrowed",
        "--model configs/models/llama-3.2-1b.json --hardware v5e-8 --mesh 2x4 --length 8192 --batch 8",
        "--model configs/models/qwen3-8b.json --hardware v5p-8 --mesh 2x4 --length 8192 --batch 8",
    ),
}
# Model-Optimizer's README: Qwen3-8B to 8x, 238 steps of 8 x 32,768 tokens in 4 h on 8 H100.
REFERENCE = {"device_hours": 32.0, "steps": 238, "tokens": 8 * 32768, "peak": 989e12, "wanted": 5.0}
GIB = 2**30


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(NAME, __doc__)
    parser.add_argument("--output", required=True, metavar="FILE", help="JSON lines, to which new lines are appended")
    parser.add_argument(
        "--part", choices=PARTS, action="append", help="compile or print only this part; may be repeated"
    )
    parser.add_argument("--table", action="store_true", help="compile nothing, and print the tables of the file")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    path, failed = Path(options.output), 0
    known = read(path)
    for part in options.part or PARTS:
        for arguments in PARTS[part] if not options.table else ():
            if arguments not in known:
                failed += measure(part, arguments, path)
    known, wanted = read(path), options.part or list(PARTS)
    plans = {
        arguments: updated(known[arguments]) for part in PARTS.values() for arguments in part if arguments in known
    }
    if "scale" in wanted:
        print(scale_table([plans[a] for a in PARTS["scale"] if a in plans]))
    if "estimate" in wanted:
        print(estimate_table(list(plans.values())))
    return 1 if failed else 0


def read(path: Path) -> dict[str, dict[str, Any]]:
    """Return the lines of the file by the arguments of their command."""
    check_output(path)
    found = {}
    for where, line in read_jsonl(path) if path.exists() else ():
        if not isinstance(line, dict) or "arguments" not in line:
            raise ConfigError(f"{where}: the key `arguments` is missing; use a file that {NAME} wrote")
        found[line["arguments"]] = line
    return found


def measure(part: str, arguments: str, path: Path) -> int:
    """Compile in a process of its own, so that its memory is free before the next compiler starts."""
    from dms_jax.provenance import versions

    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "train.plan", *arguments.split(), "--json"], stdout=subprocess.PIPE, text=True
    )
    if done.returncode:
        print(f"{NAME}: failed: train.plan {arguments}", file=sys.stderr)
        return 1
    line = {
        "part": part,
        "arguments": arguments,
        **json.loads(done.stdout),
        "seconds_of_the_command": time.perf_counter() - start,
    }
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line | {"provenance": versions()}) + "\n")
    return 0


def updated(line: dict[str, Any]) -> dict[str, Any]:
    """Return the line with estimates and times computed anew, and with the compiler's figures as they are."""
    from dms_jax.commands import plan
    from dms_jax.planning.figures import as_json
    from dms_jax.planning.memory_estimate import with_compiled
    from dms_jax.training.planning import step_plan

    setting, compiled = plan.setting_of(plan.parse(line["arguments"].split())), line["bytes_per_device"]
    estimate, arguments = step_plan.estimate(setting), compiled["weights"] + compiled["optimizer"]
    memory = with_compiled(estimate, arguments, compiled["total"] - arguments)
    sent = line["collective_bytes_per_device"]
    facts = step_plan.StepFacts(line["implementation"], estimate, memory, sent, "compiled")
    figures = step_plan.step_figures(setting, facts)
    seconds = next(figure for figure in figures if figure.name == "seconds_per_step")
    return line | as_json([*figures, *step_plan.ramp_figures(setting, seconds, 0.0)])


COLUMNS = (
    "model, hardware, mesh, attention",
    "rows x length",
    "GiB per device: total (weights, activations, logits, temporary)",
    "usable",
    "sent per device and step, GiB",
    "seconds per step",
    "utilization",
    "hours to CR 8",
    "device-hours",
    "command",
)


def scale_table(plans: list[dict[str, Any]]) -> str:
    """Return a Markdown table of memory, communication, time, utilization and cost, followed by the commands and the
    cost of the reference."""
    lines = _header(COLUMNS)
    for number, plan in enumerate(plans, 1):
        memory, hours = plan["bytes_per_device"], plan["hours_to_cr8"]
        parts = ", ".join(f"{memory[kind] / GIB:.1f}" for kind in ("weights", "activations", "logits", "temporary"))
        total = f"{memory['total'] / GIB:.1f} ({parts})" + ("" if plan["fits"] else ": does not fit")
        sent = ", ".join(
            f"{kind} {size / GIB:.1f}"
            for kind, size in sorted(plan["collective_bytes_per_device"].items(), key=lambda item: -item[1])
            if size >= GIB / 20
        )
        cells = (
            _title(plan),
            f"{plan['batch']} x {plan['length']}",
            total,
            f"{plan['memory_per_device'] / GIB:.1f}",
            sent,
            f"{plan['seconds_per_step']:.2f}",
            f"{plan['mfu']:.0%}",
            f"{hours:.2f}",
            f"{hours * plan['devices']:.1f}",
            str(number),
        )
        lines.append(_row(cells))
    lines += [
        "",
        *(f"{number}. `python -m train.plan {plan['arguments']}`" for number, plan in enumerate(plans, 1)),
        "",
    ]
    return "\n".join([*lines, *(reference_text(plan) for plan in plans[:1])])


def reference_text(plan: dict[str, Any]) -> str:
    """Compare with the published cost of the same retrofit, and say how slow a step may be before the target is
    missed."""
    hours, flops = (
        REFERENCE["device_hours"],
        plan["flops_per_step"] / (plan["batch"] * plan["length"]) * REFERENCE["tokens"],
    )
    theirs = flops * REFERENCE["steps"] / (hours * 3600 * REFERENCE["peak"])
    ours = plan["hours_to_cr8"] * plan["devices"]
    slowest = hours / REFERENCE["wanted"] / plan["devices"] * 3600 / REFERENCE["steps"]
    return (
        f"Reference: {hours:g} H100-hours, {theirs:.1%} of the peak in the same count of FLOPs. Predicted: {ours:.1f} "
        f"H100-hours, {hours / ours:.1f} times cheaper. It stays {REFERENCE['wanted']:g} times cheaper up to "
        f"{slowest:.1f} s per step, which is {plan['seconds_per_step'] / slowest * plan['mfu']:.0%} of the peak."
    )


def estimate_table(plans: list[dict[str, Any]]) -> str:
    """Return a Markdown table of the memory that the compiler reports and of the estimate."""
    lines = _header(
        ("model, hardware, mesh, attention", "mode, remat", "rows x length", "compiled, GiB", "estimated, GiB", "ratio")
    )
    for plan in plans:
        compiled, estimated = plan["bytes_per_device"]["total"], plan["estimated_bytes_per_device"]
        lines.append(
            _row(
                (
                    _title(plan),
                    f"{plan['mode']}, {plan['remat']}",
                    f"{plan['batch']} x {plan['length']}",
                    f"{compiled / GIB:.2f}",
                    f"{estimated / GIB:.2f}",
                    f"{estimated / compiled:.2f}",
                )
            )
        )
    return "\n".join(lines)


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _header(names: tuple[str, ...]) -> list[str]:
    return [_row(names), "|" + "---|" * len(names)]


def _title(plan: dict[str, Any]) -> str:
    return f"{Path(plan['model']).stem}, {plan['hardware']}, {plan['mesh']}, {plan['implementation']}"


if __name__ == "__main__":
    run_command(NAME, main)
