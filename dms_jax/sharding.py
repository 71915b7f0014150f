"""One mesh and one table: code names logical axes, and the table says which mesh axes split them."""

import contextlib
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from dms_jax.axes import Array
from dms_jax.device_guard import warn_once
from dms_jax.errors import ConfigError

# "data" splits the rows of a batch. "model" is tensor parallelism over heads, MLP channels and the vocabulary.
# "context" splits the length of rows. Parameters are fully sharded over data and context together.
MESH_AXES = ("data", "model", "context")
# Inference splits rows over "replica" in place of "data". Parameters are not split over it, because gathering them for
# every token would take longer than the rest of the step.
INFERENCE_AXES = ("replica", "model")
LOGICAL_TO_MESH = {
    "batch": ("data", "replica"),
    "embed": ("data", "context"),
    "mlp": ("model",),
    "vocab": ("model",),
    "q_heads": ("model",),
    "kv_heads": ("model",),
    "heads": ("model", "context"),  # heads inside training attention, where each device holds whole rows of some heads
    "length": ("context",),
    # Sequence-parallel activations between matmuls: T uses those of these mesh axes that no other array axis uses.
    "sequence": ("context", "model"),
    # `fold_length` turns each device's part of a row into a separate row. "rows" leaves the model axis to the
    # vocabulary.
    "row_parts": ("data", "context", "model"),
    "rows": ("data", "context"),
    "arenas": ("data", "replica", "model", "context"),  # the pages of a cache: each device has its own
    "head_dim": (),
    "evict_units": (),
    "layers": (),
}


def target_device() -> tuple[str, str]:
    """Return the platform ("cpu", "gpu", "tpu") and the kind of the devices that the program being traced will run on.

    Under `jax.set_mesh`, these are the devices of that mesh, which need not be attached to this machine. Otherwise,
    they are the devices of this process.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is None:
        device = jax.devices()[0]
        warn_once(device.platform)
    return device.platform, device.device_kind


def devices_of(x: Array) -> Mesh | None:
    """Return the mesh that `x` is on; None if that is a single device."""
    mesh = getattr(getattr(x, "sharding", None), "mesh", None)
    return mesh if isinstance(mesh, Mesh) and mesh.size > 1 else None


def mesh_of(x: Array) -> contextlib.AbstractContextManager:
    """Return a context that sets the mesh of `x`, unless a mesh is already set or `x` is on a single device."""
    mesh = devices_of(x)
    if mesh is None or not jax.sharding.get_abstract_mesh().empty:
        return contextlib.nullcontext()
    return jax.set_mesh(mesh)


def shard_heads(tree: Any) -> Any:
    """Split new arrays [B] or [B K ...] by rows and KV heads over the mesh that is set, if there is one."""
    if jax.sharding.get_abstract_mesh().empty:
        return tree

    def place(x: Array) -> Array:
        axes = ("batch", "kv_heads")[: x.ndim]  # as compiled steps write them, without the axes that are not split
        return jax.device_put(x, named_sharding(axes, x.shape, jax.sharding.get_mesh()))

    return jax.tree.map(place, tree)


def parse_mesh(text: str) -> tuple[int, ...]:
    """Parse the sizes of a mesh: "8x1" (data x model) or "2x2x2" (data x model x context). Raises ConfigError."""
    try:
        sizes = tuple(int(part) for part in str(text).lower().split("x"))
    except ValueError:
        sizes = ()
    if len(sizes) not in (2, 3):
        raise ConfigError(f"mesh must be DATAxMODEL or DATAxMODELxCONTEXT, e.g. 8x1 or 2x2x2, got {text!r}")
    if min(sizes) < 1:
        raise ConfigError(f"every side of a mesh must be at least 1, got {text!r}")
    return sizes


def make_mesh(*sizes: int, axes: tuple[str, ...] = MESH_AXES) -> Mesh:
    """Make the mesh data x model (x context), or one with other `axes`, over all devices of all processes.

    Raises ConfigError unless the product of `sizes` equals the number of devices.
    """
    devices = jax.devices()
    if math.prod(sizes) != len(devices):
        raise ConfigError(
            f"mesh {'x'.join(map(str, sizes))} needs {math.prod(sizes)} devices, this job has {len(devices)} "
            f"({devices[0].device_kind}); use --mesh {len(devices)}x1"
        )
    # On a TPU, devices along the last axes are neighbors in its network. On other platforms, devices keep their order,
    # with hosts along the first axis.
    grid = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    return Mesh(np.asarray(grid), axes[: len(sizes)], axis_types=(AxisType.Auto,) * len(sizes))


def spec(axes: tuple[str | None, ...], shape: tuple[int, ...], mesh) -> P:
    """Return the partition of an array of `shape` whose logical axes are `axes`; an axis of None is not split.

    An axis is split over those of its mesh axes that divide it evenly; if none does, it is replicated (3 KV heads on a
    model axis of 2), and `replicated_axes` tells the user. A misspelled axis is a KeyError.
    """
    parts: list[tuple[str, ...]] = [()] * len(axes)
    taken: set[str] = set()
    # "sequence" comes last, because it takes the mesh axes that the others left.
    for i in sorted(range(len(axes)), key=lambda i: axes[i] == "sequence"):
        left = shape[i]
        for name in _mesh_axes_of(axes[i], mesh):
            if name not in taken and left % mesh.shape[name] == 0:
                left //= mesh.shape[name]
                parts[i] += (name,)
                taken.add(name)
    return P(*(None if not names else names[0] if len(names) == 1 else names for names in parts))


def _mesh_axes_of(axis: str | None, mesh) -> tuple[str, ...]:
    """Return those mesh axes for the logical `axis` that exist in `mesh`."""
    return () if axis is None else tuple(name for name in LOGICAL_TO_MESH[axis] if name in mesh.shape)


def num_shards(axis: str, mesh=None) -> int:
    """Return the number of shards of a logical axis that divides evenly. By default, `mesh` is the one that is set."""
    mesh = jax.sharding.get_abstract_mesh() if mesh is None else mesh
    return math.prod(mesh.shape[name] for name in _mesh_axes_of(axis, mesh))


def named_sharding(axes: tuple[str | None, ...], shape: tuple[int, ...], mesh: Mesh) -> NamedSharding:
    """Return `spec(axes, shape, mesh)` as a sharding of `mesh`."""
    return NamedSharding(mesh, spec(axes, shape, mesh))


def replicated_axes(sizes: dict[str, int], mesh: Mesh) -> list[str]:
    """Return a sentence for each of `sizes` (logical axis -> size) that its mesh axes do not divide evenly."""
    found = []
    for axis, size in sizes.items():
        names = _mesh_axes_of(axis, mesh)
        if size % num_shards(axis, mesh):
            used = spec((axis,), (size,), mesh)[0]
            state = "is replicated" if used is None else f"is split by the {used} axis only"
            over = " x ".join(f"{name} axis of {mesh.shape[name]}" for name in names)
            found.append(f"{axis} ({size}) {state}: {over} does not divide it")
    return found


def per_device(f: Callable, sizes: tuple[int, ...], axes_in: list, axes_out: Any) -> Callable:
    """Run `f` on each device's own rows and KV heads if a mesh is set; `sizes` are the numbers of rows and of KV heads.

    `axes_in` and `axes_out` have the structure of the arguments and the results of `f`. In place of each array, they
    hold its axes as words: "." is never split, "heads" are KV heads over the model and context axes together, and
    "arenas" has one entry for each device. An axis that its mesh axes do not divide is not split. "batch=8" stands for
    a number of rows other than the one in `sizes`.
    """
    mesh = jax.sharding.get_abstract_mesh()
    # With manual axes, each device already runs this code by itself.
    if mesh.empty or math.prod(mesh.axis_sizes) == 1 or mesh.manual_axes:
        return f
    size_of = {".": 0, "batch": sizes[0], "kv_heads": sizes[1], "heads": sizes[1], "arenas": mesh.size}

    def partition(axes: str):
        words = [word.partition("=") for word in axes.split()]
        names = tuple(None if name == "." else name for name, _, _ in words)
        return spec(names, tuple(int(size) if size else size_of[name] for name, _, size in words), mesh)

    def run(*args):
        specs = tuple(
            None if x is None else jax.tree.map(partition, axes) for axes, x in zip(axes_in, args, strict=True)
        )
        return jax.shard_map(f, in_specs=specs, out_specs=jax.tree.map(partition, axes_out), check_vma=False)(*args)

    return run


def constrain(x: Array, *axes: str | None) -> Array:
    """Fix the sharding of an intermediate array by its logical axes; return it unchanged if no mesh is set."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    return jax.lax.with_sharding_constraint(x, spec(axes, x.shape, mesh))


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def reshard(x: Array, axes: tuple[str | None, ...], back: tuple[str | None, ...]) -> Array:
    """Constrain a value to `axes` and its gradient to `back`.

    `constrain` alone would give the gradient the sharding of the value. For a gathered weight, every device would then
    sum the whole gradient and keep only its own part.
    """
    return constrain(x, *axes)


