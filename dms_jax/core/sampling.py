"""From logits to the next token, row by row: a row's draw depends on its own key and logits only.

The order is that of transformers: repetition penalty, temperature, top-k, top-p, min-p. Their values are traced, so
changing one compiles nothing; `SamplingMode` says which of these steps the program contains.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int, Key

from dms_jax.axes import Array, typed

MIN_DIVISOR = 1e-30  # fp32 holds ordinary logits divided by this; below 1e-38 it would divide by zero
MAX_LOGIT = 1e37


@dataclass(frozen=True)
class SamplingMode:
    """The steps that the program contains. Sorting the vocabulary alone costs more than a small model's decode step."""

    greedy: bool = True
    sorts: bool = False  # for top-k or top-p
    penalizes: bool = False  # for the repetition penalty


class SamplingNumbers(NamedTuple):
    """Sampling parameters of one call; at its default, each has no effect."""

    temperature: float | Float[Array, ""] = 1.0  # at most MIN_DIVISOR: see `SamplingMode.greedy`
    top_k: int | Int[Array, ""] = 0
    top_p: float | Float[Array, ""] = 1.0
    min_p: float | Float[Array, ""] = 0.0
    repetition_penalty: float | Float[Array, ""] = 1.0


@typed
def penalize(
    logits: Float[Array, "B V"], used: Bool[Array, "B V"], penalty: float | Float[Array, ""]
) -> Float[Array, "B V"]:
    """Make the tokens that a row has `used` less likely: positive logits / penalty, negative ones * penalty.

    Source: CTRL, arXiv:1909.05858. A penalty so small or so large that the result would not be finite is limited.
    """
    largest = _largest(logits)
    penalty = jnp.clip(penalty, jnp.maximum(MIN_DIVISOR, largest / MAX_LOGIT), MAX_LOGIT / jnp.maximum(largest, 1.0))
    return jnp.where(used, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)


@typed
def allowed(logits: Float[Array, "B V"], numbers: SamplingNumbers, sorts: bool) -> Bool[Array, "B V"]:
    """Return the tokens that pass top-k, top-p and min-p; the best token always passes.

    Logits are already divided by the temperature. Without `sorts`, only min-p applies.
    """
    keep = logits >= logits.max(-1, keepdims=True) + jnp.log(numbers.min_p)
    if not sorts:
        return keep
    ordered = jnp.sort(logits, axis=-1, descending=True)
    rank = jnp.arange(logits.shape[-1])[None]
    in_k = (rank < numbers.top_k) | (numbers.top_k <= 0)
    weights = jax.nn.softmax(jnp.where(in_k, ordered, -jnp.inf), axis=-1)
    # Top-p keeps the smallest set whose mass reaches top_p: a token passes if the mass before it has not reached it.
    passes = in_k & ((jnp.cumsum(weights, axis=-1) - weights < numbers.top_p) | (numbers.top_p >= 1.0))
    lowest = jnp.min(jnp.where(passes | (rank == 0), ordered, jnp.inf), axis=-1, keepdims=True)
    return keep & (logits >= lowest)


@typed
def sample(
    logits: Float[Array, "B V"],
    keys: Key[Array, "B"],
    used: Bool[Array, "B V"] | None,
    numbers: SamplingNumbers,
    mode: SamplingMode,
) -> Int[Array, "B"]:
    """Return the next token of each row; greedy takes the best after the repetition penalty and ignores `keys`."""
    logits = logits.astype(jnp.float32)
    if mode.penalizes:
        assert used is not None  # a caller that asks for the penalty tracks the used tokens
        logits = penalize(logits, used, numbers.repetition_penalty)
    if mode.greedy:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    # A temperature at which a logit would not be finite is raised; the best token is then still the only likely one.
    logits = logits / jnp.maximum(numbers.temperature, jnp.maximum(MIN_DIVISOR, _largest(logits) / MAX_LOGIT))
    logits = jnp.where(allowed(logits, numbers, mode.sorts), logits, -jnp.inf)
    return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)


def _largest(logits: Float[Array, "B V"]) -> Float[Array, "B 1"]:
    """Return the largest absolute logit of each row."""
    return jnp.max(jnp.abs(logits), axis=-1, keepdims=True)


@typed
def token_logprobs(logits: Float[Array, "B V"], tokens: Int[Array, "B"]) -> Float[Array, "B"]:
    """Return log p of each row's token under the model itself: at temperature 1, with all tokens allowed."""
    return jnp.take_along_axis(jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1), tokens[:, None], axis=-1)[:, 0]
