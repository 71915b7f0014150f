"""Find the eviction threshold that meets a realised compression ratio on given text, without training."""

import math
from collections.abc import Callable

import numpy as np
from jaxtyping import Float, Int

from dms_jax.axes import Array
from dms_jax.config import DMSConfig
from dms_jax.core.cr_schedule import realised_cr
from dms_jax.core.eviction import decidable
from dms_jax.errors import ConfigError
from dms_jax.models.decoder import Decoder
from dms_jax.models.parameters import jitted

MAX_THRESHOLD = 1e6  # beyond any logit
Scores = Callable[[float], Float[np.ndarray, "L B K T"]]  # threshold -> evict logits when rows run with it


def calibrate(
    model: Decoder, tokens: Int[Array, "B T"], target_cr: float, *, tolerance: float = 0.01, most_runs: int = 12
) -> float:
    """Return the threshold at which the rows `tokens` reach `target_cr` (tokens / mean live pairs at their end).

    Runs the hard path until the ratio is within the relative `tolerance`, at most `most_runs` times, and returns the
    best threshold seen. Pass it as `threshold` to `prefill` or `generate`. The window always stays in the cache, which
    limits the ratio that these rows can reach; a target above that limit raises a ConfigError that states it.
    """
    dms, tokens = check_rows(model, tokens, "calibrate")
    scores = jitted(model, "hard_scores")
    return threshold_for(
        lambda threshold: np.asarray(scores(tokens, None, np.float32(threshold))),
        dms,
        target_cr,
        tolerance,
        most_runs,
    )


def check_rows(model: Decoder, tokens: Int[Array, "B T"], function: str) -> tuple[DMSConfig, Int[np.ndarray, "B T"]]:
    """Return the parameters of the evict head and the calibration rows of a `function`, after checking both."""
    dms, tokens = model.config.dms, np.asarray(tokens)
    if dms is None:
        raise ConfigError(
            f"{function} needs a model with an eviction policy, but this one has none; load it with dms=DMSConfig(...)"
        )
    if tokens.ndim != 2 or not tokens.size:
        raise ConfigError(f"tokens must have the shape [rows, length], got {list(tokens.shape)}")
    return dms, tokens


def threshold_for(
    scores: Scores,
    dms: DMSConfig,
    target_cr: float,
    tolerance: float = 0.01,
    most_runs: int = 12,
    start: float = 0.0,
) -> float:
    """Search for the threshold of `calibrate`; `scores` runs the rows, first with the threshold `start`.

    Evictions in one layer change the logits of the layers above, so every candidate must be run. The next candidate is
    the threshold that would be right if the logits did not change. If it lies outside the interval between the
    thresholds known to be too low and too high, the middle of that interval is tried instead.
    """
    if not target_cr >= 1:
        raise ConfigError(f"target_cr must be >= 1 (1 keeps everything), got {target_cr!r}")
    low, high, threshold = -MAX_THRESHOLD, MAX_THRESHOLD, start
    tried: dict[float, float] = {}  # threshold -> realised ratio
    for _ in range(most_runs):
        logits = scores(threshold)
        length = logits.shape[-1]
        pool = np.sort(logits[..., decidable(length, dms.window_size, dms.decision_shift)], axis=None)[::-1]
        pairs = logits.size
        num_evicted = round(pairs * (1 - 1 / target_cr))
        if num_evicted > pool.size * (1 + tolerance):
            highest = realised_cr(math.inf, length, dms.window_size)
            raise ConfigError(
                f"target_cr must be at most {highest:.4g} for rows of {length} tokens and a window of "
                f"{dms.window_size}, got {target_cr:.4g}; use longer rows, or target_cr <= {highest:.4g}"
            )
        tried[threshold] = pairs / (pairs - int(np.sum(pool > threshold)))
        if abs(tried[threshold] / target_cr - 1) <= tolerance:
            break
        low, high = (threshold, high) if tried[threshold] > target_cr else (low, threshold)
        threshold = _between(pool, num_evicted)
        if not low < threshold < high:
            threshold = (low + high) / 2
    return float(min(tried, key=lambda candidate: (abs(tried[candidate] / target_cr - 1), abs(candidate))))


def _between(ordered: np.ndarray, number: int) -> float:
    """Return a value that exactly the first `number` of the descending values `ordered` exceed."""
    if number <= 0:
        return float(ordered[0]) + 1.0 if len(ordered) else 0.0
    if number >= len(ordered):
        return float(ordered[-1]) - 1.0
    return float(ordered[number - 1] + ordered[number]) / 2
