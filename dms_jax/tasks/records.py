"""Problems out of files or the hub: objects, each with the place it stands at, so that what is wrong can be found."""

import gzip
import json
import random
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from dms_jax.errors import ConfigError
from dms_jax.hf.hub_dataset import open_dataset
from dms_jax.tasks.problem import TaskOptions

KINDS = (".jsonl", ".jsonl.gz", ".json")


class Record(NamedTuple):
    number: int  # from 1 on
    where: str
    value: dict[str, Any]

    def text(self, key: str) -> str:
        """The text, or the number as text, under a key. Raises ConfigError."""
        value = self.value.get(key)
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            found = (
                f"it is {type(value).__name__}"
                if key in self.value
                else f"there are {', '.join(map(repr, self.value)) or 'none'}"
            )
            raise ConfigError(f"{self.where}: wants a text under the key {key!r}; {found}")
        return str(value)

    def groups(self, *keys: str) -> dict[str, float | str]:
        """Those of the keys that are there with a text or a number."""
        return {key: self.value[key] for key in keys if isinstance(self.value.get(key), str | int | float)}


def read_records(data: str) -> list[Record]:
    """All objects of a .jsonl [.gz] or .json file (a list), or of an hf:NAME[:CONFIG][:SPLIT] dataset. Raises ConfigError."""
    if data.startswith("hf:"):
        values: Iterator[tuple[str, Any]] = (
            (f"{data}: row {number}", value) for number, value in enumerate(open_dataset(data), 1)
        )
    elif data.lower().endswith(KINDS):
        values = _values(data)
    else:
        raise ConfigError(
            f"--data {data}: give a file whose name ends in {', '.join(KINDS)}, or hf:NAME[:CONFIG][:SPLIT]"
        )
    records = []
    for where, value in values:
        if not isinstance(value, dict):
            raise ConfigError(f"{where}: wants an object, got {str(value)[:60]!r}")
        records.append(Record(len(records) + 1, where, value))
    if not records:
        raise ConfigError(f"{data} holds no problem")
    return records


def chosen(records: list[Record], options: TaskOptions) -> list[Record]:
    """`count` records drawn by the seed, in their order; those of a smaller count are among those of a larger one."""
    if options.count < 1:
        raise ConfigError(f"--count must be at least 1, got {options.count}")
    order = random.Random(f"{options.seed}/records").sample(range(len(records)), len(records))
    return [records[index] for index in sorted(order[: options.count])]


def _values(path: str) -> Iterator[tuple[str, Any]]:
    try:
        content = Path(path).expanduser().read_bytes()
        content = gzip.decompress(content) if path.lower().endswith(".gz") else content
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as why:
        line = why.object[: why.start].count(b"\n") + 1
        raise ConfigError(
            f"{path}, line {line}: byte {why.object[why.start]:#04x} is not UTF-8; convert the file with iconv"
        ) from why
    except (OSError, EOFError, zlib.error) as why:
        raise ConfigError(f"cannot read {path}: {getattr(why, 'strerror', None) or why}") from why
    if path.lower().endswith(".json"):
        whole = _parsed(text, path)
        if not isinstance(whole, list):
            raise ConfigError(f"{path} wants a list of objects, got {text.strip()[:60]!r}")
        yield from ((f"{path}, item {number}", value) for number, value in enumerate(whole, 1))
    else:
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                yield f"{path}, line {number}", _parsed(line, f"{path}, line {number}")


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as why:
        raise ConfigError(f"{where} is not valid JSON ({why}): {text.strip()[:60]!r}") from why
