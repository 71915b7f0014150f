"""Read records of problems from files or from the hub. Each record knows its place, so that errors can name it."""

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from dms_jax.errors import ConfigError, shown
from dms_jax.files import RECORD_KINDS, kind_of, kinds_allowed
from dms_jax.files import read_records as records_in
from dms_jax.hf.hub_dataset import open_dataset
from dms_jax.tasks.problem import TaskOptions


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
    """Read all records of a .jsonl, .ndjson or .json file, packed (.gz, .zst) or not, or of an
    hf:NAME[:CONFIG][:SPLIT] dataset. Raises ConfigError."""
    if data.startswith("hf:"):
        values: Iterator[tuple[str, Any]] = (
            (f"{data}: row {number}", value) for number, value in enumerate(open_dataset(data), 1)
        )
    elif kind_of(data, RECORD_KINDS):
        values = records_in(Path(data).expanduser())
    else:
        kinds = f"{', '.join(RECORD_KINDS)} (each also .gz or .zst), or be hf:NAME[:CONFIG][:SPLIT]"
        raise ConfigError(f"--data {kinds_allowed(data, kinds)}")
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
