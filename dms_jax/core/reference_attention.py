"""Dense grouped-query attention that materializes every score: the oracle of the chunked path and of every kernel."""

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from dms_jax.axes import Array, typed
from dms_jax.core.visibility import MASKED, is_outside_window


@typed
def attention_scores_bias(
    log_keep: Float[Array, "B K S"], window_size: int, segment_ids: Int[Array, "B S"] | None
) -> Float[Array, "B K S S"]:
    """Return what is added to the scores: `log_keep` outside the window, MASKED for invisible tokens, else 0."""
    position = jnp.arange(log_keep.shape[-1])
    q_pos, k_pos = position[:, None], position[None, :]
    bias = jnp.where(is_outside_window(q_pos, k_pos, window_size), log_keep[:, :, None, :], 0.0)
    bias = jnp.where(k_pos <= q_pos, bias, MASKED)
    if segment_ids is not None:
        bias = jnp.where((segment_ids[:, :, None] == segment_ids[:, None, :])[:, None], bias, MASKED)
    return bias


@typed
def reference_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    log_keep: Float[Array, "B K T"],
    *,
    window_size: int,
    segment_ids: Int[Array, "B T"] | None = None,
) -> Float[Array, "B T N H"]:
    """Return softmax(q k / sqrt(H) + bias) v, in fp32. `log_keep` belongs to the pair, not to the deciding token."""
    b, t, n, h = q.shape
    grouped = q.reshape(b, t, k.shape[2], -1, h).astype(jnp.float32)
    scores = jnp.einsum("btkgh,bskh->bkgts", grouped, k.astype(jnp.float32)) * h**-0.5
    weights = jax.nn.softmax(scores + attention_scores_bias(log_keep, window_size, segment_ids)[:, :, None], axis=-1)
    return jnp.einsum("bkgts,bskh->btkgh", weights, v.astype(jnp.float32)).reshape(b, t, n, h).astype(q.dtype)
