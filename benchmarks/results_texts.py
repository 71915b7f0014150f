"""Make the texts of docs/results.md from their sources: three domains that the default text does not contain.

    python -m benchmarks.results_texts --output runs/texts                                    # from the hub
    python -m benchmarks.results_texts --output runs/texts --wikitext FILE --math500 FILE

The command writes prose.txt (WikiText-2 test), code.txt (modules of the installed NumPy, unchanged) and maths.txt
(problems and solutions of MATH-500). Each FILE is a text, or a .jsonl file with the columns of the dataset on the hub.
"""

import argparse
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from dms_jax.command import Parser, run_command
from dms_jax.errors import ConfigError
from dms_jax.files import read_jsonl, read_text

NAME = "benchmarks.results_texts"
SOURCES = {
    "wikitext": "hf:Salesforce/wikitext:wikitext-2-raw-v1:test",
    "math500": "hf:HuggingFaceH4/MATH-500:test",
}
MAX_CODE_CHARACTERS, MIN_MODULE_CHARACTERS = 400_000, 20_000


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(NAME, __doc__)
    parser.add_argument("--output", required=True, metavar="FOLDER", help="the folder for the three files")
    for name, source in SOURCES.items():
        parser.add_argument(
            f"--{name.replace('_', '-')}", default=source, metavar="FILE", help=f"the source (default {source})"
        )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    options = parse(argv)
    texts = {
        "prose.txt": detokenized("".join(record["text"] for record in records(options.wikitext))),
        "code.txt": "\n\n".join(modules()),
        "maths.txt": "\n\n".join(
            f"Problem: {p['problem']}\nSolution: {p['solution']}" for p in records(options.math500)
        ),
    }
    folder = Path(options.output)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            (folder / name).write_text(text, encoding="utf-8")
            print(f"{folder / name}: {len(text)} characters")
    except OSError as why:
        raise ConfigError(f"cannot write {folder}: {why}") from why


def records(source: str) -> Iterator[dict]:
    """Yield the records of a hub dataset or of a .jsonl file; a text file is a single record."""
    if source.startswith("hf:"):
        from dms_jax.hf.hub_dataset import open_dataset

        yield from open_dataset(source)
        return
    if source.endswith(".jsonl"):
        yield from (record for _, record in read_jsonl(source))
    else:
        yield {"text": read_text(source)}


def detokenized(text: str) -> str:
    """Turn WikiText's tokens back into ordinary text."""
    text = re.sub(r" @([-,.])@ ", r"\1", text)
    text = re.sub(r" ([,.;:!?%)\]]|n't|'(?:s|m|re|ve|d|ll)\b)", r"\1", text)
    text = re.sub(r"([(\[$]) ", r"\1", text)
    return re.sub(r'" ([^"\n]*?) "', r'"\1"', text)


def modules() -> Iterator[str]:
    """Yield the source of long modules of NumPy without their tests, in the order of their paths."""
    characters = 0
    for path in sorted(Path(np.__file__).parent.rglob("*.py")):
        if "tests" in path.parts:
            continue
        text = path.read_text(encoding="utf-8")
        if len(text) >= MIN_MODULE_CHARACTERS and characters < MAX_CODE_CHARACTERS:
            characters += len(text)
            yield text


if __name__ == "__main__":
    run_command(NAME, main)
