"""Scatter the heads of training attention over devices.

Outside attention, rows are split along their length. Inside, each device has whole rows of some heads, which are split
over the model and context axes together. Every kernel thus runs unchanged, and causal work is spread evenly. If the
number of devices does not divide the number of KV heads, each KV head is copied, and its query heads are distributed
over the copies, padded with heads of zeros if necessary.
"""

import math
from typing import NamedTuple

import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Float

from dms_jax.axes import Array
from dms_jax.sharding import constrain, num_shards


class HeadSplit(NamedTuple):
    """The number of copies of each KV head, and the number of query heads of each copy."""

    copies: int
    group: int


def head_split(q_heads: int, kv_heads: int, devices: int) -> HeadSplit:
    """Return the split with the smallest number of copies that `devices` can share evenly."""
    copies = devices // math.gcd(kv_heads, devices)
    return HeadSplit(copies, -(-(q_heads // kv_heads) // copies))


def uneven_heads(q_heads: int, kv_heads: int, mesh: Mesh) -> list[str]:
    """Return a sentence about copied heads in training attention on this mesh; an empty list if no head is copied."""
    devices = num_shards("heads", mesh)
    copies, group = head_split(q_heads, kv_heads, devices)
    if copies == 1:
        return []
    computed = copies * group * kv_heads
    more = (
        "no query head is computed twice"
        if computed == q_heads
        else f"{computed} query heads are computed for {q_heads}"
    )
    return [
        f"attention over {devices} devices (model x context) copies each of {kv_heads} KV heads {copies} times; {more}"
    ]


def scatter_heads(
    q: Float[Array, "B T N H"], k: Float[Array, "B T K H"], v: Float[Array, "B T K H"], log_keep: Float[Array, "B K T"]
) -> tuple[Array, Array, Array, Array]:
    """Copy and pad heads until the devices of the mesh can share them evenly, and move each head to its device.

    This does not change the attention, and autodiff sums the gradients of the copies.
    """
    b, t, n, h = q.shape
    heads = k.shape[2]
    copies, group = head_split(n, heads, num_shards("heads"))
    if copies > 1:
        q = q.reshape(b, t, heads, n // heads, h)
        q = jnp.pad(q, [(0, 0)] * 3 + [(0, copies * group - n // heads), (0, 0)]).reshape(b, t, -1, h)
        k, v, log_keep = _copied(k, 2, copies), _copied(v, 2, copies), _copied(log_keep, 1, copies)
    q, k, v = (constrain(x, "batch", None, "heads", None) for x in (q, k, v))
    return q, k, v, constrain(log_keep, "batch", "heads", None)


def gather_heads(out: Float[Array, "B T M H"], q_heads: int, kv_heads: int) -> Float[Array, "B T N H"]:
    """Undo what `scatter_heads` did to the query heads, and split the length again."""
    b, t, n, h = out.shape
    if n != q_heads:
        out = out.reshape(b, t, kv_heads, n // kv_heads, h)[:, :, :, : q_heads // kv_heads].reshape(b, t, q_heads, h)
    return constrain(out, "batch", "sequence", "q_heads", None)


def _copied(x: Array, axis: int, copies: int) -> Array:
    """Repeat an axis, [... K ...] -> [... K*copies ...], with the copies of a head next to each other."""
    shape = list(x.shape)
    x = jnp.broadcast_to(jnp.expand_dims(x, axis + 1), [*shape[: axis + 1], copies, *shape[axis + 1 :]])
    shape[axis] *= copies
    return x.reshape(shape)
