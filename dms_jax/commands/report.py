"""One HTML page with all that was measured, and its figures as PNGs, from files of results alone.

    python -m infer.report runs/eval/results.jsonl --output runs/eval/report

FOLDER/report.html needs no network and no other file. Files of an earlier report in FOLDER are replaced.
"""

import argparse
import os
from pathlib import Path

from dms_jax.command import Parser
from dms_jax.errors import ConfigError

NAME = "report"
SECTIONS = {  # in the order of the page -> what it says when it is missing, and what makes infer.evaluate add it
    "text": ("perplexity and KL on text", "text --text FILE"),
    "answers": ("accuracy on tasks with answers", "copy,recall"),
    "needles": ("needles by length and depth", "needle_single --haystack FILE"),
    "greedy": ("greedy continuations next to those of dense", "text,greedy --text FILE"),
    "kept": ("what DMS keeps and forgets", "text,kept --text FILE"),
}


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(NAME, __doc__)
    parser.add_argument(
        "results", nargs="+", metavar="RESULTS.jsonl", help="what infer.evaluate wrote; several files make one report"
    )
    parser.add_argument(
        "--output", required=True, metavar="FOLDER", help="where report.html and the PNGs go; made if it is not there"
    )
    parser.add_argument("--title", default="What DMS forgets, and what it costs", help="of the page")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    files = build(options.results, options.title)
    write_files(Path(options.output), files)
    print(f"{Path(options.output) / 'report.html'} and {len(files) - 1} PNGs")
    return 0


def build(paths: list[str], title: str) -> dict[str, bytes]:
    """Name -> content of all files of the report, the page last. Raises ConfigError."""
    from dms_jax.evaluation import aggregate as data
    from dms_jax.reporting import report_sections as sections
    from dms_jax.reporting.report_page import page
    from dms_jax.reporting.report_summary import summary

    measured = data.read_measured(paths)
    texts, answers = data.text_groups(measured.kind("text")), data.answer_arms(measured.kind("answers"))
    greedy, kept = data.greedy_arms(measured.kind("greedy")), data.kept_arms(measured.kind("kept"))
    made = {
        "text": sections.text_section(texts),
        "answers": sections.answer_section(answers),
        "needles": sections.needle_section(answers),
        "greedy": sections.greedy_section(greedy),
        "kept": sections.kept_section(kept),
    }
    missing = [
        f"Not measured: {what}. To add it: <code>python -m infer.evaluate --model FOLDER --tasks {task} --output FILE</code>"
        for name, (what, task) in SECTIONS.items()
        if made[name] is None
    ]
    present = [section for name in SECTIONS if (section := made[name])]
    whole = page(
        title, summary(texts, answers, greedy, kept), measured.headers, [section.html for section in present], missing
    )
    pngs = {name: content for section in present for name, content in section.pngs.items()}
    return pngs | {"report.html": whole.encode("utf-8")}


def write_files(folder: Path, files: dict[str, bytes]) -> None:
    """All of them, each whole: a reader of the folder never sees half a file. Raises ConfigError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            temporary = folder / f".{name}.{os.getpid()}"
            try:
                temporary.write_bytes(content)
                os.replace(temporary, folder / name)
            finally:
                temporary.unlink(missing_ok=True)
    except OSError as why:
        raise ConfigError(f"cannot write {folder}: {why.strerror or why}; give another --output") from why
