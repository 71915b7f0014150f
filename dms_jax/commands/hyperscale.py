"""Hyper-scaling: what more or longer chains bring when a compressed cache makes them cheap (arXiv:2506.05345).

    python -m infer.hyperscale --model runs/retrofit/export --task gsm8k --configs 1-256-1,1-256-4,4-256-4 --output scaling.jsonl
    python -m infer.hyperscale --results scaling.jsonl            # the tables again, without a model

A configuration W-L-CR is W chains of at most L tokens under a cache that keeps 1/CR of prompt and answer; CR 1 is the dense model. Answers
are voted on (code: any chain that passes). Each configuration gives a point for each of three costs a problem: KV reads, peak live tokens and
seconds; infer/frontier.py states how frontiers are compared.
"""

import argparse
import json
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from dms_jax.command import Parser, start_devices
from dms_jax.errors import ConfigError, suggestion
from dms_jax.evaluation.frontier import Point, frontier, gap
from dms_jax.evaluation.results import Results, read_results
from dms_jax.tasks.problem import Problem

NAME = "hyperscale"
PREFIX = "hyperscale/"  # of the task's name in the results
COSTS = {"kv_reads": "KV reads", "peak_live": "peak live tokens", "seconds": "seconds"}


@dataclass(frozen=True)
class Configuration:
    chains: int
    new_tokens: int
    cr: float

    def __str__(self) -> str:
        return f"{self.chains}-{self.new_tokens}-{self.cr:g}"


def parse_configurations(text: str) -> list[Configuration]:
    """W-L-CR, with commas between. Raises ConfigError."""
    found = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        try:
            chains, new_tokens, cr = part.split("-")
            found.append(Configuration(int(chains), int(new_tokens), float(cr)))
            right = found[-1].chains >= 1 and found[-1].new_tokens >= 1 and 1 <= found[-1].cr < float("inf")
        except ValueError:
            right = False
        if not right:
            raise ConfigError(
                f"--configs: {part!r} is none; give chains-tokens-CR, e.g. 4-512-2, with a CR of 1 for the dense model"
            )
    if not found:
        raise ConfigError("--configs is empty; give e.g. 1-256-1,1-256-4,4-256-4")
    return list(dict.fromkeys(found))


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(NAME, __doc__)
    add = parser.add_argument
    add("--results", metavar="FILE", help="make the tables of a file that was measured before; no model is needed")
    add("--model", metavar="FOLDER", help="a folder with dms_* keys, or a plain one together with --adapter")
    add("--adapter", metavar="FILE", help="an adapter of this base model")
    add("--task", default="gsm8k", help="a task with answers: infer/tasks/")
    add("--configs", default="1-256-1,1-256-4,4-256-4", metavar="W-L-CR,...")
    add("--policies", default="dms", metavar="A,B", help="for every CR above 1")
    add("--output", metavar="FILE", default="hyperscale.jsonl", help="results, from which a stopped run goes on")
    add("--count", type=int, default=20, help="problems")
    add("--data", default="", metavar="FILE", help="problems of the task: a .jsonl or hf:NAME")
    add("--lengths", default="1024", metavar="N,M", help="tokens of made-up prompts")
    add("--haystack", metavar="FILE", help="text to hide needles in")
    add("--temperature", type=float, default=0.7)
    add("--top-p", type=float, default=0.95)
    add("--run-code", action="store_true", help="run generated programs, in a limited subprocess")
    add("--batch", type=int, default=8, help="chains at a time")
    add("--chunk", type=int, default=16, help="tokens between two rankings of a method with a budget")
    add("--seed", type=int, default=0)
    add("--json", action="store_true", help="print JSON lines instead of the tables")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    options = parse(argv)
    if bool(options.results) == bool(options.model):
        raise ConfigError("give either --model, to measure, or --results, to make the tables of what was measured")
    path = options.results
    if not path:
        path = options.output
        measure(options, parse_configurations(options.configs))
    scaling = analyse(read_results(path))
    if options.json:
        for line in scaling:
            print(json.dumps(line))
    else:
        print(table(scaling))


