"""The fit of the evict head to the label rows: the pairs that a label pass keeps on disk, and what is fitted to them.

In a run of several processes, the first one keeps the pairs and fits the head.
"""

import signal
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Float
from tqdm import tqdm

from dms_jax.axes import Array
from dms_jax.errors import ConfigError
from dms_jax.hf.hf_weights import to_host
from dms_jax.training.fisher_init import FittedHead, LabeledPairs, LabelSums, first_rows
from dms_jax.training.gamma_regression import Moments, Pairs, common_offset, log_mean_ratio, refine
from dms_jax.training.label_file import LabelFile
from dms_jax.training.mlp_head import LayerFit, Units, fit_layer
from dms_jax.training.prepare import PreparedRun
from dms_jax.training.step import EVICT_UNITS, TrainState
from dms_jax.training.stop_signal import StopSignal

HELD_OUT = 8  # one label row in so many is held out from the fit of hidden units, whose end it decides


class HeadFit:
    """The pairs that one run fits its head to. All processes of the run call all methods."""

    def __init__(self, run: PreparedRun, folder: Path):
        """Open the file of the pairs in `folder`."""
        self._run, c = run, run.config
        model = run.steps.math.student.config
        self._units = run.steps.math.dms.head_units > 0
        self._file = LabelFile(folder, model, c.label_rows, c.length) if run.is_writer else None

    def holds(self, num_rows: int) -> bool:
        """Whether the first `num_rows` label rows are all there."""
        mine = self._file is None or self._file.num_rows >= num_rows
        return bool(multihost_utils.broadcast_one_to_all(np.bool_(mine)))

    def keep(self, pairs: LabeledPairs, first: int, end: int) -> None:
        """Keep the label rows `first` to `end` - 1, the first ones of a batch whose other rows are padding."""
        host = jax.tree.map(to_host, pairs)
        if self._file is not None:
            self._file.write(first, first_rows(host, end - first))

    def flush(self) -> None:
        """Put the rows on the disk."""
        if self._file is not None:
            self._file.flush()

    def fit(self, state: TrainState, sums: LabelSums, stop: StopSignal) -> tuple[FittedHead, Units | None, int]:
        """Fit the head, beginning with the ridge regression of `sums` and with the hidden units of `state`, if any.

        Also returns the number of the signal that stopped the fit early, or 0.
        """
        head, number = jax.tree.map(to_host, self._run.steps.fit(sums)), 0
        units = Units(*(to_host(state.trainable[name]) for name in EVICT_UNITS)) if self._units else None
        if self._file is not None:
            head, units, number = self._fitted(head, units, stop)
        head, units = multihost_utils.broadcast_one_to_all((head, units))
        return head, units, number

    def _fitted(self, head: FittedHead, start: Units | None, stop: StopSignal) -> tuple[FittedHead, Units | None, int]:
        run, alone = self._run, jax.process_count() == 1  # otherwise the others wait, and agree on a signal later
        rows = run.config.label_rows
        first_held_out = rows - max(1, rows // HELD_OUT) if start is not None else rows
        train = lambda layer: self._pairs(layer, 0, first_held_out)
        head, offset = refined(head, train)
        if start is None:
            return head, None, 0
        fits: list[LayerFit] = []
        for layer in tqdm(range(len(head.value)), unit="layer", desc="hidden units"):
            if number := stop.agreed() if alone else 0:
                run.say(f"{signal.Signals(number).name}: the labels are saved; continue with --resume")
                return head, start, number
            key = jax.random.fold_in(jax.random.key(run.config.seed), layer)
            of_start, held_out = Units(*(part[layer] for part in start)), self._pairs(layer, first_held_out, rows)
            fits.append(fit_layer(train(layer), held_out, head.value[layer], offset, of_start, key))
        before, after = np.mean([(fit.before, fit.after) for fit in fits], axis=0)
        run.say(f"hidden units: loss of the held-out label rows {before:.4f} -> {after:.4f}")
        units = jax.tree.map(lambda *parts: np.stack(parts), *(fit.units for fit in fits))
        return with_moments(head, [fit.moments for fit in fits]), units, 0

    def _pairs(self, layer: int, first: int, end: int) -> Pairs:
        """Return the pairs of a layer in the label rows `first` to `end` - 1."""
        assert self._file is not None, "only the process with the file fits"
        pairs = self._file.read(layer, first, end)
        if not len(pairs.weight):
            raise ConfigError(
                f"the head cannot be fitted, because the label rows {first} to {end - 1} have no pair with a label; "
                "use more label_rows or longer documents"
            )
        return pairs

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


def refined(head: FittedHead, pairs_of: Callable[[int], Pairs]) -> tuple[FittedHead, Float[Array, ""]]:
    """Refine a ridge regression layer by layer; `pairs_of` reads the pairs of a layer.

    Also returns what adds to its predictions to make them those of the log of a value.
    """
    layers = range(len(head.value))
    offset = common_offset([float(log_mean_ratio(pairs_of(layer), head.value[layer])) for layer in layers])
    values, moments = zip(*(refine(pairs_of(layer), head.value[layer], offset) for layer in layers), strict=True)
    head = with_moments(head._replace(value=np.stack(values)), moments)
    if not np.isfinite(head.deviation):
        raise ConfigError("the head cannot be fitted, because its predictions are not finite; use more label_rows")
    return head, offset


def with_moments(head: FittedHead, moments: Sequence[Moments]) -> FittedHead:
    """Return the head with the distribution of its predictions, given their moments in each layer."""
    mean, square = np.mean(np.asarray(moments), axis=0)
    return head._replace(mean=mean, deviation=np.sqrt(square - mean**2))
