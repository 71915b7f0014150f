"""The decode update composed from functions of `core`, which the kernels are tested and timed against."""

import jax.numpy as jnp
from jaxtyping import Float, Int

from dms_jax.axes import Array
from dms_jax.core import compact_cache
from dms_jax.core.compact_cache import Expiries, LayerCache
from dms_jax.core.rotary import apply_rope
from dms_jax.core.visibility import expiry_of
from dms_jax.kernels.operands import Token


def decode_update(
    token: Token,
    layer: LayerCache,
    seen: Int[Array, "B"],
    count: Int[Array, "B"],
    threshold: Float[Array, ""],
    *,
    window_size: int,
    decision_shift: int | None,
) -> tuple[Float[Array, "B N H"], LayerCache]:
    """Do `attention_api.decode_update` with ordinary operations."""
    q, k = (apply_rope(x, token.cos[:, None], token.sin[:, None]) for x in (token.q, token.k))
    marked, score = (token.logit > threshold)[..., None], token.logit[..., None]
    position, no_score = seen[:, None, None], jnp.zeros_like(score)
    unmarked = expiry_of(jnp.zeros_like(marked), position, window_size)
    if decision_shift == 0:
        expiries = Expiries(expiry_of(marked, position, window_size), score, None, None)
    elif decision_shift == 1:
        last_expiry = expiry_of(marked, position - 1, window_size)[..., 0]
        expiries = Expiries(unmarked, no_score, last_expiry, token.logit)
    else:
        expiries = Expiries(unmarked, no_score, None, None)
    layer = compact_cache.apply_pending(layer, expiries, seen, count)
    return q, compact_cache.append(layer, k[:, :, None], token.v[:, :, None], expiries, seen, count, window_size)
