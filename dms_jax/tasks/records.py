"""Read records of problems from files or from the hub. Each record knows its place, so that errors can name it."""

import gzip
import random
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from dms_jax.errors import ConfigError, shown
from dms_jax.files import parse_json
from dms_jax.hf.hub_dataset import open_dataset
from dms_jax.tasks.problem import TaskOptions

SUFFIXES = (".jsonl", ".jsonl.gz", ".json")


class Record(NamedTuple):
    """One object of a file or dataset."""

    number: int  # from 1
    where: str  # e.g. "FILE, line 3"
    value: dict[str, Any]

    def text(self, key: str) -> str:
        """Return the value of a key as text. Raises ConfigError unless it is text or a number."""
        value = self.value.get(key)
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            if key not in self.value:
                raise ConfigError(
                    f"{self.where}: missing key {key!r}; found {', '.join(map(repr, self.value)) or 'no key'}"
                )
            raise ConfigError(f"{self.where}: {key!r} must be text, got {shown(value)}")
        return str(value)

    def groups(self, *keys: str) -> dict[str, float | str]:
        """Return the values of those `keys` that hold text or a number."""
        return {key: self.value[key] for key in keys if isinstance(self.value.get(key), str | int | float)}


def read_records(data: str) -> list[Record]:
    """Read all records of a .jsonl, .jsonl.gz or .json file (a list of objects), or of an hf:NAME[:CONFIG][:SPLIT]
    dataset. Raises ConfigError."""
    if data.startswith("hf:"):
        values: Iterator[tuple[str, Any]] = (
            (f"{data}: row {number}", value) for number, value in enumerate(open_dataset(data), 1)
        )
    elif data.lower().endswith(SUFFIXES):
        values = _values(data)
    else:
        raise ConfigError(
            f"--data must be a file whose name ends in {', '.join(SUFFIXES)}, or hf:NAME[:CONFIG][:SPLIT], got {data}"
        )
    records = []
    for where, value in values:
        if not isinstance(value, dict):
            raise ConfigError(f"{where}: a record must be a JSON object, got {shown(value)}")
        records.append(Record(len(records) + 1, where, value))
    if not records:
        raise ConfigError(f"{data} must have at least one record, got none; use another file")
    return records


def chosen(records: list[Record], options: TaskOptions) -> list[Record]:
    """Draw `options.count` records with the seed, in their original order. A larger count extends a smaller one."""
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
        whole = parse_json(text, path)
        if not isinstance(whole, list):
            raise ConfigError(f"{path} must hold a list of objects, got {shown(whole)}")
        yield from ((f"{path}, item {number}", value) for number, value in enumerate(whole, 1))
    else:
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                yield f"{path}, line {number}", parse_json(line, f"{path}, line {number}")
