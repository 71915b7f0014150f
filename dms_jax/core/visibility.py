"""THE rule: a pair at position p with expiry e is visible to a query at q iff p <= q <= e. Everything else is derived
from it.

`expiry = p + window_size` once a pair is marked, else NEVER. Training softens the rule: inside the window every pair
is visible, marked or not, and outside it `log_keep` is added to the pair's score.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Bool, Int

from dms_jax.axes import Array, typed

NEVER = jnp.iinfo(jnp.int32).max
MASKED = -1e30  # the score of an invisible pair; finite, so that no gradient meets inf - inf


@typed
def expiry_of(marked: Bool[Array, "*A S"], position: Int[Array, "*#A S"], window_size: int) -> Int[Array, "*A S"]:
    """Return the last query position that sees each pair."""
    return jnp.where(marked, position + window_size, NEVER)


@typed
def is_visible(q_pos: Int[Array, "T"], k_pos: Int[Array, "S"], expiry: Int[Array, "*A S"]) -> Bool[Array, "*A T S"]:
    """Return which query sees which pair: THE definition, against which masks, caches and kernels are tested."""
    q, k = lax.broadcast_to_rank(q_pos[:, None], expiry.ndim + 1), lax.broadcast_to_rank(k_pos, expiry.ndim)
    return (k[..., None, :] <= q) & (q <= expiry[..., None, :])


@typed
def is_outside_window(q_pos: Int[Array, "*#T"], k_pos: Int[Array, "*#T"], window_size: int) -> Bool[Array, "*#T"]:
    """Return where the soft gate acts: exactly where a marked pair would be gone. `q_pos` and `k_pos` broadcast."""
    return q_pos > expiry_of(jnp.ones_like(k_pos, bool), k_pos, window_size)


@typed
def segment_bounds(segment_ids: Int[Array, "B T"]) -> tuple[Int[Array, "B T"], Int[Array, "B T"]]:
    """Return the first and the last position of the segment of each token; a segment is a run of equal ids."""
    index = jnp.broadcast_to(jnp.arange(segment_ids.shape[1])[None], segment_ids.shape)
    change = segment_ids[:, 1:] != segment_ids[:, :-1]
    edge = jnp.ones_like(segment_ids[:, :1], bool)
    starts, ends = jnp.concatenate([edge, change], axis=1), jnp.concatenate([change, edge], axis=1)
    last = jnp.where(ends, index, segment_ids.shape[1])
    return lax.cummax(jnp.where(starts, index, 0), axis=1), lax.cummin(last, axis=1, reverse=True)