reshard.defvjp(
    lambda x, axes, back: (constrain(x, *axes), None), lambda axes, back, _, gradient: (constrain(gradient, *back),)
)


def gather_for_matmul(x: Array, axis: str, size: int) -> Array:
    """Prepare x [B T D], sharded along T, for a matmul with weights that are sharded along their `axis` of `size`.

    T is all-gathered over the devices that hold those shards. If `size` does not divide evenly, the weights are
    replicated, so `x` stays as it is and each device multiplies its own part of T.
    """
    shards = num_shards(axis)
    if shards == 1 or size % shards:
        return x
    return reshard(x, ("batch", "length", None), ("batch", "sequence", None))


def fold_length(x: Array) -> Array:
    """Reshape [B T ...] to [B*n T/n ...], whose first axis is "row_parts".

    Each device's part of a row, one of n, becomes a separate row, so that a loop over the length runs on all devices.
    """
    mesh = jax.sharding.get_abstract_mesh()
    split = spec(("batch", "sequence"), x.shape[:2], mesh)[1] if not mesh.empty else None
    if split is None:
        return x
    n = math.prod(mesh.shape[name] for name in ((split,) if isinstance(split, str) else split))
    x = x.reshape(x.shape[0], n, x.shape[1] // n, *x.shape[2:])
    return constrain(x.reshape(-1, *x.shape[2:]), "row_parts", *(None,) * (x.ndim - 2))


def unfold_length(x: Array, rows: int) -> Array:
    """Undo `fold_length` for an array that had `rows` rows before it."""
    if len(x) == rows:
        return x
    return constrain(x.reshape(rows, -1, *x.shape[2:]), "batch", "sequence", *(None,) * (x.ndim - 2))
