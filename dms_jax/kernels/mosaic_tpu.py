"""Sizes, memory layouts, the online softmax and small helpers that the TPU kernels share."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Bool, Float

from dms_jax.axes import Array
from dms_jax.core.visibility import MASKED

CORES = 2  # cores of a v5p chip, which share a grid; other chips run both halves one after the other
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


class OnlineSoftmax(NamedTuple):
    """Accumulators of a block of rows in VMEM, to which an attention kernel adds one block of keys after the other."""

    acc: Any  # [rows, H]
    max: Any  # [rows, 128], all lanes equal
    sum: Any

    def clear(self) -> None:
        self.max[...] = jnp.full(self.max.shape, MASKED, jnp.float32)
        self.sum[...] = jnp.zeros(self.sum.shape, jnp.float32)
        self.acc[...] = jnp.zeros(self.acc.shape, jnp.float32)

    def add(
        self,
        rows: Float[Array, "rows H"],
        keys: Float[Array, "keys H"],
        values: Float[Array, "keys H"],
        visible: Bool[Array, "#rows keys"] | None,
        lanes: bool,
    ) -> None:
        """Add a block of keys. `visible` is None if every row sees every key; the values of a key that no row sees have
        no effect, even if they are NaN. With `lanes` (`slots_in_lanes`), keys and values are [H, keys]."""
        dtype = rows.dtype
        precision = lax.Precision.HIGHEST if dtype == jnp.float32 else None
        product = lambda x, y, contracted: lax.dot_general(
            x, y, (((1,), (contracted,)), ((), ())), precision=precision, preferred_element_type=jnp.float32
        )
        s = product(rows, keys.astype(dtype), 0 if lanes else 1) * rows.shape[1] ** -0.5
        values = values.astype(dtype)
        if visible is not None:
            s = jnp.where(visible, s, MASKED)
            seen = jnp.max(jnp.where(visible, 1.0, 0.0), axis=0, keepdims=True)
            values = jnp.where((seen if lanes else column(seen)) > 0, values, 0)  # 0 * NaN is NaN
        old_max = self.max[:, :1]
        new_max = jnp.maximum(old_max, s.max(axis=1, keepdims=True))
        p = jnp.exp(s - new_max)
        if visible is not None:
            p = jnp.where(visible, p, 0.0)
        rescale = jnp.exp(old_max - new_max)
        self.max[...] = jnp.broadcast_to(new_max, self.max.shape)
        self.sum[...] = self.sum[...] * rescale + p.sum(axis=1, keepdims=True)
        self.acc[...] = self.acc[...] * rescale + product(p.astype(dtype), values, 1 if lanes else 0)

    def write(self, statistics: Any) -> None:
        """Write maximum and sum of each row to `statistics` [2, rows]; `acc` is an output itself."""
        statistics[0:1] = self.max[...].T[0:1]
        statistics[1:2] = self.sum[...].T[0:1]
