"""The eviction threshold that meets a realised compression ratio on given text, without training."""

from functools import partial

import jax
import numpy as np
from flax import nnx
from jaxtyping import Float, Int

from dms_jax.axes import Array
from dms_jax.config import ConfigError
from dms_jax.core.losses import live_counts
from dms_jax.models.decoder import Decoder

WIDEST = 2.0**20  # beyond any logit: the search starts at +-1 and doubles up to it


def calibrate(model: Decoder, tokens: Int[Array, "B T"], target_cr: float, *, tolerance: float = 0.01, most_runs: int = 40) -> float:
    """The threshold at which rows `tokens` reach `target_cr`, tokens / mean live pairs at their end, within `tolerance` (relative).

    What a layer keeps changes the logits of the layers above, so each candidate is run, in full, under hard decisions:
    bisection, at most `most_runs` runs. Returns the best candidate seen, since the ratio need not be monotone. The window
    always stays: ConfigError names the highest ratio these rows can reach. Pass the result as `threshold`.
    """
    dms, tokens = model.config.dms, np.asarray(tokens)
    if dms is None:
        raise ConfigError("this model has no eviction policy, so there is no threshold to calibrate; load it with dms=DMSConfig(...)")
    if tokens.ndim != 2 or not tokens.size:
        raise ConfigError(f"calibrate wants tokens of shape [rows, length]; got {list(tokens.shape)}")
    if not target_cr >= 1:
        raise ConfigError(f"target_cr must be >= 1 (1 keeps everything), got {target_cr!r}")
    graph, weights = nnx.split(model)
    length = tokens.shape[1]

    tried: dict[float, float] = {}

    def ratio(threshold: float) -> float:
        tried[threshold] = length / float(_mean_live(graph, weights, tokens, np.float32(threshold)))
        return tried[threshold]

    def close(threshold: float) -> bool:
        return abs(ratio(threshold) / target_cr - 1) <= tolerance

    highest = length / min(length, dms.window_size + 1)
    if target_cr > max(ratio(-np.inf), highest) * (1 + tolerance):
        raise ConfigError(
            f"rows of {length} tokens under a window of {dms.window_size} reach at most {highest:.4g}; use longer rows, or target_cr <= {highest:.4g}"
        )
    low, high, width = -1.0, 1.0, 1.0  # low evicts too much, high too little
    while ratio(low) < target_cr and width < WIDEST:
        width *= 2
        high, low = low, -width
    while ratio(high) > target_cr and width < WIDEST:
        width *= 2
        low, high = high, width
    while len(tried) < most_runs and not close(middle := (low + high) / 2):
        low, high = (middle, high) if tried[middle] > target_cr else (low, middle)
    return min(tried, key=lambda threshold: (abs(tried[threshold] / target_cr - 1), abs(threshold)))


@partial(jax.jit, static_argnames="graph")
def _mean_live(graph: nnx.GraphDef, weights: nnx.State, tokens: Int[Array, "B T"], threshold: Float[Array, ""]) -> Float[Array, ""]:
    model = nnx.merge(graph, weights)
    evict = model.hard_hidden(tokens, None, threshold)[1]
    return live_counts(evict, model.config.dms.window_size, model.config.dms.decision_shift).mean()
