"""From logits to the next token, row by row: a row's draw depends on its own key and logits only, never on its neighbours.

The order is that of transformers: repetition penalty, temperature, top-k, top-p, min-p. Numbers are traced, so changing one
compiles nothing; `SamplingMode` says which parts exist at all.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int, Key

from dms_jax.axes import Array, typed


@dataclass(frozen=True)
class SamplingMode:
    """Which parts of the program are there: static. Sorting the vocabulary costs more than a small model's step."""

    greedy: bool = True
    sorts: bool = False  # top-k or top-p
    penalises: bool = False


class SamplingNumbers(NamedTuple):
    """Numbers of one call; each is off at the value named."""

    temperature: float | Float[Array, ""] = 1.0
    top_k: int | Int[Array, ""] = 0  # 0
    top_p: float | Float[Array, ""] = 1.0  # 1
    min_p: float | Float[Array, ""] = 0.0  # 0
    repetition_penalty: float | Float[Array, ""] = 1.0  # 1


@typed
def penalise(
    logits: Float[Array, "B V"], used: Bool[Array, "B V"], penalty: float | Float[Array, ""]
) -> Float[Array, "B V"]:
    """Tokens that a row has `used` become less likely: positive logits / penalty, negative ones * penalty (CTRL, arXiv:1909.05858)."""
    return jnp.where(used, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)


@typed
def allowed(logits: Float[Array, "B V"], numbers: SamplingNumbers, sorts: bool) -> Bool[Array, "B V"]:
    """Which tokens top-k, top-p and min-p leave, for logits that are already divided by the temperature; the best always stays."""
    keep = logits >= logits.max(-1, keepdims=True) + jnp.log(numbers.min_p)
    if not sorts:
        return keep
    ordered = jnp.sort(logits, axis=-1, descending=True)
    rank = jnp.arange(logits.shape[-1])
    in_k = (rank < numbers.top_k) | (numbers.top_k <= 0)
    weights = jax.nn.softmax(jnp.where(in_k, ordered, -jnp.inf), axis=-1)
    # The smallest set whose mass reaches top_p: a token stays if the mass before it has not reached it yet.
    stays = in_k & ((jnp.cumsum(weights, axis=-1) - weights < numbers.top_p) | (numbers.top_p >= 1.0))
    lowest = jnp.min(jnp.where(stays | (rank == 0), ordered, jnp.inf), axis=-1, keepdims=True)
    return keep & (logits >= lowest)


@typed
def sample(
    logits: Float[Array, "B V"],
    keys: Key[Array, "B"],
    used: Bool[Array, "B V"] | None,
    numbers: SamplingNumbers,
    mode: SamplingMode,
) -> Int[Array, "B"]:
    """The next token of each row. Greedy takes the best after the repetition penalty; `keys` [B] are then not used."""
    logits = logits.astype(jnp.float32)
    if mode.penalises:
        assert used is not None  # `penalises` says that the caller counts them
        logits = penalise(logits, used, numbers.repetition_penalty)
    if mode.greedy:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = logits / numbers.temperature
    logits = jnp.where(allowed(logits, numbers, mode.sorts), logits, -jnp.inf)
    return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)


@typed
def token_logprobs(logits: Float[Array, "B V"], tokens: Int[Array, "B"]) -> Float[Array, "B"]:
    """log p of each row's token under the model itself: temperature 1, nothing cut."""
    return jnp.take_along_axis(jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1), tokens[:, None], axis=-1)[:, 0]
