"""Sizes, memory layouts and small helpers that the TPU kernels share."""

import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Float

from dms_jax.axes import Array

LANES = 128  # lanes of a vector register
VMEM_LIMIT = 48 * 2**20  # bytes; a v5p has 64 MiB, a v5e or v6e 128 MiB, and the compiler's own limit is 16 MiB


def slots_in_lanes(head_dim: int) -> bool:
    """Return whether keys and values are in memory as [B K H S].

    The TPU compiler chooses this order if rows of H numbers would leave lanes empty. A kernel that asks for [B K S H]
    would then cost a copy of the cache.
    """
    return head_dim % LANES != 0


def in_hbm(x: Array, interpret: bool) -> Array:
    """Keep the operand `x` in HBM. The compiler would move all of a small cache into VMEM before a kernel runs."""
    return x if interpret else pltpu.with_memory_space_constraint(jnp.asarray(x), pltpu.HBM)


def column(row: Float[Array, "1 S"]) -> Float[Array, "S 1"]:
    """Move numbers from lanes to sublanes, inside a kernel."""
    return jnp.broadcast_to(row, (8, row.shape[1])).T[:, :1]
