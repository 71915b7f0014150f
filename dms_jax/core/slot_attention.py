"""Attention of a chunk of queries over the slots of a compact cache and over the chunk itself, in blocks of keys.

One function serves prefill and decode (a chunk of one). Cost follows the highest slot in use, not the capacity: the loop
over blocks of slots ends there (but for a decode step on a GPU, which reads all slots). The online softmax and the folding of
the query heads of a group into the rows of one matrix product are those of `chunked_attention`.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Bool, Float, Int

from dms_jax.axes import Array, typed
from dms_jax.core.compact_cache import Expiries, LayerCache, Selection, append, apply_pending, write_pairs
from dms_jax.core.visibility import MASKED, is_visible
from dms_jax.sharding import target_device

BLOCK = {"cpu": 256}  # keys per block, by platform: a block of keys and values stays in a CPU core's cache
DEFAULT_BLOCK = 1024


class Partial(NamedTuple):
    """Softmax over a part of the pairs, not yet divided: of scores s, `high` = max s, `total` = sum exp(s - high) and `acc` = sum
    exp(s - high) v, all fp32. A part in which a query sees nothing has high MASKED and zeros."""

    high: Float[Array, "*A R"]
    total: Float[Array, "*A R"]
    acc: Float[Array, "*A R H"]

    def divided(self) -> Float[Array, "*A R H"]:
        """The attention output; 0 for a query that saw nothing."""
        return self.acc / jnp.maximum(self.total, 1e-30)[..., None]


def nothing_seen(rows: tuple[int, ...], head_dim: int) -> Partial:
    zero = jnp.zeros(rows, jnp.float32)
    return Partial(jnp.full(rows, MASKED, jnp.float32), zero, jnp.zeros((*rows, head_dim), jnp.float32))


def merge(parts: Partial) -> Partial:
    """Parts along the first axis [P ...], empty ones among them, as one."""
    high = parts.high.max(0)
    weight = jnp.exp(parts.high - high)
    return Partial(high, (weight * parts.total).sum(0), (weight[..., None] * parts.acc).sum(0))


def fold_queries(q: Float[Array, "B T N H"], kv_heads: int) -> Float[Array, "B K R H"]:
    """The queries of a key/value head as rows of one matrix, R = G T, head by head: row g T + t."""
    b, t, n, h = q.shape
    return q.reshape(b, t, kv_heads, n // kv_heads, h).transpose(0, 2, 3, 1, 4).reshape(b, kv_heads, -1, h)


def unfold_queries(rows: Float[Array, "B K R H"], length: int) -> Float[Array, "B T N H"]:
    b, heads, _, h = rows.shape
    return rows.reshape(b, heads, -1, length, h).transpose(0, 3, 1, 2, 4).reshape(b, length, -1, h)


def slots_in_use(slots: LayerCache, position: Int[Array, "B T"]) -> Int[Array, "B K"]:
    """The highest slot that a query at or after the first of `position` may see, plus one."""
    return jnp.max(
        jnp.where(slots.expiry >= position[:, :1, None], jnp.arange(slots.capacity, dtype=jnp.int32) + 1, 0), axis=-1
    )


# [B T] queries, [B K S] pairs -> [B K T S]: the rule, row by row and head by head.
_is_visible = jax.vmap(jax.vmap(is_visible, (None, 0, 0)), (0, 0, 0))


def extend_layer(
    layer: LayerCache,
    q: Float[Array, "B T N H"],
    k: Float[Array, "B K T H"],
    v: Float[Array, "B K T H"],
    expiries: Expiries,
    position: Int[Array, "B T"],
    count: Int[Array, "B"],
    window_size: int,
    read: Callable[[LayerCache], Array | None] = lambda settled: None,
    choose: Callable[[LayerCache], Selection | None] = lambda settled: None,
    attend: Callable[..., Array] | None = None,
    write_pairs: Callable[..., LayerCache] = write_pairs,
) -> tuple[Float[Array, "B T N H"], LayerCache]:
    """One layer's step: apply_pending what was pending, attend, append. Of a chunk, the first `count` tokens of each row are real.

    `read` and `choose` ask a policy, once the pending decision is settled: which slots are read now, and who stays afterwards.
    `attend` and `write_pairs` stand for `slot_attention` and `compact_cache.write_pairs`, which are what they are by default.
    """
    attend = attend or slot_attention
    seen = position[:, 0]
    layer = apply_pending(layer, expiries, seen, count)
    visible_slots, selection = read(layer), choose(layer)
    if q.shape[1] == 1 and visible_slots is None and selection is None:
        # Written first, the buffers are read where they lie; read first, XLA copies keys and values whole, at each step. A
        # single pair cannot expire before its own query, so both orders are the same, but for a pair that is forced out.
        layer = append(layer, k, v, expiries, seen, count, window_size, write_pairs=write_pairs)
        return attend(q, layer, position, None), layer
    out = attend(q, layer, position, (k, v, expiries.expiry), read=visible_slots)
    return out, append(layer, k, v, expiries, seen, count, window_size, selection, write_pairs)


@typed
def slot_attention(
    q: Float[Array, "B T N H"],
    slots: LayerCache,
    position: Int[Array, "B T"],
    chunk: tuple[Float[Array, "B K T H"], Float[Array, "B K T H"], Int[Array, "B K T"]] | None,
    block: int | None = None,
    read: Bool[Array, "B K T C"] | None = None,
) -> Float[Array, "B T N H"]:
    """softmax(q k / sqrt(H)) v over the pairs that each query sees: slots and chunk, `position <= query <= expiry`.

    `position` are the absolute positions of the queries and of the chunk's pairs; `chunk` holds keys, values and expiry of the
    pairs that are not in a slot yet. `read` hides slots that a policy does not want to read now, though they stay. What a dead
    slot holds, NaN included, has no effect. A query that sees nothing gets 0.
    """
    t, h, heads, platform = q.shape[1], q.shape[3], slots.k.shape[1], target_device()[0]
    if block is None:
        # A GPU asks the host whether a loop goes on: a decode step's few scores are computed for all slots at once there.
        block = slots.capacity if t == 1 and platform == "gpu" else BLOCK.get(platform, DEFAULT_BLOCK)
    rows = fold_queries(q, heads)
    group = rows.shape[2] // t

    def attend(carry: Partial, keys, values, visible) -> Partial:
        high, total, acc = carry
        keys, values = keys.astype(q.dtype), values.astype(q.dtype)  # a cache may hold fewer bits
        s = jnp.einsum("bkrh,bksh->bkrs", rows, keys, preferred_element_type=jnp.float32) * h**-0.5
        visible_rows = jnp.repeat(visible[:, :, None], group, axis=2).reshape(s.shape)
        s = jnp.where(visible_rows, s, MASKED)
        new_high = jnp.maximum(high, s.max(-1))
        p = jnp.where(visible_rows, jnp.exp(s - new_high[..., None]), 0.0)
        values = jnp.where(visible.any(2)[..., None], values, 0)  # 0 * NaN is NaN
        shrink = jnp.exp(high - new_high)
        out = jnp.einsum("bkrs,bksh->bkrh", p.astype(values.dtype), values, preferred_element_type=jnp.float32)
        return Partial(new_high, total * shrink + p.sum(-1), acc * shrink[..., None] + out)

    def over_blocks(carry, keys, values, k_pos, k_expiry, used, read=None):
        size = min(block, keys.shape[2])

        def one(index, carry):
            start = jnp.minimum(index * size, keys.shape[2] - size)  # the last block overlaps the one before it
            part = lambda x, axis=2: lax.dynamic_slice_in_dim(x, start, size, axis)
            fresh = start + jnp.arange(size) >= index * size
            visible = _is_visible(position, part(k_pos), part(k_expiry)) & fresh
            return attend(carry, part(keys), part(values), visible if read is None else visible & part(read, 3))

        if size == keys.shape[2]:
            return one(0, carry)
        return lax.fori_loop(0, (used + size - 1) // size, one, carry)

    carry = nothing_seen(rows.shape[:3], h)
    if chunk is not None:
        k, v, expiry = chunk
        k_pos = jnp.broadcast_to(position[:, None], expiry.shape)
        carry = over_blocks(carry, k, v, k_pos, expiry, t)
    used = jnp.max(slots_in_use(slots, position))
    carry = over_blocks(carry, slots.k, slots.v, slots.position, slots.expiry, used, read)
    return unfold_queries(carry.divided().astype(q.dtype), t)


@typed
def attention_weights(
    q: Float[Array, "B T N H"],
    q_position: Int[Array, "B T"],
    k: Float[Array, "B K S H"],
    k_position: Int[Array, "B K S"],
    expiry: Int[Array, "B K S"],
) -> Float[Array, "B K T S"]:
    """The weights themselves, fp32, averaged over the query heads that share a key head; for policies that look at them.

    They take [B N T S] of memory: ask for as few queries as the policy needs. A query that sees nothing gets zeros.
    """
    b, t, n, h = q.shape
    rows = q.reshape(b, t, k.shape[1], -1, h).transpose(0, 2, 3, 1, 4)
    visible = _is_visible(q_position, k_position, expiry)[:, :, None]
    s = jnp.where(
        visible, jnp.einsum("bkgth,bksh->bkgts", rows, k, preferred_element_type=jnp.float32) * h**-0.5, MASKED
    )
    p = jnp.where(visible, jnp.exp(s - s.max(-1, keepdims=True)), 0.0)
    return jnp.mean(p / jnp.maximum(p.sum(-1, keepdims=True), 1e-30), axis=2)
