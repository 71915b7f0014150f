"""THE rule: a pair at position p with expiry e is visible to a query at q iff p <= q <= e. All else is derived from it.

`expiry = p + window_size` once a pair is marked, else NEVER. Training softens it: an unmarked-or-marked pair is always
visible inside the window and carries the additive score `log_keep` outside it.
"""

import jax.numpy as jnp
from jaxtyping import Bool, Int

from dms_jax.axes import Array, typed

NEVER = jnp.iinfo(jnp.int32).max
MASKED = -1e30  # a score that no softmax sees; finite, so that no gradient meets inf - inf


@typed
def expiry_of(marked: Bool[Array, "*A S"], position: Int[Array, "*#A S"], window_size: int) -> Int[Array, "*A S"]:
    """The last query position that sees each pair."""
    return jnp.where(marked, position + window_size, NEVER)


@typed
def is_visible(q_pos: Int[Array, "T"], k_pos: Int[Array, "S"], expiry: Int[Array, "*A S"]) -> Bool[Array, "*A T S"]:
    """THE definition. Masks, caches and kernels are tested against it."""
    return (k_pos <= q_pos[:, None]) & (q_pos[:, None] <= expiry[..., None, :])


@typed
def is_outside_window(q_pos: Int[Array, "*#T"], k_pos: Int[Array, "*#T"], window_size: int) -> Bool[Array, "*#T"]:
    """Where the soft gate acts: exactly where a marked pair would be gone. Broadcasts `q_pos` against `k_pos`."""
    return q_pos > expiry_of(jnp.ones_like(k_pos, bool), k_pos, window_size)
