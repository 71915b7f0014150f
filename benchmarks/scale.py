"""Retrofits of large models on many accelerators, compiled without them: the tables of docs/scale.md.

    python -m benchmarks.scale --output docs/measurements/scale.jsonl             # compiles what is not in the file yet; minutes each
    python -m benchmarks.scale --output docs/measurements/scale.jsonl --table     # prints the tables from it

Each line of the file is what `python -m train.plan ... --json` said, with its command and provenance. Delete lines to make them anew. The tables take
memory and what is sent from it, as the compilers said; estimates and times are reckoned when a table is printed, by the rates of dms_jax/roofline.py.
Part `scale` is large models on as many accelerators as they want; part `estimate` is where the estimate of memory was fitted to the compilers'.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from dms_jax.command import Parser, run_command
from dms_jax.errors import ConfigError

NAME = "benchmarks.scale"
PARTS = {
    "scale": (
        "--model configs/models/qwen3-8b.json --hardware h100x8 --mesh 8x1 --length 32768 --batch 8",
        "--model configs/models/qwen3-8b.json --hardware v5p-8 --mesh 8x1 --length 32768 --batch 8 --implementation pallas_tpu",
        "--model configs/models/r1-distill-qwen-32b.json --hardware v5p-64 --mesh 8x4x2 --length 32768 --batch 8 --implementation pallas_tpu",
        "--model configs/models/llama-3.1-70b.json --hardware v5p-256 --mesh 8x8x4 --length 32768 --batch 8 --implementation pallas_tpu",
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
        "--model configs/models/llama-3.2-1b.json --hardware h100x8 --mesh 8x1 --length 4096 --batch 32 --accumulate 4 --mode full",
        "--model configs/models/llama-3.2-1b.json --hardware h200x1 --length 4096 --batch 4 --mode borrowed",
        "--model configs/models/llama-3.2-1b.json --hardware v5e-8 --mesh 2x4 --length 8192 --batch 8",
        "--model configs/models/qwen3-8b.json --hardware v5p-8 --mesh 2x4 --length 8192 --batch 8",
    ),
}
# Model-Optimizer's README: Qwen3-8B to 8x, 238 steps of 8 x 32,768 tokens in 4 h on 8 H100.
REFERENCE = {"device_hours": 32.0, "steps": 238, "tokens": 8 * 32768, "peak": 989e12, "wanted": 5.0}
GIB = 2**30


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(
        prog=f"python -m {NAME}",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--output", required=True, metavar="FILE", help="JSON lines; read, and appended to")
    parser.add_argument("--part", choices=PARTS, action="append", help="only this one; may be given several times")
    parser.add_argument("--table", action="store_true", help="compile nothing, print what the file holds")
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
        arguments: reckoned(known[arguments]) for part in PARTS.values() for arguments in part if arguments in known
    }
    if "scale" in wanted:
        print(scale_table([plans[a] for a in PARTS["scale"] if a in plans]))
    if "estimate" in wanted:
        print(estimate_table(list(plans.values())))
    return 1 if failed else 0


def read(path: Path) -> dict[str, dict[str, Any]]:
    """Lines by their command's arguments. Raises ConfigError for a file that is none of this command's."""
    if not path.parent.is_dir() or path.is_dir():
        raise ConfigError(f"--output {path} is no file in a folder that exists")
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
        return {line["arguments"]: line for line in lines}
    except (ValueError, KeyError, TypeError) as why:
        raise ConfigError(f"{path} holds no lines of {NAME}: {why}") from why


def measure(part: str, arguments: str, path: Path) -> int:
    """Compiles in a process of its own: what one compiler holds does not add up to the next one's."""
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


def reckoned(line: dict[str, Any]) -> dict[str, Any]:
    """A line with what is not the compiler's by the formulas and rates of today."""
    from dms_jax.commands import plan
    from dms_jax.training.planning import step_plan

    setting, found = plan.setting_of(plan.parse(line["arguments"].split())), dict(line)
    estimate, held = step_plan.estimate_of(setting), line["bytes_per_device"]
    arguments = held["weights"] + held["optimizer"]
    found["estimated_bytes_per_device"] = estimate.total
    found["bytes_per_device"] = held | step_plan.with_compiled(estimate, arguments, held["total"] - arguments)._asdict()
    step_plan.add_times(found, setting)
    plan.add_hours(found, 0.0)
    return found


COLUMNS = (
    "model, hardware, mesh, attention",
    "rows x length",
    "GiB a device: total (weights, activations, logits, temporary)",
    "of",
    "sent by a device a step, GiB",
    "seconds a step",
    "utilisation",
    "hours to CR 8",
    "device-hours",
    "command",
)


def scale_table(plans: list[dict[str, Any]]) -> str:
    """Markdown: memory, what is sent, time, utilisation and cost, and under it the commands and the reference's cost."""
    lines = _header(COLUMNS)
    for number, plan in enumerate(plans, 1):
        held, sent, hours = plan["bytes_per_device"], plan["collective_bytes_per_device"], plan["hours_to_cr8"]
        parts = ", ".join(f"{held[kind] / GIB:.1f}" for kind in ("weights", "activations", "logits", "temporary"))
        memory = f"{held['total'] / GIB:.1f} ({parts})" + ("" if plan["fits"] else ": does not fit")
        said = ", ".join(
            f"{kind} {size / GIB:.1f}"
            for kind, size in sorted(sent.items(), key=lambda item: -item[1])
            if size >= GIB / 20
        )
        cells = (
            _title(plan),
            f"{plan['batch']} x {plan['length']}",
            memory,
            f"{plan['memory_per_device'] / GIB:.1f}",
            said,
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
    """The published cost of the same retrofit by the same count of FLOPs, and how far the prediction may be wrong before the target is missed."""
    hours, flops = (
        REFERENCE["device_hours"],
        plan["flops_per_step"] / (plan["batch"] * plan["length"]) * REFERENCE["tokens"],
    )
    theirs = flops * REFERENCE["steps"] / (hours * 3600 * REFERENCE["peak"])
    ours = plan["hours_to_cr8"] * plan["devices"]
    slowest = hours / REFERENCE["wanted"] / plan["devices"] * 3600 / REFERENCE["steps"]
    return (
        f"Reference: {hours:g} H100-hours, {theirs:.1%} of the peak by the same count. Predicted: {ours:.1f} H100-hours, {hours / ours:.1f} times "
        f"cheaper. {REFERENCE['wanted']:g} times holds up to {slowest:.1f} s a step, which is {plan['seconds_per_step'] / slowest * plan['mfu']:.0%} "
        "of the peak."
    )


def estimate_table(plans: list[dict[str, Any]]) -> str:
    """Markdown: what the compiler reports and what the estimate says."""
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
