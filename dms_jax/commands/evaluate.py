"""Measure what a cache policy costs: compare a retrofitted model with the dense model, and with training-free methods
that keep as many live tokens.

    python -m infer.evaluate --model runs/retrofit/export --text FILE
    python -m infer.evaluate --model runs/retrofit/export --text prose=A.txt --text code=B.py \\
        --policies dense,dms,tova,h2o --budgets cr2,cr4 --tasks text,greedy,kept,needle_single --haystack A.txt \\
        --output results.jsonl

A budget is a number of live pairs per KV head ("256"), a compression ratio ("cr4" keeps a quarter of the row), or
"trained": dms uses its own threshold, and the others keep as many live tokens as dms did. Every policy runs online, as
in decoding. Results go to a .jsonl file. To continue a run that was stopped, run the same command again.
"""

import argparse
import json
import os
import shlex
import sys

from dms_jax.command import Parser, typed_as
from dms_jax.commands.option_values import (
    add_inference_mesh,
    add_run_code,
    check_option_ranges,
    check_run_code,
    check_samples,
    inference_mesh,
    named,
    numbers,
    options_of,
)
from dms_jax.errors import ConfigError, suggestion
from dms_jax.evaluation.options import EvaluationOptions
from dms_jax.evaluation.result_records import RECORDS
from dms_jax.files import check_target, read_text
from dms_jax.writer_lock import only_writer

NAME = "evaluate"


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(NAME, __doc__, compiles=True)
    add = parser.add_argument
    add("--model", required=True, metavar="FOLDER", help="a retrofitted model, or a base model")
    add("--adapter", metavar="FILE", help="an adapter to load onto the base model")
    add("--allow-non-finite", action="store_true", help="load weights that have NaN or infinities, as they are")
    add("--tasks", default="text", metavar="A,B", help=f"{', '.join(RECORDS)}, or tasks with answers (default text)")
    policies = "policies; prompt:NAME ranks pairs only once, after the prompt; under adakv:NAME, heads share budgets"
    add("--policies", default="", metavar="A,B", help=f"{policies} (default dense,dms,streaming_llm)")
    add("--budgets", default="", metavar="A,B", help='pairs per KV head ("256"), ratios ("cr4") or "trained" (default)')
    add(
        "--output",
        metavar="FILE",
        help="the .jsonl file of results (default MODEL.evaluation.jsonl, beside the model's folder)",
    )
    add("--batch", type=int, default=8, metavar="N", help="rows or prompts that run together (default 8)")
    chunk = "tokens between two rankings, by methods that rank pairs (default 16)"
    add("--chunk", type=int, default=16, metavar="N", help=chunk)
    add("--seed", type=int, default=0, metavar="N", help="seed of generated problems and of sampling (default 0)")
    add("--json", action="store_true", help="print each line of the tables as a JSON object")
    add_inference_mesh(parser)
    _add_text_options(parser.add_argument_group("tasks on given text"))
    _add_answer_options(parser.add_argument_group("tasks with answers"))
    return parser.parse_args(argv)


def _add_text_options(group) -> None:
    add = group.add_argument
    add("--text", action="append", default=[], metavar="[NAME=]FILE", help="UTF-8 text of one domain; may be repeated")
    add("--length", type=int, default=1024, metavar="N", help="tokens per row, a multiple of --chunk (default 1024)")
    add("--rows", type=int, default=16, metavar="N", help="rows to measure in each text (default 16)")
    calibration = "rows after those, on which thresholds and budgets of heads are calibrated (default 2)"
    add("--calibration-rows", type=int, default=2, metavar="N", help=calibration)
    greedy = "tokens that the task greedy generates for each row (default 64)"
    add("--greedy-tokens", type=int, default=64, metavar="N", help=greedy)
    live = "with the task kept: also write the live pairs of each KV head to FILE, for benchmarks"
    add("--live-counts", metavar="FILE", help=live)


def _add_answer_options(group) -> None:
    add = group.add_argument
    count = "problems; for generated prompts, problems of each length and depth (default 20)"
    add("--count", type=int, default=20, metavar="N", help=count)
    add("--lengths", default="1024", metavar="N,M", help="lengths of generated prompts, in tokens (default 1024)")
    depths = "depths of needles, from 0 (start) to 1 (end) (default %(default)s)"
    add("--depths", default="0,0.25,0.5,0.75,1", metavar="X,Y", help=depths)
    add("--haystack", metavar="FILE", help="the text in which needles are hidden")
    data = "the problems of a task, a .jsonl file or hf:NAME; may be repeated"
    add("--data", action="append", default=[], metavar="TASK=FILE", help=data)
    calibration = "problems for thresholds and budgets of heads (default: problems of the task beyond --count)"
    add("--calibration-data", action="append", default=[], metavar="TASK=FILE", help=calibration)
    limit = "maximum tokens of an answer; 0 is the task's own limit (default 0)"
    add("--max-new-tokens", type=int, default=0, metavar="N", help=limit)
    chains = "answers to each problem, for majority vote and pass@k (default 1)"
    add("--chains", type=int, default=1, metavar="N", help=chains)
    add("--temperature", type=float, default=0.0, metavar="X", help="sampling temperature; 0 is greedy (default 0)")
    add("--top-p", type=float, default=1.0, metavar="X", help="probability mass to sample from; 1 is all (default 1)")
    add_run_code(group)


