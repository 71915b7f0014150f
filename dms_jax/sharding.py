"""One mesh, one table. Code speaks in logical axes; the table says which mesh axes carry them."""

import contextlib
import math
from functools import partial

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from dms_jax.axes import Array
from dms_jax.errors import ConfigError

# "data" carries rows, "model" is tensor parallelism over heads, MLP channels and the vocabulary, "context" carries the length of rows.
# Parameters are fully sharded over data and context together.
MESH_AXES = ("data", "model", "context")
LOGICAL_TO_MESH = {
    "batch": ("data",),
    "embed": ("data", "context"),
    "mlp": ("model",),
    "vocab": ("model",),
    "q_heads": ("model",),
    "kv_heads": ("model",),
    "heads": ("model", "context"),  # of attention over whole rows
    "length": ("context",),
    "sequence": (
        "context",
        "model",
    ),  # the length between products: those mesh axes that no other axis of the array has taken
    "rows": ("data", "context"),  # parts of rows as rows of their own: `fold_length`
    "pieces": ("data", "context", "model"),
    "head_dim": (),
    "layers": (),
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


def parse_mesh(text: str) -> tuple[int, ...]:
    """`8x1` -> (8, 1): data x model; `2x2x2` -> (2, 2, 2): data x model x context. Raises ConfigError."""
    try:
        sizes = tuple(int(part) for part in str(text).lower().split("x"))
    except ValueError:
        sizes = ()
    if len(sizes) not in (2, 3):
        raise ConfigError(f"mesh wants DATAxMODEL or DATAxMODELxCONTEXT, e.g. 8x1 or 2x2x2; got {text!r}")
    if min(sizes) < 1:
        raise ConfigError(f"all sides of a mesh are at least 1; got {text!r}")
    return sizes


def make_mesh(*sizes: int) -> Mesh:
    """The device mesh data x model (x context) over all devices of all processes. Raises ConfigError when they are not as many."""
    devices = jax.devices()
    if math.prod(sizes) != len(devices):
        raise ConfigError(
            f"mesh {'x'.join(map(str, sizes))} needs {math.prod(sizes)} devices, this job has {len(devices)} "
            f"({devices[0].device_kind}). Use --mesh {len(devices)}x1"
        )
    # On a TPU the last axes become neighbours in its network; elsewhere devices come in order, hosts along the first axis.
    grid = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    return Mesh(np.asarray(grid), MESH_AXES[: len(sizes)], axis_types=(AxisType.Auto,) * len(sizes))


def spec(axes: tuple[str | None, ...], shape: tuple[int, ...], mesh) -> P:
    """The partition of one array. A misspelt axis is a KeyError; one that its mesh axes do not divide is split by those of them that do,
    or replicated (3 KV heads on a 2-way model axis), and `replicated_axes` says so to the user."""
    parts: list[tuple[str, ...]] = [()] * len(axes)
    taken: set[str] = set()
    for i in sorted(range(len(axes)), key=lambda i: axes[i] == "sequence"):  # last, of what is left
        left = shape[i]
        for name in _carriers(axes[i], mesh):
            if name not in taken and left % mesh.shape[name] == 0:
                left //= mesh.shape[name]
                parts[i] += (name,)
                taken.add(name)
    return P(*(None if not names else names[0] if len(names) == 1 else names for names in parts))


def _carriers(axis: str | None, mesh) -> tuple[str, ...]:
    """The axes that this mesh has of those that carry `axis`."""
    return () if axis is None else tuple(name for name in LOGICAL_TO_MESH[axis] if name in mesh.shape)


def ways(axis: str, mesh=None) -> int:
    """How many devices share an axis that can be split at will, under `jax.set_mesh` or on `mesh`."""
    mesh = jax.sharding.get_abstract_mesh() if mesh is None else mesh
    return math.prod(mesh.shape[name] for name in _carriers(axis, mesh))


def named_sharding(axes: tuple[str | None, ...], shape: tuple[int, ...], mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, spec(axes, shape, mesh))


def replicated_axes(sizes: dict[str, int], mesh: Mesh) -> list[str]:
    """What of `sizes` (logical axis -> size) cannot be split over all devices that should share it, as sentences."""
    found = []
    for axis, size in sizes.items():
        names = _carriers(axis, mesh)
        if size % ways(axis, mesh):
            used = spec((axis,), (size,), mesh)[0]
            state = "is replicated" if used is None else f"is split by the {used} axis only"
            over = " x ".join(f"{name} axis of {mesh.shape[name]}" for name in names)
            found.append(f"{axis} ({size}) {state}: {over} does not divide it")
    return found


def constrain(x: Array, *axes: str | None) -> Array:
    """Pin an intermediate array to its logical axes under `jax.set_mesh`; without a mesh it is the identity."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    return jax.lax.with_sharding_constraint(x, spec(axes, x.shape, mesh))


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def reshard(x: Array, axes: tuple[str | None, ...], back: tuple[str | None, ...]) -> Array:
    """`constrain` to `axes`, and the gradient to `back`. `constrain` alone pins the gradient to where the value is: a weight that was
    gathered would have its whole gradient summed on every device before each keeps its part."""
    return constrain(x, *axes)


reshard.defvjp(
    lambda x, axes, back: (constrain(x, *axes), None), lambda axes, back, _, gradient: (constrain(gradient, *back),)
)


def to_split(x: Array, axis: str, size: int) -> Array:
    """x [B T D], split by its length, as a product with weights that are split along `axis`, of `size`, wants it: from all devices that
    share those weights. Where they cannot be shared each device keeps to its own part of the length."""
    size = size if ways(axis) > 1 else 0
    if not size or size % ways(axis):
        return x
    return reshard(x, ("batch", "length", None), ("batch", "sequence", None))


def fold_length(x: Array) -> Array:
    """[B T ...] -> [B*n T/n ...]: the part of a row that each of n devices holds as a row of its own, axis "pieces". A loop over the
    length then runs on all devices at once."""
    mesh = jax.sharding.get_abstract_mesh()
    split = spec(("batch", "sequence"), x.shape[:2], mesh)[1] if not mesh.empty else None
    if split is None:
        return x
    n = math.prod(mesh.shape[name] for name in ((split,) if isinstance(split, str) else split))
    x = x.reshape(x.shape[0], n, x.shape[1] // n, *x.shape[2:])
    return constrain(x.reshape(-1, *x.shape[2:]), "pieces", *(None,) * (x.ndim - 2))


def unfold_length(x: Array, rows: int) -> Array:
    """The inverse of `fold_length`: as many rows as there were."""
    return (
        constrain(x.reshape(rows, -1, *x.shape[2:]), "batch", "sequence", *(None,) * (x.ndim - 2))
        if len(x) != rows
        else x
    )
