"""Hyper-scaling: what more or longer answers gain when a compressed cache makes them cheap (arXiv:2506.05345).

    python -m infer.hyperscale --model runs/retrofit/export --task gsm8k --configs 1-256-1,1-256-4,4-256-4 --output scaling.jsonl
    python -m infer.hyperscale --results scaling.jsonl            # the tables again, without a model

A configuration W-L-CR samples W answers of at most L tokens with a cache that keeps 1/CR of prompt and answer; CR 1 is
the dense model. A vote elects the answer (for code, any sample that passes). Each configuration is a point of accuracy
over each of three costs per problem: KV reads, peak live tokens and seconds. dms_jax/evaluation/frontier.py states how
frontiers are compared.
"""

import argparse
import json

from dms_jax.command import Parser, start_devices
from dms_jax.commands.option_values import check_option_ranges, check_samples, numbers, options_of
from dms_jax.errors import ConfigError, suggestion
from dms_jax.evaluation.options import HyperscaleOptions
from dms_jax.evaluation.results import read_results
from dms_jax.evaluation.scaling import analyse, parse_configurations, table
from dms_jax.files import read_text

NAME = "hyperscale"


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(NAME, __doc__)
    add = parser.add_argument
    add("--results", metavar="FILE", help="print the tables of an earlier --output; needs no model")
    add("--model", metavar="FOLDER", help="retrofitted folder, or a plain one with --adapter")
    add("--adapter", metavar="FILE", help="adapter of this base model")
    add("--task", default="gsm8k", help="a task with answers, e.g. gsm8k, math500, code (default gsm8k)")
    add("--configs", default="1-256-1,1-256-4,4-256-4", metavar="W-L-CR,...", help="SAMPLES-TOKENS-CR, see above")
    add("--policies", default="dms", metavar="A,B", help="used at every CR above 1 (default dms)")
    add("--output", metavar="FILE", default="hyperscale.jsonl", help="results; a stopped run continues from them")
    add("--count", type=int, default=20, help="problems (default 20)")
    add("--data", default="", metavar="FILE", help="problems of the task: a .jsonl or hf:NAME")
    add("--lengths", default="1024", metavar="N,M", help="tokens of generated prompts (default 1024)")
    add("--haystack", metavar="FILE", help="text to hide needles in")
    add("--temperature", type=float, default=0.7, help="of sampling (default 0.7)")
    add("--top-p", type=float, default=0.95, help="of sampling; 1 is off (default 0.95)")
    add("--run-code", action="store_true", help="run generated programs, in a limited subprocess")
    add("--batch", type=int, default=8, help="answers at a time (default 8)")
    add("--chunk", type=int, default=16, help="tokens between two rankings of a method with a budget (default 16)")
    add("--seed", type=int, default=0, help="of problems and sampling (default 0)")
    add("--json", action="store_true", help="print JSON lines instead of the tables")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    parsed = parse(argv)
    if bool(parsed.results) == bool(parsed.model):
        raise ConfigError("give either --model, to measure, or --results, to print the tables of earlier results")
    if parsed.model:
        options = _options(parsed)
        start_devices(1)

        from dms_jax.evaluation.scaling_run import measure

        measure(options)
    lines = analyse(read_results(parsed.results or parsed.output))
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
    configurations = parse_configurations(parsed.configs)
    samples = max(configuration.samples for configuration in configurations)
    check_samples(samples, parsed.temperature)
    if parsed.batch < samples:
        raise ConfigError(f"--batch must be at least the {samples} samples of one problem, got {parsed.batch}")
    return options_of(
        HyperscaleOptions,
        parsed,
        configs=configurations,
        lengths=numbers(parsed.lengths, int, "--lengths"),
        haystack=read_text(parsed.haystack) if parsed.haystack else "",
    )