def main(argv: list[str] | None = None) -> None:
    parsed = parse(argv)
    options = _options(parsed)
    with (
        only_writer(options.output, "use another --output"),
        inference_mesh(parsed.mesh, options.batch, f"--batch {options.batch}"),
    ):
        _evaluate(
            options, parsed.json, shlex.join([*typed_as(NAME).split(), *(sys.argv[1:] if argv is None else argv)])
        )


def _evaluate(options: EvaluationOptions, as_json: bool, command: str) -> None:
    """Measure what the results file lacks, and print the tables of all that it holds."""
    from dms_jax.evaluation.evaluation_run import measure, prepare, write_counts
    from dms_jax.evaluation.results_table import summary, table

    evaluation = prepare(options)
    measure(evaluation)
    if options.live_counts:
        write_counts(evaluation, options, command)
    path = evaluation.file.path
    lines = summary(evaluation.file.records)  # includes what earlier runs measured into the same file
    if as_json:
        for line in lines:
            print(json.dumps(line))
        return
    print(table(lines))
    print(
        f"\nMethods that rank pairs do so after every {options.chunk} tokens of a text or prompt and after each "
        "generated token; prompt:NAME ranks only once, after the prompt."
    )
    print(f"All measurements are in {path}. Next:\n  {typed_as('report')} {path} --output {path.parent / 'report'}")


def _options(parsed: argparse.Namespace) -> EvaluationOptions:
    """Check what can be checked without a model."""
    check_option_ranges(EvaluationOptions, parsed)
    tasks = _tasks(parsed.tasks)
    data, calibration_data = (
        _data(tasks, values, option)
        for values, option in ((parsed.data, "--data"), (parsed.calibration_data, "--calibration-data"))
    )
    if parsed.length % parsed.chunk:
        nearest = max(1, parsed.length // parsed.chunk) * parsed.chunk
        raise ConfigError(
            f"--length must be a multiple of --chunk {parsed.chunk}, got {parsed.length}; use --length {nearest}"
        )
    if "greedy" in tasks and parsed.greedy_tokens >= parsed.length:
        raise ConfigError(
            f"--greedy-tokens must be less than --length {parsed.length}, got {parsed.greedy_tokens}; "
            f"use --greedy-tokens {parsed.length // 2}"
        )
    if parsed.live_counts is not None:
        _check_live_counts(parsed.live_counts, tasks)
    check_samples(parsed.chains, parsed.temperature)
    check_run_code(tasks, parsed.run_code)
    texts = {name: read_text(path) for name, path in named(parsed.text, "--text").items()}
    if (on_text := [task for task in tasks if task in RECORDS]) and not texts:
        raise ConfigError(f"--text is missing, which --tasks {on_text[0]} needs; give --text [NAME=]FILE")
    return options_of(
        EvaluationOptions,
        parsed,
        tasks=tasks,
        texts=texts,
        lengths=numbers(parsed.lengths, int, "--lengths"),
        depths=numbers(parsed.depths, float, "--depths"),
        output=parsed.output or default_output(parsed.model),
        haystack=read_text(parsed.haystack) if parsed.haystack else "",
        data=data,
        calibration_data=calibration_data,
    )


def _data(tasks: tuple[str, ...], values: list[str], option: str) -> dict[str, str]:
    data = named(values, option)
    if unknown := [name for name in data if name not in tasks or name in RECORDS]:
        raise ConfigError(
            f"{option}: {unknown[0]!r} is not one of the tasks with answers in --tasks {','.join(tasks)}; "
            f"write {option} TASK=FILE"
        )
    return data


def _check_live_counts(path: str, tasks: tuple[str, ...]) -> None:
    if "kept" not in tasks:
        raise ConfigError(f"--live-counts needs the task kept, got --tasks {','.join(tasks)}; add kept to --tasks")
    check_target(path)
    if not os.path.isdir(os.path.dirname(path) or "."):
        raise ConfigError(f"--live-counts must be a file in an existing folder, got {path}; make the folder first")


def default_output(model: str) -> str:
    """Return the path of the results beside the folder or file of a model, or in the working directory for a hub id.

    Earlier versions wrote `evaluation.jsonl` into the folder itself. A file that is there is continued.
    """
    if not os.path.exists(model):
        return "evaluation.jsonl"
    path = f"{os.path.abspath(model)}.evaluation.jsonl"
    folder = model if os.path.isdir(model) else os.path.dirname(model)
    former = os.path.join(folder, "evaluation.jsonl")
    if os.path.exists(former) and not os.path.exists(path):
        print(f"continuing {former}; new results go to {path}, so you may move that file there", file=sys.stderr)
        return former
    return path


def _tasks(text: str) -> tuple[str, ...]:
    from dms_jax.tasks.registry import TASKS

    names = [name.strip() for name in text.split(",") if name.strip()]
    known = [*RECORDS, *TASKS]
    for name in names:
        if name not in known:
            raise ConfigError(f"--tasks: unknown task {name!r}; {suggestion(name, known)}")
    if not names:
        raise ConfigError(f"--tasks is empty; give some of {', '.join(known)}")
    return tuple(dict.fromkeys(names))
