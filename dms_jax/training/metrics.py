"""The file metrics.jsonl: a header with provenance, then one object per step or measurement, with keys `group/name`."""

import json
import sys
from pathlib import Path

import numpy as np

from dms_jax.errors import ConfigError
from dms_jax.files import check_target, parse_json, replacing
from dms_jax.provenance import versions


def run_header(config: dict, hashes: dict) -> dict:
    """Make the first line of the file: versions, device, commit, hashes and configuration."""
    return {"header": {**versions(), **hashes}, "config": config}


class MetricsFile:
    """The log of a run. If the disk fails, lines of the log are lost but the run continues."""

    def __init__(self, path: Path, tensorboard: bool = False):
        """Log to `path`, and with `tensorboard` also to the folder `tensorboard/` beside it."""
        self.path, self._broken = path, False
        self._tensorboard = _tensorboard_writer(path.parent / "tensorboard") if tensorboard else None

    def begin(self, header: dict, resumed_at: int | None) -> None:
        """Write the header line.

        A run that is resumed at step `resumed_at` first drops the lines of the steps that it is about to repeat, so
        that each step is logged once.
        """
        check_target(self.path)
        if resumed_at is not None and self.path.exists():
            try:
                lines = [line for line in self.path.read_bytes().split(b"\n") if _belongs(line, resumed_at)]
                with replacing(self.path) as file:
                    file.write_bytes(b"".join(line + b"\n" for line in lines))
            except OSError as why:
                raise ConfigError(
                    f"cannot rewrite {self.path} for the resumed run: {why}; free some space, or move the file away"
                ) from why
        self.append(header | ({"resumed_at": resumed_at} if resumed_at else {}))

    def append(self, values: dict) -> None:
        """Add one line. The first line that cannot be written is reported on stderr."""
        if self._tensorboard is not None:
            for key, value in values.items():
                if "/" in key and isinstance(value, int | float):
                    self._tensorboard.add_scalar(key, value, values["step"])
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(values, default=_plain) + "\n")
        except OSError as why:
            if not self._broken:
                print(f"cannot write {self.path}: {why}; the run continues without its log", file=sys.stderr)
            self._broken = True


def _belongs(line: bytes, resumed_at: int) -> bool:
    """Decide whether a line stays in the log of a run that is resumed at a step: headers and earlier steps stay."""
    record = _record(line)
    if record is None or "header" in record:
        return record is not None
    step = record.get("step")
    return isinstance(step, int | float) and not isinstance(step, bool) and step < resumed_at


def _tensorboard_writer(folder: Path):
    try:
        from tensorboardX import SummaryWriter  # pyrefly: ignore[missing-import]  # an optional dependency
    except ImportError as why:
        raise ConfigError('tensorboard=true needs tensorboardX: pip install "dms-jax[log]"') from why
    return SummaryWriter(str(folder))


def _plain(value):
    return np.asarray(value).tolist()


def read_steps(path: Path) -> list[dict]:
    """Return the training steps of a metrics file, in order."""
    return [record for record in read_records(path) if "loss/total" in record]


def read_records(path: Path) -> list[dict]:
    """Return the objects of all intact lines of a metrics file, in order.

    Unlike `files.read_jsonl`, this skips damaged lines anywhere, because a damaged log must not prevent a run from
    being resumed.
    """
    return [record for line in path.read_bytes().split(b"\n") if (record := _record(line)) is not None]


def _record(line: bytes) -> dict | None:
    """Return the object in a line, or None for a damaged line, such as one that a killed run was writing."""
    try:
        record = parse_json(line, "a line")
    except ConfigError:
        return None
    return record if isinstance(record, dict) else None
