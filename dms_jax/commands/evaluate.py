"""Measure what a cache policy costs: a retrofitted model, its dense self and training-free methods at equal live
tokens.

    python -m infer.evaluate --model runs/retrofit/export --text FILE
    python -m infer.evaluate --model runs/retrofit/export --text prose=A.txt --text code=B.py --policies dense,dms,tova,h2o --budgets cr2,cr4 \\
        --tasks text,greedy,kept,needle_single --haystack A.txt --output results.jsonl

A budget is a number of live pairs per KV head ("256"), a ratio of the row's length ("cr4"), or "trained": dms with its
own threshold, the others with as many live tokens as dms kept. Every policy runs online, as in decoding. Results go to
a .jsonl file; run the same command again to continue one that was stopped.
"""

import argparse
import json

from dms_jax.command import Parser, start_devices, typed_as
from dms_jax.commands.option_values import check_option_ranges, check_samples, named, numbers, options_of
from dms_jax.errors import ConfigError, suggestion
from dms_jax.evaluation.options import EvaluationOptions
from dms_jax.evaluation.result_records import RECORDS
from dms_jax.files import read_text

NAME = "evaluate"


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(NAME, __doc__)
    add = parser.add_argument
    add("--model", required=True, metavar="FOLDER", help="retrofitted folder, or a plain one, alone or with --adapter")
    add("--adapter", metavar="FILE", help="adapter of this base model")
    add("--tasks", default="text", metavar="A,B", help="text, greedy, kept, or tasks with answers (default text)")
    policies = "cache policies; prompt:NAME ranks once, after the prompt (default dense,dms,streaming_llm)"
    add("--policies", default="", metavar="A,B", help=policies)
    add("--budgets", default="", metavar="A,B", help='pairs per KV head ("256"), ratios ("cr4") or "trained" (default)')
    add(
        "--output",
        metavar="FILE",
        help="results, a .jsonl (default evaluation.jsonl in MODEL, or next to a model file)",
    )
    add("--batch", type=int, default=8, help="rows at a time (default 8)")
    add("--chunk", type=int, default=16, help="tokens between two rankings of a method with a budget (default 16)")
    add("--seed", type=int, default=0, help="of problems and sampling (default 0)")
    add("--json", action="store_true", help="print one JSON object per line of the tables")
    _add_text_options(parser.add_argument_group("given text"))
    _add_answer_options(parser.add_argument_group("tasks with answers"))
    return parser.parse_args(argv)


def _add_text_options(group) -> None:
    add = group.add_argument
    add("--text", action="append", default=[], metavar="[NAME=]FILE", help="UTF-8 text of one domain; repeat for more")
    add("--length", type=int, default=1024, help="tokens per row, a multiple of --chunk (default 1024)")
    add("--rows", type=int, default=16, help="rows of each text (default 16)")
    add("--calibration-rows", type=int, default=2, help="further rows, to calibrate thresholds on (default 2)")
    add("--greedy-tokens", type=int, default=64, help="tokens by which task greedy continues each row (default 64)")


def _add_answer_options(group) -> None:
    add = group.add_argument
    add("--count", type=int, default=20, help="problems, or repetitions of each cell of a grid (default 20)")
    add("--lengths", default="1024", metavar="N,M", help="tokens of generated prompts (default 1024)")
    add("--depths", default="0,0.25,0.5,0.75,1", metavar="X,Y", help="positions of needles; 0 is the start, 1 the end")
    add("--haystack", metavar="FILE", help="text to hide needles in")
    add("--data", action="append", default=[], metavar="TASK=FILE", help="problems of a task: a .jsonl or hf:NAME")
    add("--max-new-tokens", type=int, default=0, help="tokens per answer (default 0, the task's own)")
    add("--chains", type=int, default=1, help="answers to each problem, for majority vote and pass@k (default 1)")
    add("--temperature", type=float, default=0.0, help="of sampling; 0 is greedy (default 0)")
    add("--top-p", type=float, default=1.0, help="of sampling; 1 is off (default 1)")
    add("--run-code", action="store_true", help="run generated programs, in a limited subprocess")


def main(argv: list[str] | None = None) -> None:
    parsed = parse(argv)
    options = _options(parsed)
    start_devices(1)

    from dms_jax.evaluation.evaluation_run import measure, prepare
    from dms_jax.evaluation.results_table import summary, table

    evaluation = prepare(options)
    measure(evaluation)
    path = evaluation.file.path
    lines = summary(evaluation.file.records)  # of everything in the file, whichever run measured it
    if parsed.json:
        for line in lines:
            print(json.dumps(line))
        return
    print(table(lines))
    print(
        f"\nOnline: methods that rank pairs do so after every {options.chunk} tokens of a text or prompt and after each "
        "generated one; prompt:NAME ranks once, after the prompt."
    )
    print(f"All measurements are in {path}. Next:\n  {typed_as('report')} {path} --output {path.parent / 'report'}")


def _options(parsed: argparse.Namespace) -> EvaluationOptions:
    """Check what can be checked without a model."""
    check_option_ranges(EvaluationOptions, parsed)
    tasks, data = _tasks(parsed.tasks), named(parsed.data, "--data")
    if parsed.length % parsed.chunk:
        nearest = max(1, parsed.length // parsed.chunk) * parsed.chunk
        raise ConfigError(
            f"--length must be a multiple of --chunk {parsed.chunk}, got {parsed.length}; use --length {nearest}"
        )
    if "greedy" in tasks and parsed.greedy_tokens >= parsed.length:
        raise ConfigError(
            f"--greedy-tokens must be less than --length {parsed.length}, got {parsed.greedy_tokens}; use fewer"
        )
    check_samples(parsed.chains, parsed.temperature)
    if unknown := [name for name in data if name not in tasks or name in RECORDS]:
        raise ConfigError(
            f"--data: {unknown[0]!r} is not a task with answers among --tasks {','.join(tasks)}; write --data TASK=FILE"
        )
    texts = {name: read_text(path) for name, path in named(parsed.text, "--text").items()}
    if (on_text := [task for task in tasks if task in RECORDS]) and not texts:
        raise ConfigError(f"task {on_text[0]} needs --text [NAME=]FILE")
    return options_of(
        EvaluationOptions,
        parsed,
        tasks=tasks,
        texts=texts,
        lengths=numbers(parsed.lengths, int, "--lengths"),
        depths=numbers(parsed.depths, float, "--depths"),
        haystack=read_text(parsed.haystack) if parsed.haystack else "",
        data=data,
    )


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
