"""The dense model: the absence of a policy."""

from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Float, Int

from dms_jax.axes import Array
from dms_jax.core.compact_cache import Expiries
from dms_jax.core.visibility import NEVER
from dms_jax.policies.cache_policy import CachePolicy, SlotBounds

EVERYTHING = 2**30  # more than any row has


def unmarked(logits: Float[Array, "B K T"]) -> Expiries:
    """No pair has a time to leave."""
    return Expiries(jnp.full(logits.shape, NEVER, jnp.int32), jnp.zeros(logits.shape, jnp.float32), None, None)


@dataclass(frozen=True)
class KeepAll(CachePolicy):
    """Nothing leaves unless the buffer is full, and then the oldest pair does. Base of the policies that keep all and add to it."""

    @property
    def window_size(self) -> int:
        return EVERYTHING  # so everything is inside, and the overflow rule picks the oldest

    def slot_bounds(self) -> SlotBounds:
        return SlotBounds(EVERYTHING, None, "a cache that keeps everything")

    def mark(
        self,
        logits: Float[Array, "B K T"],
        position: Int[Array, "B T"],
        count: Int[Array, "B"],
        threshold: float | Float[Array, ""],
    ) -> Expiries:
        return unmarked(logits)
