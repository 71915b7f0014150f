"""Arguments that the cache kernels share, as named tuples of arrays.

They hold the arrays of a `LayerCache` that the kernels update, and no others: an array that only passes through a kernel's call
would be one more operand to copy or to alias.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from jaxtyping import Float, Int

from dms_jax.axes import Array
from dms_jax.core.compact_cache import LayerCache


class Pairs(NamedTuple):
    """Pairs with what the cache knows of each: the slots of a layer (S = C), or the pairs of a chunk (S = T)."""

    k: Float[Array, "B K S H"]
    v: Float[Array, "B K S H"]
    position: Int[Array, "B K S"]
    expiry: Int[Array, "B K S"]
    score: Float[Array, "B K S"]

    @classmethod
    def of_layer(cls, layer: LayerCache) -> "Pairs":
        """The slots of a layer."""
        return cls(layer.k, layer.v, layer.position, layer.expiry, layer.score)

    def put_into(self, layer: LayerCache) -> LayerCache:
        """The layer with these slots."""
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
    """[B K ...] -> [B*K ...]"""
    return x.reshape(-1, *x.shape[2:])


def unfold_heads(x: Array, shape: Sequence[int]) -> Array:
    """[B*K ...] -> [B K ...], where `shape` begins with B and K."""
    return x.reshape(*shape[:2], *x.shape[1:])
