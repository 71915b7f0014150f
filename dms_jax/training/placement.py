"""Place batches on the mesh: find the rows that a process must read, and make global arrays from its host arrays."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from dms_jax.sharding import named_sharding
from dms_jax.training.data.rows import Batch


def row_sharding(shape: tuple[int, ...], mesh: Mesh) -> NamedSharding:
    """Return the sharding of an array of rows [B ...]: B is split over the data axis, other axes are replicated."""
    return named_sharding(("batch",) + (None,) * (len(shape) - 1), shape, mesh)


def local_rows(batch_size: int, mesh: Mesh) -> tuple[int, int]:
    """Return (first, count) of the rows of a global batch that the devices of this process hold."""
    indices = row_sharding((batch_size,), mesh).addressable_devices_indices_map((batch_size,)).values()
    bounds = [index[0].indices(batch_size) for index in indices if index is not None]
    first = min(start for start, _, _ in bounds)
    return first, max(stop for _, stop, _ in bounds) - first


def place(host: Batch, mesh: Mesh, batch_size: int | None = None, first: int = 0) -> Batch:
    """Make a global batch on the mesh.

    `host` holds its rows from row `first` on: all of them, or at least `local_rows`.
    """

    def globally(rows: Any) -> Any:
        shape = (batch_size or len(rows), *rows.shape[1:])

        def shard(index: tuple[slice, ...] | None) -> Any:
            assert index is not None, "JAX asks for the shards of this process's own devices only"
            start, stop, _ = index[0].indices(shape[0])
            return rows[start - first : stop - first]

        return jax.make_array_from_callback(shape, row_sharding(shape, mesh), shard)

    return Batch(*map(globally, host))


def abstract_batch(batch_size: int, length: int, mesh: Mesh) -> Batch:
    """Make the shapes and shardings of a global batch, for lowering a step."""

    def shape(dtype: Any, *dims: int) -> Any:
        return jax.ShapeDtypeStruct(dims, dtype, sharding=row_sharding(dims, mesh))

    rows = batch_size, length
    return Batch(
        shape(jnp.int32, *rows), shape(jnp.int32, *rows), shape(jnp.bool_, *rows), shape(jnp.int32, batch_size)
    )
