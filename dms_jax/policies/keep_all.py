"""The policy of the dense model, which evicts nothing."""

from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Float, Int

from dms_jax.axes import Array
from dms_jax.core.compact_cache import Expiries
from dms_jax.core.visibility import NEVER
from dms_jax.policies.cache_policy import UNBOUNDED, CachePolicy, FusedRule, SlotBounds


def unmarked(logits: Float[Array, "B K T"]) -> Expiries:
    """Return decisions that mark no pair."""
    return Expiries(jnp.full(logits.shape, NEVER, jnp.int32), jnp.zeros(logits.shape, jnp.float32), None, None)


@dataclass(frozen=True)
class KeepAll(CachePolicy):
    """Keep every pair. If a buffer overflows nevertheless, the oldest pair leaves."""

    in_pages: ClassVar[bool] = True

    @property
    def ring_size(self) -> None:
        return None

    @property
    def window_size(self) -> int:
        return UNBOUNDED  # every pair is inside the window, so the overflow rule picks the oldest

    def slot_bounds(self) -> SlotBounds:
        return SlotBounds(UNBOUNDED, None, "a cache that keeps everything")

    def fused_rule(self) -> FusedRule | None:
        return FusedRule(self.window_size, None)

    def mark(
        self,
        logits: Float[Array, "B K T"],
        position: Int[Array, "B T"],
        count: Int[Array, "B"],
        threshold: float | Float[Array, ""],
    ) -> Expiries:
        return unmarked(logits)