def measure(options: argparse.Namespace, configurations: list[Configuration]) -> None:
    """Run what the file of results lacks."""
    for name in ("count", "batch", "chunk"):
        if getattr(options, name) < 1:
            raise ConfigError(f"--{name} must be at least 1, got {getattr(options, name)}")
    from dms_jax.commands.option_values import check_sampling, numbers, read_text
    from dms_jax.tasks.problem import TaskOptions
    from dms_jax.tasks.registry import TASKS

    if options.task not in TASKS:
        raise ConfigError(f"--task: unknown task {options.task!r}; {suggestion(options.task, TASKS)}")
    task, haystack = TASKS[options.task], read_text(options.haystack) if options.haystack else ""
    lengths = numbers(options.lengths, int, "--lengths")
    check_sampling(options, max(config.chains for config in configurations))
    if options.batch < (most := max(config.chains for config in configurations)):
        raise ConfigError(f"--batch {options.batch} has no room for {most} chains; use --batch {most} or more")
    start_devices(1)
    from tqdm import tqdm

    from dms_jax.evaluation.answer_measure import AnswerMeasure, Sampling
    from dms_jax.evaluation.arms import Arm, Settings, check_arm, check_learned, parse_arms
    from dms_jax.evaluation.evaluation_run import digest, load_model, open_results

    model, tokenizer = load_model(options)
    fixed = {key: getattr(options, key) for key in ("temperature", "top_p", "chunk", "seed", "count")} | {
        "dtype": str(model.embed[...].dtype)
    }
    task_options = TaskOptions(
        options.count, options.seed, lengths, data=options.data, haystack=haystack, run_code=options.run_code
    )
    problems = task.problems(task_options, lambda text: len(tokenizer.encode(text)))
    fixed |= {f"problems:{task.name}": digest(repr(problems))}
    file = open_results(options, model, options.output, fixed)
    settings = Settings(model)
    policies = list(dict.fromkeys(arm.policy for arm in parse_arms(options.policies, "cr2")))
    check_learned(model, policies, options.model)
    runs = [
        (c, policy)
        for c in configurations
        for policy in (policies if c.cr > 1 else ["dense"])
        if c.cr == 1 or policy != "dense"
    ]
    with tqdm(total=len(runs) * len(problems), desc=options.task, unit="problem", disable=None) as bar:
        for config, policy in runs:
            bar.set_postfix_str(f"{policy} {config}")
            sampling = Sampling(config.chains, options.temperature, options.top_p, options.seed)
            rows = max(1, options.batch // config.chains)
            answers = AnswerMeasure(
                model, tokenizer, settings, file, sampling, rows, options.chunk, PREFIX, str(config)
            )
            arm = Arm(policy, f"cr{config.cr:g}" if config.cr > 1 else "")
            for group in answers.groups(
                task, [replace(problem, max_new_tokens=config.new_tokens) for problem in problems]
            ):
                check_arm(model, arm, group.length)
                for some, prompts in answers.batches(group):
                    if any((PREFIX + task.name, policy, str(config), p.unit) not in file.done for p in some):
                        chains = answers.answers(task, group, arm, some, prompts)
                        for i, problem in enumerate(some):
                            record = together(problem, chains[i * config.chains : (i + 1) * config.chains])
                            record |= {
                                "task": PREFIX + task.name,
                                "policy": policy,
                                "budget": str(config),
                                "unit": problem.unit,
                            }
                            if (PREFIX + task.name, policy, str(config), problem.unit) not in file.done:
                                file.append(record)
                    bar.update(len(some))
            answers.clock.close()


def together(problem: Problem, chains: list[dict]) -> dict:
    """One record of all chains of a problem: costs added up, answers voted on or, for code, any that passes."""
    from dms_jax.tasks.votes import majority_vote

    scores = [chain["score"] for chain in chains]
    score = max(scores) if problem.tests else scores[majority_vote([chain["extracted"] for chain in chains])]
    added = {
        key: float(sum(chain[key] for chain in chains))
        for key in ("kv_reads", "peak_live", "new_tokens", "prefill_seconds", "decode_seconds")
    }
    mean = {key: float(np.mean([chain[key] for chain in chains])) for key in ("live_tokens", "realised_cr")}
    texts = [chain["text"] for chain in chains]
    return {"score": score, "scores": scores, **added, **mean, "texts": texts, "groups": problem.groups}


def analyse(results: Results) -> list[dict]:
    """A line a configuration and a line a gap, for every task of the file. Raises ConfigError when it holds none."""
    records = [record for record in results.records if record["task"].startswith(PREFIX)]
    if not records:
        raise ConfigError(f"no measurement of {NAME} in this file; give the --output of one")
    lines: list[dict[str, Any]] = []
    for task in dict.fromkeys(record["task"] for record in records):
        # An interrupted run has configurations with fewer problems: compared is what all have.
        of_config: dict[tuple[str, str], set[str]] = {}
        for r in records:
            if r["task"] == task:
                of_config.setdefault((r["policy"], r["budget"]), set()).add(r["unit"])
        common = set.intersection(*of_config.values())
        if not common:
            raise ConfigError(
                f"the configurations of {task} have no problem in common; run {NAME} again with the same --output"
            )
        points: dict[str, dict[str, list[Point]]] = {}
        for policy, budget in of_config:
            mine = [
                r
                for r in records
                if (r["task"], r["policy"], r["budget"]) == (task, policy, budget) and r["unit"] in common
            ]
            mean = {
                key: float(np.mean([r[key] for r in mine]))
                for key in ("score", "kv_reads", "peak_live", "realised_cr", "new_tokens")
            }
            seconds = float(np.mean([r["prefill_seconds"] + r["decode_seconds"] for r in mine]))
            decode = sum(r["decode_seconds"] for r in mine)
            line: dict[str, Any] = {
                "task": task,
                "policy": policy,
                "config": budget,
                "problems": len(mine),
                **mean,
                "seconds": seconds,
                "decode_tokens_per_s": sum(r["new_tokens"] for r in mine) / decode if decode else None,
                "on_frontier": [],
            }
            lines.append(line)
            for cost in COSTS:
                points.setdefault(policy, {}).setdefault(cost, []).append(Point(line[cost], line["score"], budget))
        for line in lines:
            if line["task"] == task:
                best = {cost: {p.name for p in frontier(points[line["policy"]][cost])} for cost in COSTS}
                line["on_frontier"] = [cost for cost in COSTS if line["config"] in best[cost]]
        for policy in points:
            if policy != "dense" and "dense" in points:
                for cost in COSTS:
                    found = gap(points[policy][cost], points["dense"][cost])
                    lines.append(
                        {
                            "task": task,
                            "policy": policy,
                            "cost": cost,
                            "gap": None if found is None else found._asdict(),
                        }
                    )
    return lines


def table(lines: list[dict]) -> str:
    """For people."""
    out = []
    for task in dict.fromkeys(line["task"] for line in lines):
        title = f"{task.removeprefix(PREFIX)}, {next(line['problems'] for line in lines if line['task'] == task)} problems, W-L-CR"
        costs = f"{'KV reads':>10}{'peak live':>11}{'seconds':>9}{'tokens/s':>10}"
        out.append(f"{title:<36}{'accuracy':>9}{'CR':>7}{costs}  frontier of")
        for line in (line for line in lines if line["task"] == task and "config" in line):
            speed = "-" if line["decode_tokens_per_s"] is None else f"{line['decode_tokens_per_s']:.1f}"
            costs = f"{line['kv_reads']:>10.0f}{line['peak_live']:>11.0f}{line['seconds']:>9.2f}{speed:>10}"
            name, best = f"{line['policy']} {line['config']}", ", ".join(COSTS[cost] for cost in line["on_frontier"])
            out.append(f"{name:<36}{line['score']:>9.1%}{line['realised_cr']:>7.2f}{costs}  {best}")
        for line in (line for line in lines if line["task"] == task and "cost" in line):
            if line["gap"] is None:
                out.append(f"{line['policy']} against dense over {COSTS[line['cost']]}: the costs have no common range")
            else:
                mean, low, high = line["gap"].values()
                out.append(
                    f"{line['policy']} against dense over {COSTS[line['cost']]}: {mean:+.1%} accuracy on average from {low:.4g} to {high:.4g}"
                )
    return "\n".join(out)
