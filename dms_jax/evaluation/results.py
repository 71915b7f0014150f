"""The results of an evaluation: one file of JSON lines. Its first line is a header of provenance, each other line one
measurement.

    {"header": {versions, device, commit, model and its sha256, ...}, "options": {...}}
    {"task": "text", "policy": "tova", "budget": "256", "unit": "prose/3", ...the fields of that task's record}

(task, policy, budget, unit) identifies a measurement, so a run that was stopped continues with those that are missing.
A later run that adds measurements under other versions or options first adds a header line of its own. Imports no JAX.
"""

import json
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from dms_jax.errors import ConfigError, naming, shown
from dms_jax.evaluation.result_records import Key, Record, record_of
from dms_jax.files import check_target, read_jsonl

WAY_OUT = "delete the line or use another --output"


class Results(NamedTuple):
    header: dict[str, Any]
    options: dict[str, Any]
    records: list[Record]  # one for each key
    places: list[str]  # "FILE, line N" of each record
    doubles: str = ""  # a sentence about the lines that were left out because their key came before

    def of_task(self, task: str) -> Iterator[Record]:
        return (record for record in self.records if record.task == task)


def read_results(path: str | os.PathLike[str]) -> Results:
    """Read the header and the measurements; a half line at the end, which a killed run leaves, is ignored. Raises
    ConfigError that names the damaged line.

    Of several measurements with one key, which two evaluations at once could write in earlier versions, the first
    counts, and a line on stderr says so.
    """
    results = _read(path)
    if results.doubles:
        print(results.doubles, file=sys.stderr)
    return results


def _read(path: str | os.PathLike[str]) -> Results:
    headers: list[dict[str, Any]] = []
    records, places = [], []
    for where, line in read_jsonl(path, torn_tail_ok=True):
        is_header = isinstance(line, dict) and "header" in line
        if not headers and not is_header:
            break
        if not isinstance(line, dict):
            raise ConfigError(f"{where}: a line must be a JSON object, got {shown(line)}; {WAY_OUT}")
        if is_header:
            for name in ("header", "options"):
                if not isinstance(line.get(name, {}), dict):
                    raise ConfigError(f"{where}: `{name}` must be a mapping; {WAY_OUT}")
            headers.append(line)
            continue
        try:
            with naming(where):
                records.append(record_of(line))
        except ConfigError as why:
            raise ConfigError(f"{why}; {WAY_OUT}") from why
        places.append(where)
    if not headers:
        raise ConfigError(f"{path} must begin with the header of an evaluation; use a file that `evaluate` wrote")
    options = {key: value for line in headers for key, value in line.get("options", {}).items()}
    return Results(headers[0]["header"], options, *_first_of_each_key(path, records, places))


def _first_of_each_key(
    path: str | os.PathLike[str], records: list[Record], places: list[str]
) -> tuple[list[Record], list[str], str]:
    """Return the first record of each key, its place, and a sentence about the others, if there are any."""
    first: dict[Key, int] = {}
    doubles = [(i, kept) for i, record in enumerate(records) if (kept := first.setdefault(record.key, i)) != i]
    sentence = ""
    if doubles:
        sentence = f"{path}: {len(doubles)} measurements are there twice, and the first of each counts"
        if differing := [i for i, kept in doubles if _values(records[i]) != _values(records[kept])]:
            sentence += f"; {len(differing)} have other values than the first, e.g. {places[differing[0]]}"
    return [records[i] for i in first.values()], [places[i] for i in first.values()], sentence


def _values(record: Record) -> str:
    """Return what a record says, without times, which differ each time. It is text, because NaN differs from itself."""
    return repr({name: value for name, value in vars(record).items() if not name.endswith("_seconds")})


class ResultsFile:
    """A results file to which measurements are appended, each one as soon as it is made."""

    def __init__(self, path: str | os.PathLike[str], header: dict, options: dict, binding: tuple[str, ...]):
        """Begin a file, or continue one whose header has the same `binding` entries and whose options do not contradict
        `options`. Raises ConfigError for any other file, which is then left unchanged."""
        self.path, self.header = Path(path), header  # of the run that began the file
        self.records: list[Record] = []  # of earlier runs and of this one
        first = json.dumps({"header": header, "options": options}, default=_plain)
        new = json.loads(first)
        check_target(self.path)
        try:
            if self.path.exists() and self.path.stat().st_size:
                _read(self.path)  # refuses another kind of file before anything is cut off
                _cut_torn_line(self.path)
                old = read_results(self.path)
                if changed := _changes(old, new, binding):
                    raise ConfigError(
                        f"{path} holds results measured with different settings ({'; '.join(changed)[:300]}); "
                        "use another --output"
                    )
                self.records, self.header = old.records, old.header
                if old.header != new["header"] or not new["options"].items() <= old.options.items():
                    self._write(first)
            else:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self._write(first)
        except OSError as why:
            raise ConfigError(f"cannot write {path}: {why}") from why
        self.done: set[Key] = {record.key for record in self.records}

    def records_of(self, task: str, policy: str, budget: str) -> list[Record]:
        """Return everything that was measured so far for one task and method."""
        return [record for record in self.records if record.key[:3] == (task, policy, budget)]

    def append(self, record: Record) -> None:
        line = json.dumps(asdict(record), default=_plain)
        self.done.add(record.key)
        self.records.append(record)
        try:
            self._write(line)
        except OSError as why:
            raise ConfigError(
                f"cannot write {self.path}: {why}; earlier results are safe, so run the same command again to continue"
            ) from why

    def _write(self, line: str) -> None:
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(line + "\n")


def rounded(values: ArrayLike, digits: int = 4) -> list[float]:
    """Round to `digits` significant digits, because people read files of measurements too."""
    return [float(f"{value:.{digits}g}") for value in np.asarray(values, np.float64).ravel()]


def _changes(old: Results, new: dict, binding: tuple[str, ...]) -> list[str]:
    """List the settings, as "name: old -> new", that make new measurements incomparable with those of the file."""
    header, options = new["header"], new["options"]
    changed = [
        f"{name}: {old.header.get(name)} -> {header[name]}" for name in binding if old.header.get(name) != header[name]
    ]
    known = old.options.keys() & options.keys()
    return changed + [f"{k}: {old.options[k]} -> {v}" for k, v in options.items() if k in known and old.options[k] != v]


def _cut_torn_line(path: Path) -> None:
    """Remove the half line that a killed run left at the end."""
    with open(path, "r+b") as file:
        content = file.read()
        if not content.endswith(b"\n"):
            file.truncate(content.rfind(b"\n") + 1)


def _plain(value: Any) -> Any:
    """Convert NumPy numbers and arrays to Python numbers and lists."""
    return np.asarray(value).tolist()
