"""Keep the pairs whose keys have small norms, because they attract attention.

Source: Devoto et al., "A Simple and Effective L2 Norm-Based Strategy", arXiv:2406.11430.
"""

from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Float

from dms_jax.axes import Array
from dms_jax.policies.budget_policy import BudgetPolicy, Pairs


@dataclass(frozen=True)
class KNorm(BudgetPolicy):
    """Keep the pairs whose keys have the smallest L2 norm.

    Deviation: every layer is compressed, whereas the paper leaves the first two dense.
    """

    @property
    def features(self) -> int:
        return 1  # -|k|, computed once

    def first_statistic(self, k: Float[Array, "B K T H"], v: Float[Array, "B K T H"]) -> Float[Array, "B K T 1"]:
        return -jnp.linalg.norm(k.astype(jnp.float32), axis=-1, keepdims=True)

    def keep_scores(self, pairs: Pairs) -> Float[Array, "B K S"]:
        return pairs.memory[..., 0]
