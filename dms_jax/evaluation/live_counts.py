"""Files of live counts: how many pairs each KV head of a real model holds after rows of real text.

`python -m infer.evaluate --tasks kept --live-counts FILE` writes one, benchmarks fill caches with it, and `train.plan`
plans servers with it. It is a JSON object with the fields of `LiveCounts`; docs/evaluate.md describes it. Errors are
`ConfigError`. Imports no JAX.
"""

import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Annotated, Any

import numpy as np

from dms_jax.config import ModelConfig
from dms_jax.config_reader import AtLeast, build, check_ranges
from dms_jax.errors import ConfigError, naming, shown
from dms_jax.evaluation.result_records import KeptRecord
from dms_jax.files import read_json, write_json

WAY_OUT = "use a file that `evaluate --tasks kept --live-counts FILE` wrote"


@dataclass(frozen=True, kw_only=True)
class LiveCounts:
    """Live pairs of all heads after some rows of equal length."""

    model: str
    policy: str  # with its budget, e.g. "dms@trained"
    window_size: Annotated[int, AtLeast(0)]
    length: Annotated[int, AtLeast(1)]  # T, tokens of each row
    realised_cr: float  # length / mean count
    live: dict  # row, e.g. "prose/0" -> counts [L K]
    provenance: dict  # command, date, versions, and hashes of the model and of the texts

    def __post_init__(self):
        check_ranges(self)
        shapes = {np.shape(_table(counts, row, self.length)) for row, counts in self.live.items()}
        if len(shapes) != 1:
            raise ConfigError(f"`live` must hold tables of one shape, got {sorted(shapes) or 'none'}")
        mean = self.length / self.counts.mean()
        if abs(self.realised_cr / mean - 1) > 1e-3:
            raise ConfigError(f"`realised_cr` must be length / mean count = {mean:.4f}, got {self.realised_cr}")

    @property
    def counts(self) -> np.ndarray:
        """Live pairs [L R K] of each layer, row and KV head."""
        return np.stack([np.asarray(counts, np.int64) for counts in self.live.values()], axis=1)

    def check_heads(self, path: str, config: ModelConfig, way_out: str) -> None:
        """Refuse a model with other numbers of layers or KV heads; `path` is the file of these counts."""
        layers, _, kv_heads = self.counts.shape
        if (layers, kv_heads) != (config.num_layers, config.num_kv_heads):
            raise ConfigError(
                f"--live {path} has {layers} layers of {kv_heads} KV heads, but --model has {config.num_layers} of "
                f"{config.num_kv_heads}; {way_out}"
            )

    def kept_fraction(self, path: str, window_size: int) -> np.ndarray:
        """Return the fraction [L K] of the pairs behind the window that each head keeps, mean over the rows.

        Refuse counts of another window, and rows that end within it.
        """
        ring = self.window_size + 1
        if self.window_size != window_size:
            raise ConfigError(
                f"--live {path} was measured with a window of {self.window_size}, but the model has {window_size}; "
                f"measure this model, or use --window {self.window_size} if it has no policy"
            )
        if self.length <= ring or self.counts.min() < ring:
            raise ConfigError(
                f"--live {path} must have rows of more than {ring} tokens whose heads hold at least the {ring} pairs "
                f"of the window and its query, got {self.length} tokens and {self.counts.min()} pairs; measure longer "
                "rows"
            )
        return ((self.counts - ring) / (self.length - ring)).mean(axis=1)


def _table(counts: Any, row: str, length: int) -> np.ndarray:
    """Return counts [L K] as an array, after checking that each is a whole number from 1 to `length`."""
    try:
        table = np.asarray(counts)
    except (ValueError, OverflowError):
        table = np.empty(0)
    if table.dtype.kind != "i" or table.ndim != 2 or not table.size or table.min() < 1 or table.max() > length:
        raise ConfigError(
            f"`live` of {row} must be a table of whole numbers from 1 to {length}, one line for each layer, "
            f"got {shown(counts)}"
        )
    return table


def live_counts_of(records: Iterable[KeptRecord], model: str, provenance: dict[str, Any]) -> LiveCounts:
    """Gather records of the task `kept` of one method, one for each row."""
    records = list(records)
    live = {record.unit: record.live_per_head for record in records}
    first = records[0]
    return LiveCounts(
        model=model,
        policy=first.method,
        window_size=first.window_size,
        length=first.length,
        realised_cr=round(first.length / float(np.mean(list(live.values()))), 4),
        live=live,
        provenance=provenance,
    )


def write_live_counts(path: str | os.PathLike[str], counts: LiveCounts) -> None:
    """Write a file of live counts as one line of JSON, which appears whole or not at all."""
    try:
        write_json(path, asdict(counts), indent=None)
    except OSError as why:
        raise ConfigError(f"cannot write {path}: {why}; give another path to write to") from why


def read_live_counts(path: str | os.PathLike[str]) -> LiveCounts:
    """Read a file of live counts. An error names the file and what is wrong in it."""
    raw = read_json(path)
    try:
        with naming(path):
            if missing := LiveCounts.__dataclass_fields__.keys() - raw.keys():
                raise ConfigError(f"not a file of live counts (missing keys: {', '.join(sorted(missing))})")
            return build(LiveCounts, raw)
    except ConfigError as why:
        raise ConfigError(f"{why}; {WAY_OUT}") from why
