"""One mesh, one table. Code speaks in logical axes; the table says which mesh axis carries them."""

import contextlib

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from dms_jax.axes import Array
from dms_jax.config import ConfigError

# "data" carries the batch and the fully sharded parameters, "model" is tensor parallelism over KV heads.
LOGICAL_TO_MESH = {
    "batch": "data",
    "embed": "data",
    "mlp": "model",
    "vocab": "model",
    "q_heads": "model",
    "kv_heads": "model",
    "head_dim": None,
    "layers": None,
    "length": None,
}


def target_device() -> tuple[str, str]:
    """Platform ("cpu", "gpu", "tpu") and kind of the devices that the program being traced is for: those of the mesh that is set,
    which may be hardware that is not here, else this process's own."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is None:
        device = jax.devices()[0]
    return device.platform, device.device_kind


def mesh_of(x: Array) -> contextlib.AbstractContextManager:
    """The context in which to compute with a sharded `x`: its own mesh, unless one is set already or it lies on one device."""
    mesh = getattr(getattr(x, "sharding", None), "mesh", None)
    if isinstance(mesh, Mesh) and mesh.size > 1 and jax.sharding.get_abstract_mesh().empty:
        return jax.set_mesh(mesh)
    return contextlib.nullcontext()


def parse_mesh(text: str) -> tuple[int, int]:
    """`8x1` -> (8, 1): data x model."""
    try:
        data, model = (int(part) for part in str(text).lower().split("x"))
    except ValueError:
        raise ConfigError(f"mesh wants DATAxMODEL, e.g. 8x1; got {text!r}") from None
    if data < 1 or model < 1:
        raise ConfigError(f"both sides of a mesh are at least 1; got {text!r}")
    return data, model


def make_mesh(data: int, model: int) -> Mesh:
    """The device mesh `data x model` over all devices of all processes."""
    devices = jax.devices()
    if data * model != len(devices):
        raise ConfigError(
            f"mesh {data}x{model} needs {data * model} devices, this job has {len(devices)} ({devices[0].device_kind}). Use --mesh {len(devices)}x1"
        )
    return Mesh(np.array(devices).reshape(data, model), ("data", "model"), axis_types=(AxisType.Auto,) * 2)


def spec(axes: tuple[str | None, ...], shape: tuple[int, ...], mesh) -> P:
    """The partition of one array. A misspelt axis is a KeyError; one that the mesh axis does not divide is replicated
    (3 KV heads on a 2-way model axis), and `replicated_axes` says so to the user."""
    return P(*(_mesh_axis(axis, size, mesh) for axis, size in zip(axes, shape, strict=True)))


def _mesh_axis(axis: str | None, size: int, mesh) -> str | None:
    name = None if axis is None else LOGICAL_TO_MESH[axis]
    return name if name in mesh.shape and size % mesh.shape[name] == 0 else None


def named_sharding(axes: tuple[str | None, ...], shape: tuple[int, ...], mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, spec(axes, shape, mesh))


def replicated_axes(sizes: dict[str, int], mesh: Mesh) -> list[str]:
    """What of `sizes` (logical axis -> size) cannot be split over this mesh, as sentences."""
    return [
        f"{axis} ({size}) is replicated: {LOGICAL_TO_MESH[axis]} axis of {mesh.shape[LOGICAL_TO_MESH[axis]]} does not divide it"
        for axis, size in sizes.items()
        if LOGICAL_TO_MESH[axis] and size % mesh.shape[LOGICAL_TO_MESH[axis]]
    ]


def constrain(x: Array, *axes: str | None) -> Array:
    """Pin an intermediate array to its logical axes under `jax.set_mesh`; without a mesh it is the identity."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    return jax.lax.with_sharding_constraint(x, spec(axes, x.shape, mesh))
