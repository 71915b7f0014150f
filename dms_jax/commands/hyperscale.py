"""Hyper-scaling: measure what more or longer answers gain once a compressed cache makes them cheap (arXiv:2506.05345).

    python -m infer.hyperscale --model runs/retrofit/export --task gsm8k --configs 1-256-1,1-256-4,4-256-4 \\
        --output scaling.jsonl
    python -m infer.hyperscale --results scaling.jsonl            # the tables again, without a model

A configuration W-L-CR samples W answers of at most L tokens to each problem, with a cache that keeps 1/CR of prompt
and answer; CR 1 is the dense model. A majority vote elects the answer; for code, one sample that passes is enough.
Each configuration gives a point of accuracy over each of three costs per problem: KV reads, peak live tokens and
seconds. dms_jax/evaluation/frontier.py defines how the Pareto frontiers of these points are compared.
"""

import argparse
import json

from dms_jax.command import Parser, start_devices
from dms_jax.commands.option_values import (
    add_run_code,
    check_option_ranges,
    check_run_code,
    check_samples,
    numbers,
    options_of,
)
from dms_jax.errors import ConfigError, suggestion
from dms_jax.evaluation.options import HyperscaleOptions
from dms_jax.evaluation.results import read_results
from dms_jax.evaluation.scaling import analyze, parse_configurations, table
from dms_jax.files import read_text
from dms_jax.writer_lock import only_writer

NAME = "hyperscale"


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(NAME, __doc__, compiles=True)
    add = parser.add_argument
    add("--results", metavar="FILE", help="print the tables of an earlier --output, without a model")
    add("--model", metavar="FOLDER", help="a retrofitted model, or a base model")
    add("--adapter", metavar="FILE", help="an adapter to load onto the base model")
    add("--allow-non-finite", action="store_true", help="load weights that have NaN or infinities, as they are")
    add("--task", default="gsm8k", help="a task with answers, e.g. gsm8k, math500, code (default gsm8k)")
    configs = "configurations to compare (default %(default)s)"
    add("--configs", default="1-256-1,1-256-4,4-256-4", metavar="W-L-CR,...", help=configs)
    add("--policies", default="dms", metavar="A,B", help="policies to run at each CR above 1 (default dms)")
    output = "the .jsonl file of results, which the same command continues (default %(default)s)"
    add("--output", metavar="FILE", default="hyperscale.jsonl", help=output)
    add("--count", type=int, default=20, metavar="N", help="number of problems (default 20)")
    add("--data", default="", metavar="FILE", help="the problems of the task, a .jsonl file or hf:NAME")
    calibration = "problems for thresholds and budgets of heads (default: problems of the task beyond --count)"
    add("--calibration-data", default="", metavar="FILE", help=calibration)
    add("--lengths", default="1024", metavar="N,M", help="lengths of generated prompts, in tokens (default 1024)")
    add("--haystack", metavar="FILE", help="the text in which needles are hidden")
    add("--temperature", type=float, default=0.7, metavar="X", help="sampling temperature (default 0.7)")
    add("--top-p", type=float, default=0.95, metavar="X", help="probability mass to sample from (default 0.95)")
    add_run_code(parser)
    add("--batch", type=int, default=8, metavar="N", help="answers that run together (default 8)")
    chunk = "tokens between two rankings, by methods that rank pairs (default 16)"
    add("--chunk", type=int, default=16, metavar="N", help=chunk)
    add("--seed", type=int, default=0, metavar="N", help="seed of generated problems and of sampling (default 0)")
    add("--json", action="store_true", help="print JSON lines instead of the tables")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    parsed = parse(argv)
    if bool(parsed.results) == bool(parsed.model):
        raise ConfigError(
            "exactly one of --model, to measure, and --results, to print the tables of earlier results, must be given"
        )
    if parsed.model:
        options = _options(parsed)
        with only_writer(options.output, "use another --output"):
            start_devices(1)

            from dms_jax.evaluation.scaling_run import measure

            measure(options)
    lines = analyze(read_results(parsed.results or parsed.output))
    if parsed.json:
        for line in lines:
            print(json.dumps(line))
    else:
        print(table(lines))


def _options(parsed: argparse.Namespace) -> HyperscaleOptions:
    """Check what can be checked without a model."""
    from dms_jax.tasks.registry import TASKS

    check_option_ranges(HyperscaleOptions, parsed)
    if parsed.task not in TASKS:
        raise ConfigError(f"--task: unknown task {parsed.task!r}; {suggestion(parsed.task, TASKS)}")
    check_run_code([parsed.task], parsed.run_code)
    configurations = parse_configurations(parsed.configs)
    samples = max(configuration.samples for configuration in configurations)
    check_samples(samples, parsed.temperature)
    if parsed.batch < samples:
        raise ConfigError(
            f"--batch must be at least the {samples} samples of one problem, got {parsed.batch}; use --batch {samples}"
        )
    return options_of(
        HyperscaleOptions,
        parsed,
        configs=configurations,
        lengths=numbers(parsed.lengths, int, "--lengths"),
        haystack=read_text(parsed.haystack) if parsed.haystack else "",
    )
