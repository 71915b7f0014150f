"""Measure what a cache policy costs: a retrofitted model, its dense self and training-free methods at equal live tokens.

    python -m infer.evaluate --model runs/retrofit/export --text FILE
    python -m infer.evaluate --model runs/retrofit/export --text prose=A.txt --text code=B.py --policies dense,dms,tova,h2o --budgets cr2,cr4 \\
        --tasks text,greedy,kept,needle_single --haystack A.txt --output results.jsonl

Budgets are live pairs per KV head ("256"), a ratio of the row's length ("cr4"), or "trained": dms as it is, the others with as many
live tokens as it kept. Every policy runs online, as in decoding. Results go to a .jsonl, from which a stopped run goes on.
"""

import argparse
import json

from dms_jax.command import Parser, start_devices
from dms_jax.commands.option_values import check_sampling, named, read_text
from dms_jax.errors import ConfigError, suggestion
from dms_jax.evaluation.results import TEXT_TASKS

NAME = "evaluate"


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(NAME, __doc__)
    add = parser.add_argument
    add(
        "--model",
        required=True,
        metavar="FOLDER",
        help="a folder with dms_* keys, or a plain one, alone or together with --adapter",
    )
    add("--adapter", metavar="FILE", help="an adapter of this base model")
    add(
        "--tasks",
        default="text",
        metavar="A,B",
        help="text, greedy, kept, or tasks with answers: infer/tasks/ (default text)",
    )
    add(
        "--policies",
        default="",
        metavar="A,B",
        help="default dense,dms,streaming_llm; prompt:NAME ranks once, after the prompt",
    )
    add("--budgets", default="", metavar="A,B", help='pairs per KV head ("256"), ratios ("cr4") or "trained" (default)')
    add(
        "--output",
        metavar="FILE",
        help="results, a .jsonl (default MODEL/evaluation.jsonl, or evaluation.jsonl next to a model file)",
    )
    text = parser.add_argument_group("given text")
    text.add_argument(
        "--text", action="append", default=[], metavar="[NAME=]FILE", help="UTF-8 text of one domain; repeat for more"
    )
    text.add_argument("--length", type=int, default=1024, help="tokens of a row, a multiple of --chunk")
    text.add_argument("--rows", type=int, default=16, help="rows of each text")
    text.add_argument("--calibration-rows", type=int, default=2, help="rows after those, to calibrate thresholds on")
    text.add_argument("--greedy-tokens", type=int, default=64, help="tokens that task greedy continues rows by")
    answers = parser.add_argument_group("tasks with answers")
    answers.add_argument("--count", type=int, default=20, help="problems, or repetitions of each cell of a grid")
    answers.add_argument("--lengths", default="1024", metavar="N,M", help="tokens of made-up prompts")
    answers.add_argument(
        "--depths", default="0,0.25,0.5,0.75,1", metavar="X,Y", help="where needles are put; 0 is the start"
    )
    answers.add_argument("--haystack", metavar="FILE", help="text to hide needles in")
    answers.add_argument(
        "--data", action="append", default=[], metavar="TASK=FILE", help="problems of a task: a .jsonl or hf:NAME"
    )
    answers.add_argument("--max-new-tokens", type=int, default=0, help="0: the task's own")
    answers.add_argument("--chains", type=int, default=1, help="answers to each problem, for majority vote and pass@k")
    answers.add_argument("--temperature", type=float, default=0.0)
    answers.add_argument("--top-p", type=float, default=1.0)
    answers.add_argument("--run-code", action="store_true", help="run generated programs, in a limited subprocess")
    add("--batch", type=int, default=8, help="rows at a time")
    add("--chunk", type=int, default=16, help="tokens between two rankings of a method with a budget")
    add("--seed", type=int, default=0)
    add("--json", action="store_true", help="print one JSON object a line of the table")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    options = parse(argv)
    tasks, data = _tasks(options), named(options.data, "--data")
    for name, least in {
        "length": 2,
        "rows": 1,
        "calibration_rows": 0,
        "greedy_tokens": 1,
        "count": 1,
        "chains": 1,
        "batch": 1,
        "chunk": 1,
    }.items():
        if getattr(options, name) < least:
            raise ConfigError(f"--{name.replace('_', '-')} must be at least {least}, got {getattr(options, name)}")
    if options.length % options.chunk:
        nearest = max(1, options.length // options.chunk) * options.chunk
        raise ConfigError(
            f"--length {options.length} is no multiple of --chunk {options.chunk}; use --length {nearest}"
        )
    if "greedy" in tasks and options.greedy_tokens >= options.length:
        raise ConfigError(
            f"--greedy-tokens {options.greedy_tokens} leaves nothing of rows of {options.length} to begin with; give fewer"
        )
    if "greedy" in tasks and "text" in tasks and tasks.index("greedy") < tasks.index("text"):
        tasks.remove("text")
        tasks.insert(0, "text")  # it says how much dms holds
    check_sampling(options, options.chains)
    if unknown := [name for name in data if name not in tasks or name in TEXT_TASKS]:
        raise ConfigError(
            f"--data names {unknown[0]!r}, which is not among --tasks {','.join(tasks)}; write --data TASK=FILE"
        )
    texts = {name: read_text(path) for name, path in named(options.text, "--text").items()}
    if (wanting := [task for task in tasks if task in TEXT_TASKS]) and not texts:
        raise ConfigError(f"task {wanting[0]} needs --text [NAME=]FILE")
    haystack = read_text(options.haystack) if options.haystack else ""
    start_devices(1)

    from dms_jax.evaluation.evaluation_run import EvaluationRun
    from dms_jax.evaluation.results_table import summary, table

    run = EvaluationRun(options, tasks, texts, data, haystack)
    run.run()
    lines = summary(run.file.records)  # of all that is in the file, whichever call measured it
    if options.json:
        for line in lines:
            print(json.dumps(line))
    else:
        print(table(lines))
        print(
            f"\nOnline: methods that rank pairs do so after every {options.chunk} tokens of a text or prompt and after each generated one; "
            "prompt:NAME ranks once, after the prompt."
        )
        path = run.file.path
        print(
            f"{path} holds every measurement. Next:\n  python -m infer.report {path} --output {path.parent / 'report'}"
        )


def _tasks(options: argparse.Namespace) -> list[str]:
    from dms_jax.tasks.registry import TASKS

    names = [name.strip() for name in options.tasks.split(",") if name.strip()]
    known = [*TEXT_TASKS, *TASKS]
    for name in names:
        if name not in known:
            raise ConfigError(f"--tasks: unknown task {name!r}; {suggestion(name, known)}")
    if not names:
        raise ConfigError(f"--tasks is empty; give some of {', '.join(known)}")
    return list(dict.fromkeys(names))
