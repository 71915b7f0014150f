"""metrics.jsonl: a header line of provenance, then one object a step or measurement, keys `group/name`."""

import json
import os
import sys
from pathlib import Path

import numpy as np

from dms_jax.errors import ConfigError
from dms_jax.provenance import versions


def provenance(config: dict, hashes: dict) -> dict:
    """Versions, device, commit, config and hashes: the first line of the file."""
    return {"header": {**versions(), **hashes}, "config": config}


class MetricsFile:
    """Appends lines; a disk that fails costs the log, never the run."""

    def __init__(self, path: Path, header: dict, resumed_at: int | None, tensorboard: bool = False):
        """A resumed run drops the lines of steps it is about to repeat, so that each step stands once."""
        self.path, self._broken = path, False
        self._tensorboard = _tensorboard_writer(path.parent / "tensorboard") if tensorboard else None
        if resumed_at is not None and path.exists():
            try:
                kept = [line for line in path.read_bytes().split(b"\n") if _belongs(line, resumed_at)]
                temporary = path.with_suffix(".tmp")
                temporary.write_bytes(b"".join(line + b"\n" for line in kept))
                os.replace(temporary, path)
            except OSError as why:
                raise ConfigError(
                    f"cannot rewrite {path}, which a resumed run does: {why}; move it away, or make room"
                ) from why
        self.append(header | ({"resumed_at": resumed_at} if resumed_at else {}))

    def append(self, values: dict) -> None:
        if self._tensorboard is not None:
            for key, value in values.items():
                if "/" in key and isinstance(value, int | float):
                    self._tensorboard.add_scalar(key, value, values["step"])
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(values, default=_plain) + "\n")
        except OSError as why:
            if not self._broken:
                print(f"cannot write {self.path}: {why}; the run goes on without its log", file=sys.stderr)
            self._broken = True


def _belongs(line: bytes, resumed_at: int) -> bool:
    record = _record(line)
    if record is None or "header" in record:
        return record is not None
    step = record.get("step")
    return isinstance(step, int | float) and not isinstance(step, bool) and step < resumed_at


def _record(line: bytes) -> dict | None:
    """None for what is no object: the line that a killed run was writing, or damage."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None


def _tensorboard_writer(folder: Path):
    try:
        from tensorboardX import SummaryWriter  # pyrefly: ignore[missing-import]  # an optional dependency
    except ImportError as why:
        raise ConfigError('tensorboard=true needs tensorboardX: pip install "dms-jax[log]"') from why
    return SummaryWriter(str(folder))


def _plain(value):
    return np.asarray(value).tolist()


def read_steps(path: Path) -> list[dict]:
    """The training steps of a metrics file, in order."""
    return [record for record in read_records(path) if "loss/total" in record]


def read_records(path: Path) -> list[dict]:
    """All whole lines of a metrics file, in order."""
    return [record for line in path.read_bytes().split(b"\n") if (record := _record(line)) is not None]
