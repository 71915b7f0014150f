"""What the TPU kernels share: the size of a vector register, and how a cache lies in memory."""

import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Float

from dms_jax.axes import Array

LANES = 128  # of a vector register
VMEM_LIMIT = 48 * 2**20  # of 64 MiB on v5p, 128 MiB on v5e and v6e; the compiler by itself allows 16 MiB


def slots_in_lanes(head_dim: int) -> bool:
    """Whether keys and values lie in memory as [B K H S]. The TPU compiler orders them so where a row of H numbers would leave
    lanes empty; a kernel that asks for rows then costs a copy of the cache."""
    return head_dim % LANES != 0


def in_hbm(x: Array, interpret: bool) -> Array:
    """`x` as an operand that stays where it is: the compiler likes to move a small cache into VMEM, whole, before a kernel runs."""
    return x if interpret else pltpu.with_memory_space_constraint(jnp.asarray(x), pltpu.HBM)


def column(row: Float[Array, "1 S"]) -> Float[Array, "S 1"]:
    """Numbers from lanes to sublanes, inside a kernel."""
    return jnp.broadcast_to(row, (8, row.shape[1])).T[:, :1]
