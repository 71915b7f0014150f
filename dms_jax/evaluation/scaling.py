"""Hyper-scaling: the configurations, and the tables of accuracy over cost that compare them. Imports no JAX.

`scaling_run` measures; `frontier` defines how frontiers are compared.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dms_jax.errors import ConfigError
from dms_jax.evaluation.frontier import Point, frontier, gap
from dms_jax.evaluation.result_records import HYPERSCALE, HyperscaleRecord
from dms_jax.evaluation.results import Results

COSTS = {"kv_reads": "KV reads", "peak_live": "peak live tokens", "seconds": "seconds"}
MEANS = ("score", "kv_reads", "peak_live", "realised_cr", "new_tokens")
Line = dict[str, Any]


@dataclass(frozen=True)
class Configuration:
    """W-L-CR: W samples of at most L tokens per problem at compression ratio CR, where 1 is the dense model."""

    samples: int
    new_tokens: int
    cr: float

    def __str__(self) -> str:
        return f"{self.samples}-{self.new_tokens}-{self.cr:g}"


def parse_configurations(text: str) -> tuple[Configuration, ...]:
    """Parse a comma-separated list of W-L-CR."""
    found = [_configuration(part.strip()) for part in text.split(",") if part.strip()]
    if not found:
        raise ConfigError("--configs is empty; give e.g. 1-256-1,1-256-4,4-256-4")
    return tuple(dict.fromkeys(found))


def _configuration(part: str) -> Configuration:
    try:
        samples, new_tokens, cr = part.split("-")
        found = Configuration(int(samples), int(new_tokens), float(cr))
    except ValueError:
        found = None
    if found is None or found.samples < 1 or found.new_tokens < 1 or not 1 <= found.cr < float("inf"):
        raise ConfigError(f"--configs must be SAMPLES-TOKENS-CR,..., got {part!r}; write e.g. 4-512-2 (CR 1 is dense)")
    return found


def analyze(results: Results) -> list[Line]:
    """Return one line per configuration and then one per gap, for every task of the file. Raises ConfigError if the
    file has no such task."""
    records = [record for record in results.records if isinstance(record, HyperscaleRecord)]
    if not records:
        raise ConfigError("the file of results has no measurement of infer.hyperscale; give its --output")
    by_task: dict[str, list[HyperscaleRecord]] = {}
    for record in records:
        by_task.setdefault(record.task, []).append(record)
    return [line for task, mine in by_task.items() for line in _task_lines(task, mine)]


def _task_lines(task: str, records: list[HyperscaleRecord]) -> list[Line]:
    by_configuration: dict[tuple[str, str], list[HyperscaleRecord]] = {}
    for record in records:
        by_configuration.setdefault((record.policy, record.budget), []).append(record)
    # After an interrupted run, some configurations have fewer problems. Only those that all of them have are compared.
    common = set.intersection(*({record.unit for record in mine} for mine in by_configuration.values()))
    if not common:
        raise ConfigError(
            f"the configurations of {task} have no problem in common; run infer.hyperscale again with the same --output"
        )
    lines = [
        _configuration_line([record for record in mine if record.unit in common]) for mine in by_configuration.values()
    ]
    points: dict[str, dict[str, list[Point]]] = {}
    for line in lines:
        for cost in COSTS:
            mine = points.setdefault(line["policy"], {}).setdefault(cost, [])
            mine.append(Point(line[cost], line["score"], line["config"]))
    for line in lines:
        best = {cost: {point.name for point in frontier(points[line["policy"]][cost])} for cost in COSTS}
        line["on_frontier"] = [cost for cost in COSTS if line["config"] in best[cost]]
    return lines + list(_gap_lines(task, points))


def _configuration_line(records: list[HyperscaleRecord]) -> Line:
    decode_seconds = sum(record.decode_seconds for record in records)
    return {
        "task": records[0].task,
        "policy": records[0].policy,
        "config": records[0].budget,
        "problems": len(records),
        **{name: float(np.mean([getattr(record, name) for record in records])) for name in MEANS},
        "seconds": float(np.mean([record.prefill_seconds + record.decode_seconds for record in records])),
        "decode_tokens_per_s": sum(r.new_tokens for r in records) / decode_seconds if decode_seconds else None,
        "on_frontier": [],
    }


def _gap_lines(task: str, points: dict[str, dict[str, list[Point]]]) -> Iterable[Line]:
    for policy in points:
        if policy != "dense" and "dense" in points:
            for cost in COSTS:
                found = gap(points[policy][cost], points["dense"][cost])
                yield {
                    "task": task,
                    "policy": policy,
                    "cost": cost,
                    "gap": None if found is None else found._asdict(),
                }


def table(lines: Sequence[Line]) -> str:
    """Format the lines of `analyze` as text."""
    out = []
    for task in dict.fromkeys(line["task"] for line in lines):
        mine = [line for line in lines if line["task"] == task]
        configurations = [line for line in mine if "config" in line]
        title = f"{task.removeprefix(HYPERSCALE)}, {configurations[0]['problems']} problems, W-L-CR"
        costs = f"{'KV reads':>10}{'peak live':>11}{'seconds':>9}{'tokens/s':>10}"
        out.append(f"{title:<36}{'accuracy':>9}{'CR':>7}{costs}  frontier of")
        out += [*map(_configuration_row, configurations), *(_gap_row(line) for line in mine if "cost" in line)]
    return "\n".join(out)


def _configuration_row(line: Line) -> str:
    speed = "-" if line["decode_tokens_per_s"] is None else f"{line['decode_tokens_per_s']:.1f}"
    costs = f"{line['kv_reads']:>10.0f}{line['peak_live']:>11.0f}{line['seconds']:>9.2f}{speed:>10}"
    name, best = f"{line['policy']} {line['config']}", ", ".join(COSTS[cost] for cost in line["on_frontier"])
    return f"{name:<36}{line['score']:>9.1%}{line['realised_cr']:>7.2f}{costs}  {best}"


def _gap_row(line: Line) -> str:
    title = f"{line['policy']} against dense over {COSTS[line['cost']]}"
    if line["gap"] is None:
        return f"{title}: the costs have no common range"
    mean, low, high = line["gap"].values()
    return f"{title}: {mean:+.1%} accuracy on average from {low:.4g} to {high:.4g}"
