"""The results of an evaluation: one JSONL file. Its first line is a header of provenance, each other line one measurement.

    {"header": {versions, device, commit, model and its sha256, ...}, "options": {...}}
    {"task": "text", "policy": "tova", "budget": "256", "unit": "prose/3", ...numbers of that task}

(task, policy, budget, unit) names a measurement: a run that was stopped goes on with those that are missing. Each later run that
adds measurements adds a header line of its own, when its versions or options are others.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from dms_jax.errors import ConfigError
from dms_jax.files import parse_json

TEXT_TASKS = ("text", "greedy", "kept")  # any other task has answers and a score
Key = tuple[str, str, str, str]  # task, policy, budget ("" for none), unit


class Results(NamedTuple):
    header: dict[str, Any]
    options: dict[str, Any]
    records: list[dict[str, Any]]

    def of(self, task: str) -> Iterator[dict[str, Any]]:
        return (record for record in self.records if record["task"] == task)


def key_of(record: dict) -> Key:
    return record["task"], record["policy"], record["budget"], record["unit"]


def arm_name(record: dict) -> str:
    """How a policy under a budget is written: "tova@256", "dms@cr4", "dense"."""
    return f"{record['policy']}@{record['budget']}" if record["budget"] else record["policy"]


def problem_of(record: dict) -> str:
    """What an answer answers: several chains of one problem have units of their own."""
    return record.get("problem", record["unit"])


def read_results(path: str | os.PathLike[str]) -> Results:
    """Header and measurements; the half line of a run that was killed is left out. Raises ConfigError."""
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as why:
        raise ConfigError(f"cannot read {path}: {why}") from why
    objects, complete = [], lines[:-1]  # what follows the last newline is not whole
    for number, line in enumerate(complete, 1):
        try:
            objects.append(parse_json(line, "it"))
            names = {"header"}, {"task", "policy", "budget", "unit"}
            if not isinstance(objects[-1], dict) or (
                number > 1 and not any(wanted <= objects[-1].keys() for wanted in names)
            ):
                raise ValueError("it names no task, policy, budget and unit")
            if not isinstance(objects[-1].get("options", {}), dict) or not isinstance(
                objects[-1].get("groups", {}), dict
            ):
                raise ValueError("its options or groups are no mapping")
        except ValueError as why:  # a ConfigError is one
            raise ConfigError(
                f"{path}, line {number}: no result of an evaluation ({why}); remove the line, or give another --output"
            ) from why
    if not objects or "header" not in objects[0]:
        raise ConfigError(f"{path} does not begin with the header of an evaluation; give another file")
    options = {key: value for line in objects if "header" in line for key, value in line.get("options", {}).items()}
    return Results(objects[0]["header"], options, [line for line in objects if "header" not in line])


class ResultsFile:
    """Appends measurements, each at once and whole."""

    def __init__(self, path: str | os.PathLike[str], header: dict, options: dict, binding: tuple[str, ...]):
        """A file that exists is continued when the `binding` entries of its header, and the options that it knows, are these; else
        ConfigError."""
        self.path = Path(path)
        self.records: list[dict[str, Any]] = []  # of earlier runs and of this one
        first = json.dumps({"header": header, "options": options}, default=_plain)
        try:
            if self.path.exists() and self.path.stat().st_size:
                old = read_results(self.path)
                new_options = json.loads(first)["options"]
                changed = [
                    f"{k}: {old.header.get(k)} -> {header[k]}" for k in binding if old.header.get(k) != header[k]
                ]
                changed += [
                    f"{k}: {old.options[k]} -> {v}"
                    for k, v in new_options.items()
                    if k in old.options and old.options[k] != v
                ]
                if changed:
                    raise ConfigError(
                        f"{path} was measured otherwise ({'; '.join(changed)[:300]}); give another --output"
                    )
                self.records = old.records
                with open(self.path, "r+b") as file:  # a killed run's half line
                    file.truncate(file.read().rfind(b"\n") + 1)
                if old.header != json.loads(first)["header"] or not new_options.items() <= old.options.items():
                    self._write(first)
            else:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self._write(first)
        except OSError as why:
            raise ConfigError(f"cannot write {path}: {why}") from why
        self.done: set[Key] = {key_of(record) for record in self.records}

    def of(self, task: str, policy: str, budget: str) -> list[dict[str, Any]]:
        """What has been measured of one arm."""
        return [
            record
            for record in self.records
            if (record["task"], record["policy"], record["budget"]) == (task, policy, budget)
        ]

    def append(self, record: dict) -> None:
        line = json.dumps(record, default=_plain)
        self.done.add(key_of(record))
        self.records.append(json.loads(line))
        try:
            self._write(line)
        except OSError as why:
            raise ConfigError(
                f"cannot write {self.path}: {why}; the results so far are whole, run the same command again"
            ) from why

    def _write(self, line: str) -> None:
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(line + "\n")


def rounded(values: ArrayLike, digits: int = 4) -> list[float]:
    """Numbers with `digits` significant digits: a file of measurements is read by people too."""
    return [float(f"{value:.{digits}g}") for value in np.asarray(values, np.float64).ravel()]


def _plain(value):
    return np.asarray(value).tolist()
