"""The part of a label pass that concerns hidden units of the evict head: their rows on disk, and their fit.

For a linear head it does nothing. In a run of several processes, the first one keeps the rows and fits the units.
"""

import signal
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils
from tqdm import tqdm

from dms_jax.errors import ConfigError
from dms_jax.hf.hf_weights import to_host
from dms_jax.training.fisher_init import LabeledPairs, LabelSums
from dms_jax.training.label_file import LabelFile
from dms_jax.training.mlp_head import HiddenUnits, Pairs, Units, common_offset, fit_layer, mean_ratio, stacked
from dms_jax.training.prepare import PreparedRun
from dms_jax.training.step import EVICT_UNITS, TrainState
from dms_jax.training.stop_signal import StopSignal

HELD_OUT = 8  # one label row in so many is held out from the fit, whose end it decides


class UnitsPass:
    """The label rows that one run keeps for its hidden units. All processes of the run call all methods."""

    def __init__(self, run: PreparedRun, folder: Path):
        """Open the file of the rows in `folder`."""
        self._run, math, c = run, run.steps.math, run.config
        self._needed = math.dms.head_units > 0
        writes = self._needed and run.is_writer
        self._file = LabelFile(folder, math.student.config, c.label_rows, c.length) if writes else None

    def holds(self, num_rows: int) -> bool:
        """Whether the first `num_rows` label rows are all there, if they are needed."""
        mine = self._file is None or self._file.num_rows >= num_rows
        return bool(multihost_utils.broadcast_one_to_all(np.bool_(mine)))

    def keep(self, pairs: LabeledPairs | None, first: int, end: int) -> None:
        """Keep the label rows `first` to `end` - 1, the first ones of a batch whose other rows are padding."""
        if pairs is None:
            return
        host = jax.tree.map(to_host, pairs)
        if self._file is not None:
            rows = slice(end - first)
            self._file.write(first, LabeledPairs(host.features[:, rows], host.labels[:, rows], host.weight[rows]))

    def flush(self) -> None:
        """Put the rows on the disk."""
        if self._file is not None:
            self._file.flush()

    def fit(self, state: TrainState, sums: LabelSums, stop: StopSignal) -> tuple[HiddenUnits | None, int]:
        """Fit the hidden units to what the linear solution of `sums` leaves over.

        Returns None for a linear head, and the number of the signal that stopped the fit early, or 0.
        """
        if not self._needed:
            return None, 0
        run, number = self._run, 0
        value = to_host(run.steps.fit(sums).value)
        start = Units(*(to_host(state.trainable[name]) for name in EVICT_UNITS))
        units = HiddenUnits(*start, mean=np.zeros((), np.float32), deviation=np.zeros((), np.float32))
        if self._file is not None:
            alone = jax.process_count() == 1  # otherwise the others wait here, and agree on a signal at the first step
            ratios = [float(mean_ratio(self._pairs(layer)[0], of_layer)) for layer, of_layer in enumerate(value)]
            offset, fits = common_offset(ratios), []
            for layer in tqdm(range(len(value)), unit="layer", desc="hidden units"):
                if number := stop.agreed() if alone else 0:
                    run.say(f"{signal.Signals(number).name}: the labels are saved; continue with --resume")
                    return None, number
                key = jax.random.fold_in(jax.random.key(run.config.seed), layer)
                of_layer = Units(*(part[layer] for part in start))
                fits.append(fit_layer(*self._pairs(layer), value[layer], offset, of_layer, key))
            units = stacked(fits)
            before, after = np.mean([(of_layer.before, of_layer.after) for of_layer in fits], axis=0)
            if not np.isfinite(before):
                raise ConfigError(
                    "the hidden units cannot be fitted, because predictions of the linear head are not finite; use "
                    "more label_rows, or dms.head_units=0"
                )
            run.say(f"hidden units: loss of the held-out label rows {before:.4f} -> {after:.4f}")
        return multihost_utils.broadcast_one_to_all(units), number

    def _pairs(self, layer: int) -> tuple[Pairs, Pairs]:
        """Return the pairs of a layer to fit, and those that are held out: those of the last rows."""
        assert self._file is not None, "only the process with the file fits"
        rows = self._run.config.label_rows
        first = rows - max(1, rows // HELD_OUT)
        pairs = self._file.read(layer, 0, first), self._file.read(layer, first, rows)
        for part, which in zip(pairs, (f"first {first}", f"last {rows - first}"), strict=True):
            if not len(part.weight):
                raise ConfigError(
                    f"the hidden units cannot be fitted, because the {which} of {rows} label rows have no pair with a "
                    "label; use more label_rows or longer documents, or dms.head_units=0"
                )
        return pairs

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
