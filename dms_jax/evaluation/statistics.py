"""Statistics of measurements: bootstrap intervals over units, Wilson intervals for accuracies, percentiles for
tails."""

from collections.abc import Sequence
from statistics import NormalDist
from typing import NamedTuple

import numpy as np

LEVEL = 0.95


class Interval(NamedTuple):
    """A mean with its confidence interval. For a single unit there is no interval, so `low` and `high` are nan."""

    value: float
    low: float
    high: float
    units: int


def bootstrap_mean(
    values: Sequence[float] | np.ndarray,
    weights: Sequence[float] | np.ndarray | None = None,
    level: float = LEVEL,
    draws: int = 4000,
    seed: int = 0,
) -> Interval:
    """Return the mean over units (rows, problems) with the percentile interval of `draws` resamples of whole units.

    Whole rows are resampled because the tokens of one row depend on each other. If units differ in length, `weights`
    are their numbers of tokens. Percentile intervals from few units are too narrow: those from 10 units cover about 90%
    instead of 95%.
    """
    x = np.asarray(values, np.float64)
    w = np.ones_like(x) if weights is None else np.asarray(weights, np.float64)
    if x.ndim != 1 or x.shape != w.shape or not len(x) or w.min() < 0 or w.sum() <= 0:
        raise ValueError(
            f"bootstrap_mean needs at least one unit and weights >= 0, got values {x.shape} and weights {w.shape}"
        )
    value = float(x @ w / w.sum())
    if len(x) == 1 or not np.isfinite(x).all():
        return Interval(value, float("nan"), float("nan"), len(x))
    if np.ptp(x) == 0:  # the mean of equal values may differ from them by rounding, so skip the resampling
        return Interval(value, value, value, len(x))
    counts = np.random.default_rng(seed).multinomial(len(x), np.full(len(x), 1 / len(x)), size=draws)
    drawn = counts * w  # [draws, units]
    sums = drawn.sum(axis=1)
    means = (drawn @ x)[sums > 0] / sums[sums > 0]
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Interval(value, float(low), float(high), len(x))


def wilson(hits: float, trials: int, level: float = LEVEL) -> Interval:
    """Return the accuracy `hits / trials` with Wilson's score interval (1927), which is also valid at 0% and 100% and
    for few trials.

    `hits` may be a sum of fractional scores between 0 and 1. Their variance is at most that of scores of 0 or 1, so the
    interval is wide enough.
    """
    if trials < 1 or not -1e-9 <= hits <= trials + 1e-9:
        raise ValueError(f"wilson needs 0 <= hits <= trials and trials >= 1, got {hits} of {trials}")
    z = NormalDist().inv_cdf((1 + level) / 2)
    p = min(max(hits / trials, 0.0), 1.0)
    center = (p + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z / (1 + z * z / trials) * (p * (1 - p) / trials + z * z / (4 * trials * trials)) ** 0.5
    return Interval(p, 0.0 if p == 0 else center - half, 1.0 if p == 1 else center + half, trials)


def percentiles(values: np.ndarray, points: Sequence[float] = (50, 95, 99)) -> tuple[float, ...]:
    """Return percentiles of all values, with linear interpolation: 0 is the smallest value, 100 the largest."""
    return tuple(float(value) for value in np.percentile(np.asarray(values, np.float64), points))


def fraction_above(values: np.ndarray, thresholds: np.ndarray) -> np.ndarray:
    """Return the fraction of values above each threshold, which a tail plot shows."""
    ordered = np.sort(np.asarray(values, np.float64).ravel())
    return 1 - np.searchsorted(ordered, thresholds, side="right") / len(ordered)
