"""Turn files of results into one HTML page, with its figures also as PNGs.

    python -m infer.report runs/eval/results.jsonl --output runs/eval/report

FOLDER/report.html needs no network and no other file. Files of an earlier report in FOLDER are replaced.
"""

import argparse
from pathlib import Path

from dms_jax.command import Parser
from dms_jax.errors import ConfigError
from dms_jax.files import replacing

NAME = "report"
# In every report; earlier versions wrote the second one only.
MARKS = (b'name="generator" content="dms_jax"', b'class="dot" style="background: var(--')


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(NAME, __doc__)
    parser.add_argument(
        "results", nargs="+", metavar="RESULTS.jsonl", help="files that `evaluate` wrote; several make one report"
    )
    parser.add_argument(
        "--output", required=True, metavar="FOLDER", help="the folder to write; it is created if missing"
    )
    parser.add_argument(
        "--title", default="What DMS forgets, and what it costs", help="title of the page (default: %(default)s)"
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    page = Path(options.output) / "report.html"
    if page.is_file() and not any(mark in page.read_bytes() for mark in MARKS):
        raise ConfigError(f"{page} is not a report of this command; use another --output, or move it away")
    from dms_jax.reporting.report_page import build  # late: it loads matplotlib and jinja2, which --help does not need

    files = build(options.results, options.title)
    write_files(Path(options.output), files)
    print(f"wrote {Path(options.output) / 'report.html'} and {len(files) - 1} PNGs")
    return 0


def write_files(folder: Path, files: dict[str, bytes]) -> None:
    """Write each file atomically, so that a reader of the folder never sees half a file."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            with replacing(folder / name) as temporary:
                temporary.write_bytes(content)
    except OSError as why:
        raise ConfigError(f"cannot write {folder}: {why.strerror or why}; use another --output") from why
