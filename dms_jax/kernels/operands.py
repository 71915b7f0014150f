"""Arguments that the cache kernels share, as named tuples of arrays.

They contain only those arrays of a `LayerCache` that the kernels update, because any other array would be one more
operand to copy or to alias.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from jaxtyping import Float, Int

from dms_jax.axes import Array
from dms_jax.core.compact_cache import LayerCache


class Pairs(NamedTuple):
    """Pairs with their bookkeeping: the slots of a layer (S = C), or the pairs of a chunk (S = T)."""

    k: Float[Array, "B K S H"]
    v: Float[Array, "B K S H"]
    position: Int[Array, "B K S"]
    expiry: Int[Array, "B K S"]
    score: Float[Array, "B K S"]

    @classmethod
    def of_layer(cls, layer: LayerCache) -> "Pairs":
        """Return the slots of a layer."""
        return cls(layer.k, layer.v, layer.position, layer.expiry, layer.score)

    def put_into(self, layer: LayerCache) -> LayerCache:
        """Return the layer with these slots."""
        return replace(layer, **self._asdict())


class Token(NamedTuple):
    """One token per row before RoPE, the angles of its position, and the logit of its eviction decision."""

    q: Float[Array, "B N H"]
    k: Float[Array, "B K H"]
    v: Float[Array, "B K H"]
    cos: Float[Array, "B H/2"]
    sin: Float[Array, "B H/2"]
    logit: Float[Array, "B K"]


def fold_heads(x: Array) -> Array:
    """Reshape [B K ...] to [B*K ...]."""
    return x.reshape(-1, *x.shape[2:])


def unfold_heads(x: Array, shape: Sequence[int]) -> Array:
    """Reshape [B*K ...] to [B K ...]; `shape` begins with B and K."""
    return x.reshape(*shape[:2], *x.shape[1:])
