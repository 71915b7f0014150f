"""How many live pairs each KV head of a benchmark's cache holds: equal counts, counts of a given spread (--ragged), or
those of a real model (--live).

Heads of a real model differ: some keep little more than their window, and others keep everything. Equal counts hide
what that costs in memory, because a cache of slots allocates for the fullest head of a layer, and in time, because a
kernel waits for it. Begin with `log_normal_counts`. Errors are `ConfigError`. Imports no JAX.
"""

import argparse
import math
import statistics
from collections.abc import Callable

import numpy as np

from dms_jax.errors import ConfigError
from dms_jax.evaluation.live_counts import LiveCounts, read_live_counts

MAX_WIDTH = 1e4  # of the normal distribution: wide enough that all heads but one are at a bound
SEED = 0


def add_ragged(parser: argparse.ArgumentParser, live: str) -> None:
    """Add --ragged and --live, of which at most one may be given; `live` says what the benchmark does with a file."""
    group = parser.add_mutually_exclusive_group()
    cv = "live pairs of heads follow a log-normal distribution, clipped to what is possible, with this coefficient of "
    cv += "variation (standard deviation / mean) and the same mean as without; all rows are alike"
    group.add_argument("--ragged", type=float, metavar="CV", help=cv)
    source = "written by `infer.evaluate --tasks kept --live-counts FILE`"
    group.add_argument("--live", metavar="FILE", help=f"live pairs of heads are those in FILE, {source}; {live}")


def check_ragged(options: argparse.Namespace) -> LiveCounts | None:
    """Refuse a --ragged that no distribution has. Return the content of --live, if it is given."""
    if options.ragged is not None and not 0 <= options.ragged < math.inf:
        raise ConfigError(f"--ragged must be a number >= 0, got {options.ragged:g}; use e.g. --ragged 0.9")
    return None if options.live is None else read_live_counts(options.live)


def spread(counts: np.ndarray) -> float:
    """Return the coefficient of variation of counts."""
    return float(np.std(counts) / np.mean(counts))


def memory_record(counts: np.ndarray, allocated: int, pair_bytes: int) -> dict[str, float]:
    """Return what a cache allocates and what of it is live, in bytes. Bookkeeping is allocated, but never live."""
    live = int(counts.sum()) * pair_bytes
    return {"allocated_bytes": allocated, "live_bytes": live, "allocated_to_live": allocated / live}


def memory_text(record: dict) -> str:
    """Return a `memory_record` as a person reads it."""
    allocated, live = (record[name] / 2**20 for name in ("allocated_bytes", "live_bytes"))
    return f"{allocated:.1f} MiB allocated, {live:.1f} MiB live ({record['allocated_to_live']:.2f}x)"


def spread_record(counts: np.ndarray) -> dict[str, float]:
    """Return how far the live pairs of heads differ."""
    return {"live_min": int(counts.min()), "live_max": int(counts.max()), "live_cv": spread(counts)}


def log_normal_counts(heads: int, mean: float, cv: float, low: int, high: int, seed: int = SEED) -> np.ndarray:
    """Draw live pairs [heads] from a log-normal distribution that is clipped to [low, high].

    Its location and width are chosen so that the counts have the given mean and coefficient of variation after the
    clipping: the mean up to rounding the total to a whole number, and cv within 0.01 + 1 / mean. The quantiles at
    (i + 1/2) / heads are taken, so few heads represent the distribution as well as possible, and `seed` decides which
    head gets which. Raises ConfigError if no counts within the bounds have this mean, or this cv.
    """
    total = round(heads * mean)
    if not heads * low <= total <= heads * high:
        raise ConfigError(f"the mean of live pairs must be from {low} (the window) to {high}, got {mean:g}")
    normal = np.array([statistics.NormalDist().inv_cdf((i + 0.5) / heads) for i in range(heads)])
    draw = lambda width: _with_mean(width * normal, total / heads, low, high)
    width = _root(lambda width: spread(draw(width)) - cv, 0.0, MAX_WIDTH)
    counts = _whole(draw(width), total)
    if abs((found := spread(counts)) - cv) > 0.01 + 1 / mean:
        raise ConfigError(
            f"the coefficient of variation of {heads} heads with a mean of {mean:g} live pairs between {low} and "
            f"{high} must be at most {found:.2f}, got {cv:g}"
        )
    return np.random.default_rng(seed).permutation(counts)


def quantile_counts(heads: int, mean: float, measured: np.ndarray, seed: int = SEED) -> np.ndarray:
    """Return live pairs [heads] with the given mean, distributed like measured ones: their quantiles at
    (i + 1/2) / heads, scaled, in an order that `seed` decides. Each head holds at least one pair."""
    values = np.quantile(measured, (np.arange(heads) + 0.5) / heads, method="hazen")
    counts = _whole(values * mean / values.mean(), round(heads * mean))
    return np.random.default_rng(seed).permutation(np.maximum(counts, 1))


def _with_mean(exponents: np.ndarray, mean: float, low: int, high: int) -> np.ndarray:
    """Return exp(exponents + shift), clipped to [low, high], with the shift that gives the mean."""
    bounds = math.log(low), math.log(high)
    clipped = lambda shift: np.exp(np.clip(exponents + shift, *bounds))
    shift = _root(lambda shift: clipped(shift).mean() - mean, bounds[0] - exponents.max(), bounds[1] - exponents.min())
    return np.clip(clipped(shift), low, high)


def _root(increasing: Callable[[float], float], low: float, high: float) -> float:
    """Return where an increasing function is zero, or the nearest end of the interval, by bisection."""
    for _ in range(60):  # more than a float's digits
        middle = (low + high) / 2
        low, high = (low, middle) if increasing(middle) >= 0 else (middle, high)
    return high


def _whole(values: np.ndarray, total: int) -> np.ndarray:
    """Round each value up or down, so that their sum is `total`: those with the largest fractions go up."""
    counts = np.floor(values).astype(np.int64)
    up = np.argsort(counts - values, kind="stable")[: max(0, total - int(counts.sum()))]
    counts[up] += 1
    return counts
