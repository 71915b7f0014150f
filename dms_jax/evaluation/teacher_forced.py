"""Read given text through a compact cache, a few tokens at a time, and compare any policy with the dense model.

Every policy runs as in decoding, at its budget from the first token to the last, except that the next token comes from
the text, not from the model. Methods that rank pairs do so after each chunk, so a query sees at most `chunk` - 1 pairs
more than the budget.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from dms_jax.axes import Array
from dms_jax.core.compact_cache import CompactCache
from dms_jax.core.losses import TokenMetrics, token_metrics
from dms_jax.engine.decode_layout import UnrolledDecoder, unrolled
from dms_jax.engine.decoding import init_cache
from dms_jax.errors import ConfigError
from dms_jax.evaluation.held_out import next_tokens
from dms_jax.evaluation.methods import ranked_pairs
from dms_jax.models.decoder import Decoder
from dms_jax.models.parameters import jitted
from dms_jax.policies import policy_of

CHUNK = 16  # tokens between two rankings; small, to stay close to decoding, which ranks after each token


class OnlineRows(NamedTuple):
    """Measurements of one policy on B rows of T tokens."""

    tokens: TokenMetrics  # [B T], NumPy
    live_by_chunk: Float[np.ndarray, "B n"]  # pairs held after each chunk, mean over layers and heads
    cache: CompactCache  # after the last token


def online_rows(
    model: Decoder,
    dense_hidden: Float[Array, "B T D"],
    tokens: Int[Array, "B T"],
    policy: Any,
    threshold: float = 0.0,
    chunk: int = CHUNK,
) -> OnlineRows:
    """Run rows under `policy` and compare its predictions with those of `dense_hidden`, which `model.dense_hidden`
    returned for the same rows.

    `policy` is anything that `policy_of` takes. The metrics of the last token of a row are meaningless, because it has
    no next token. Raises ConfigError unless T is a multiple of `chunk`.
    """
    rows, length = np.shape(tokens)
    if length % chunk:
        raise ConfigError(
            f"the length of rows must be a multiple of the chunk of {chunk}, got {length}; "
            f"use length {length // chunk * chunk}"
        )
    policy = policy_of(model.config, policy)
    cache = init_cache(model, rows, min(ranked_pairs(policy) or length, length), policy=policy)
    metrics, live, cache = _online(
        unrolled(model), cache, jnp.asarray(tokens), dense_hidden, jnp.float32(threshold), chunk
    )
    return OnlineRows(jax.tree.map(np.asarray, metrics), np.asarray(live), cache)


@partial(jax.jit, static_argnames="chunk")
def _online(
    model: UnrolledDecoder, cache: CompactCache, tokens: Array, dense_hidden: Array, threshold: Array, chunk: int
):
    rows, length = tokens.shape

    def chunks(x):
        return x.reshape(rows, length // chunk, chunk, *x.shape[2:]).swapaxes(0, 1)

    def whole(x):
        return x.swapaxes(0, 1).reshape(rows, length)

    def one(cache, part):
        ids, dense, following = part
        hidden, cache = model.extend(cache, ids, jnp.full(rows, chunk), threshold)
        live = jnp.mean(cache.live_counts.astype(jnp.float32), axis=(0, 2))
        return cache, (token_metrics(hidden, dense, model.head, model.head, following), live)

    cache, (metrics, live) = jax.lax.scan(one, cache, tuple(map(chunks, (tokens, dense_hidden, next_tokens(tokens)))))
    return jax.tree.map(whole, metrics), live.T, cache


def dense_hidden(model: Decoder, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
    """Return the hidden states of the dense model, from a compiled program."""
    return jitted(model, "dense_hidden")(jnp.asarray(tokens))
