"""Keep the pairs without which attention outputs would change most.

Source: "DropKV", openreview.net/forum?id=MqfNzH3TVH, and its pull request for kvpress (NVIDIA/kvpress, 285).
"""

from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Float

from dms_jax.axes import EXACT, Array
from dms_jax.policies.budget_policy import Pairs
from dms_jax.policies.snapkv import SnapKV

EPSILON = 1e-6  # as in kvpress: keeps the weight finite for a query that attends to one pair only


@dataclass(frozen=True)
class DropKV(SnapKV):
    """Keep the last `observation_window` pairs, and those whose removal would move the outputs of these queries most.

    If a pair with weight p and value v leaves, the other weights grow by 1 / (1 - p), and the output o moves by
    p / (1 - p) (o - v). The score is the square of this distance, averaged over query heads, the last
    `observation_window` queries and `kernel_size` neighbors. It has the same unit in all heads.

    Deviation: as in `SnapKV`, the window moves with each token, and neighbors are adjacent in the cache.
    """

    observation_window: int = 32
    kernel_size: int = 7

    def importance(self, weights: Float[Array, "B K G n S"], v: Float[Array, "B K S H"]) -> Float[Array, "B K n S"]:
        v = v.astype(jnp.float32)
        out = jnp.einsum("bkgns,bksh->bkgnh", weights, v, precision=EXACT)
        square = lambda x: jnp.sum(x * x, axis=-1)
        both = jnp.einsum("bkgnh,bksh->bkgns", out, v, precision=EXACT)
        distance = jnp.maximum(square(v)[:, :, None, None] - 2 * both + square(out)[..., None], 0.0)  # |v - o|^2
        return jnp.mean((weights / (1 - weights + EPSILON)) ** 2 * distance, axis=2)

    def keep_scores(self, pairs: Pairs) -> Float[Array, "B K S"]:
        return self.with_window(pairs, self.pooled(pairs, pairs.alive))
