"""The labeled pairs of the label rows on disk, to which an evict head is fitted.

They do not fit into memory: each pair has D features in each layer. The file holds rows one after the other and, in
each, the layers one after the other, so that a label pass appends to it and the fit reads one layer of all rows.
"""

import os
import shutil
from pathlib import Path

import numpy as np

from dms_jax.config import ModelConfig
from dms_jax.errors import ConfigError
from dms_jax.planning.figures import GIB
from dms_jax.training.fisher_init import LabeledPairs, num_kept
from dms_jax.training.gamma_regression import Pairs


def record_of(config: ModelConfig, length: int) -> np.dtype:
    """Return the layout of the pairs of one row and layer."""
    pairs = num_kept(config, length)
    fields = {
        "features": ("<f2", (pairs, config.hidden_size)),
        "labels": ("<f4", (config.num_kv_heads, pairs)),
        "weight": ("<f4", (pairs,)),
    }
    return np.dtype([(name, *layout) for name, layout in fields.items()])


def label_file_bytes(config: ModelConfig, rows: int, length: int) -> int:
    """Return the size of the file of `rows` label rows of `length` tokens."""
    return rows * config.num_layers * record_of(config, length).itemsize


class LabelFile:
    """The file of one label pass. `flush` before what it holds is relied upon; `close` at the end."""

    def __init__(self, folder: Path, config: ModelConfig, rows: int, length: int):
        """Open or make the file in `folder`. Raises ConfigError if the disk has too little space for all `rows`."""
        self._layers = config.num_layers
        self._record = record_of(config, length)
        shape = (config.num_layers, *self._record["features"].shape, config.num_kv_heads)
        self.path = folder / f"pairs-{'x'.join(map(str, shape))}.bin"  # another shape is another file
        size = label_file_bytes(config, rows, length)
        try:
            held = self.path.stat().st_size if self.path.exists() else 0
            free = shutil.disk_usage(folder).free
            if size > held + free:
                raise ConfigError(
                    f"the features of {rows} label rows need {size / GIB:.2f} GiB in {folder}, whose disk has "
                    f"{free / GIB:.2f} GiB free; free some space, or use fewer label_rows"
                )
            self._file = open(self.path, "r+b" if held else "w+b")  # noqa: SIM115  # for as long as the label pass takes
        except OSError as why:
            raise self._refusal(why) from why

    @property
    def num_rows(self) -> int:
        """The number of whole rows that the file holds."""
        return os.path.getsize(self.path) // (self._layers * self._record.itemsize)

    def write(self, first: int, pairs: LabeledPairs) -> None:
        """Write rows, which are on the host, as rows `first` and following."""
        rows = np.zeros((len(pairs.weight), self._layers), self._record)
        rows["features"] = np.swapaxes(pairs.features, 0, 1)
        rows["labels"] = np.swapaxes(pairs.labels, 0, 1)
        rows["weight"] = pairs.weight[:, None]
        try:
            self._file.seek(first * self._layers * self._record.itemsize)
            self._file.write(rows.tobytes())
        except OSError as why:
            raise self._refusal(why) from why

    def flush(self) -> None:
        """Put all that was written on the disk."""
        try:
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as why:
            raise self._refusal(why) from why

    def read(self, layer: int, first: int, end: int) -> Pairs:
        """Return the pairs with a weight of one layer in the rows `first` to `end` - 1."""
        parts = []
        for row in range(first, end):
            self._file.seek((row * self._layers + layer) * self._record.itemsize)
            part = np.frombuffer(self._file.read(self._record.itemsize), self._record)[0]
            counted = part["weight"] > 0
            parts.append((part["features"][counted], part["labels"].T[counted], part["weight"][counted]))
        return Pairs(*map(np.concatenate, zip(*parts, strict=True)))

    def close(self) -> None:
        self._file.close()

    def _refusal(self, why: OSError) -> ConfigError:
        return ConfigError(
            f"cannot keep the features of the label rows in {self.path}: {why.strerror or why}; free some space, then "
            "continue with --resume"
        )
