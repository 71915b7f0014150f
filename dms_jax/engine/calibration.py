"""The eviction threshold that meets a realised compression ratio on given text, without training."""

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

WIDEST = 1e6  # beyond any logit
Scores = Callable[[float], Float[np.ndarray, "L B K T"]]  # threshold -> evict logits of some rows that decide under it


def calibrate(
    model: Decoder, tokens: Int[Array, "B T"], target_cr: float, *, tolerance: float = 0.01, most_runs: int = 12
) -> float:
    """The threshold at which rows `tokens` reach `target_cr`, tokens / mean live pairs at their end, within `tolerance` (relative).

    At most `most_runs` runs of the hard path; returns the best threshold seen. The window always stays: ConfigError names the
    highest ratio these rows can reach. Pass the result as `threshold`.
    """
    dms, tokens = model.config.dms, np.asarray(tokens)
    if dms is None:
        raise ConfigError(
            "this model has no eviction policy, so there is no threshold to calibrate; load it with dms=DMSConfig(...)"
        )
    if tokens.ndim != 2 or not tokens.size:
        raise ConfigError(f"calibrate wants tokens of shape [rows, length]; got {list(tokens.shape)}")
    scores = jitted(model, "hard_scores")
    return threshold_for(
        lambda threshold: np.asarray(scores(tokens, None, np.float32(threshold))),
        dms,
        target_cr,
        tolerance,
        most_runs,
    )


def threshold_for(
    scores: Scores, dms: DMSConfig, target_cr: float, tolerance: float = 0.01, most_runs: int = 12
) -> float:
    """`calibrate`, for rows that `scores` knows how to run.

    What a layer forgets changes the logits of the layers above, so each candidate is run. The next one is the threshold that
    would be right if those logits did not change; when that steps out of what is known to be too low and too high, their middle.
    """
    if not target_cr >= 1:
        raise ConfigError(f"target_cr must be >= 1 (1 keeps everything), got {target_cr!r}")
    low, high, threshold = -WIDEST, WIDEST, 0.0
    tried: dict[float, float] = {}
    for _ in range(most_runs):
        seen = scores(threshold)
        length = seen.shape[-1]
        pool = np.sort(seen[..., decidable(length, dms.window_size, dms.decision_shift)], axis=None)[::-1]
        pairs = seen.size
        wanted = round(pairs * (1 - 1 / target_cr))
        if wanted > pool.size * (1 + tolerance):
            highest = realised_cr(math.inf, length, dms.window_size)
            way_out = f"use longer rows, or target_cr <= {highest:.4g}"
            raise ConfigError(
                f"rows of {length} tokens under a window of {dms.window_size} reach at most {highest:.4g}; {way_out}"
            )
        tried[threshold] = pairs / (pairs - int(np.sum(pool > threshold)))
        if abs(tried[threshold] / target_cr - 1) <= tolerance:
            break
        low, high = (threshold, high) if tried[threshold] > target_cr else (low, threshold)
        threshold = _between(pool, wanted)
        if not low < threshold < high:
            threshold = (low + high) / 2
    return float(min(tried, key=lambda candidate: (abs(tried[candidate] / target_cr - 1), abs(candidate))))


def _between(ordered: np.ndarray, number: int) -> float:
    """A value that the first `number` of falling values exceed, and the rest do not."""
    if number <= 0:
        return float(ordered[0]) + 1.0 if len(ordered) else 0.0
    if number >= len(ordered):
        return float(ordered[-1]) - 1.0
    return float(ordered[number - 1] + ordered[number]) / 2
