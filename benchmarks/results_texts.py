"""Make the texts of docs/results.md from their sources: three held-out domains, and the part of the training text that
is not in the default.

    python -m benchmarks.results_texts --output runs/texts                                    # from the hub
    python -m benchmarks.results_texts --output runs/texts --wikitext FILE --gsm8k-train FILE --math500 FILE

The command writes gsm8k_train.jsonl (for data.paths), prose.txt (WikiText-2 test), code.txt (modules of the standard
library of the running Python, unchanged) and maths.txt (problems and solutions of MATH-500). Each FILE is a text, or a
.jsonl file with the columns of the dataset on the hub.
"""

import argparse
import itertools
import json
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from dms_jax.command import Parser, run_command
from dms_jax.errors import ConfigError
from dms_jax.files import read_jsonl, read_text

NAME = "benchmarks.results_texts"
SOURCES = {
    "wikitext": "hf:Salesforce/wikitext:wikitext-2-raw-v1:test",
    "gsm8k_train": "hf:openai/gsm8k:main:train",
    "math500": "hf:HuggingFaceH4/MATH-500:test",
}
NUM_TRAIN_PROBLEMS, PROBLEMS_PER_DOCUMENT = 1200, 8  # to get about as much math as Python documentation
MAX_CODE_CHARACTERS, MIN_MODULE_CHARACTERS = 400_000, 20_000


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(NAME, __doc__)
    parser.add_argument("--output", required=True, metavar="FOLDER", help="the folder for the four files")
    for name, source in SOURCES.items():
        parser.add_argument(
            f"--{name.replace('_', '-')}", default=source, metavar="FILE", help=f"the source (default {source})"
        )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    options = parse(argv)
    problems = [
        f"Question: {p['question']}\nAnswer: {p['answer']}"
        for p in itertools.islice(records(options.gsm8k_train), NUM_TRAIN_PROBLEMS)
    ]
    documents = [
        "\n\n".join(problems[i : i + PROBLEMS_PER_DOCUMENT]) for i in range(0, len(problems), PROBLEMS_PER_DOCUMENT)
    ]
    texts = {
        "gsm8k_train.jsonl": "".join(json.dumps({"text": document}) + "\n" for document in documents),
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
    """Yield the source of long modules of the standard library, in alphabetical order."""
    characters = 0
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        text = path.read_text(encoding="utf-8")
        if len(text) >= MIN_MODULE_CHARACTERS and characters < MAX_CODE_CHARACTERS:
            characters += len(text)
            yield text


if __name__ == "__main__":
    run_command(NAME, main)
