"""How the heads of training attention are dealt out to devices.

Outside attention a row's length is split; inside, each device has whole rows of some heads, over the model and the context axis together.
So every kernel runs unchanged, and the causal half of the work is the same for all. Where the devices are no divisor of the KV heads, each
KV head is repeated and its query heads are shared out among the copies, with heads of zeros where they do not come out even.
"""

import math
from typing import NamedTuple

import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Float

from dms_jax.axes import Array
from dms_jax.sharding import constrain, num_shards


class HeadSplit(NamedTuple):
    """The copies of each KV head, and how many query heads each copy has."""

    copies: int
    group: int


def head_split(q_heads: int, kv_heads: int, devices: int) -> HeadSplit:
    """The least copies that `devices` share evenly."""
    copies = devices // math.gcd(kv_heads, devices)
    return HeadSplit(copies, -(-(q_heads // kv_heads) // copies))


def uneven_heads(q_heads: int, kv_heads: int, mesh: Mesh) -> list[str]:
    """What training attention computes more than once on this mesh, as a sentence; none where it is nothing."""
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


def deal_out(
    q: Float[Array, "B T N H"], k: Float[Array, "B T K H"], v: Float[Array, "B T K H"], log_keep: Float[Array, "B K T"]
) -> tuple[Array, Array, Array, Array]:
    """The same attention with as many KV heads as the devices under `jax.set_mesh` share evenly, each device's own on it. Gradients
    add up over the copies by themselves."""
    b, t, n, h = q.shape
    heads = k.shape[2]
    copies, group = head_split(n, heads, num_shards("heads"))
    if copies > 1:
        q = q.reshape(b, t, heads, n // heads, h)
        q = jnp.pad(q, [(0, 0)] * 3 + [(0, copies * group - n // heads), (0, 0)]).reshape(b, t, -1, h)
        k, v, log_keep = _copied(k, 2, copies), _copied(v, 2, copies), _copied(log_keep, 1, copies)
    q, k, v = (constrain(x, "batch", None, "heads", None) for x in (q, k, v))
    return q, k, v, constrain(log_keep, "batch", "heads", None)


def collect(out: Float[Array, "B T M H"], q_heads: int, kv_heads: int) -> Float[Array, "B T N H"]:
    """What `deal_out` did to the query heads, undone, and the length split again."""
    b, t, n, h = out.shape
    if n != q_heads:
        out = out.reshape(b, t, kv_heads, n // kv_heads, h)[:, :, :, : q_heads // kv_heads].reshape(b, t, q_heads, h)
    return constrain(out, "batch", "sequence", "q_heads", None)


def _copied(x: Array, axis: int, copies: int) -> Array:
    """[... K ...] -> [... K*copies ...], copies next to each other."""
    shape = list(x.shape)
    x = jnp.broadcast_to(jnp.expand_dims(x, axis + 1), [*shape[: axis + 1], copies, *shape[axis + 1 :]])
    shape[axis] *= copies
    return x.reshape(shape)
