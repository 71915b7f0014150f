"""Attention of a chunk of queries over the slots of a compact cache and over the chunk itself, in blocks of keys.

`extend_layer` serves prefill and decode (a chunk of one token). The cost follows the highest slot in use, not the
capacity: the loop over blocks of slots ends there, except in a decode step on a GPU, which reads all slots. As in
`chunked_attention`, the softmax is computed online, and the query heads of a group are folded into the rows of one
matrix product.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Bool, Float, Int

from dms_jax.axes import Array, typed
from dms_jax.core.budget_eviction import keep_budgets
from dms_jax.core.chunked_attention import block_size
from dms_jax.core.compact_cache import Expiries, LayerCache, append, apply_pending, empty_layer
from dms_jax.core.visibility import MASKED, is_visible
from dms_jax.platform_defaults import platform_defaults


class SoftmaxPart(NamedTuple):
    """Unnormalized softmax over a part of the pairs, fp32.

    For scores s, `row_max` = max s, `row_sum` = sum exp(s - row_max), `acc` = sum exp(s - row_max) v. A part in which
    a query sees no pair has a `row_max` of MASKED and zeros.
    """

    row_max: Float[Array, "*A R"]
    row_sum: Float[Array, "*A R"]
    acc: Float[Array, "*A R H"]

    def normalized(self) -> Float[Array, "*A R H"]:
        """Return the attention output; 0 for a query that sees no pair."""
        return self.acc / jnp.maximum(self.row_sum, 1e-30)[..., None]


def empty_part(rows: tuple[int, ...], head_dim: int) -> SoftmaxPart:
    """Make the part of no pairs, for queries of shape `rows`."""
    zero = jnp.zeros(rows, jnp.float32)
    return SoftmaxPart(jnp.full(rows, MASKED, jnp.float32), zero, jnp.zeros((*rows, head_dim), jnp.float32))


def merge_parts(parts: SoftmaxPart) -> SoftmaxPart:
    """Merge parts that are stacked along the first axis [P ...]; some of them may be empty."""
    row_max = parts.row_max.max(0)
    weight = jnp.exp(parts.row_max - row_max[None])
    return SoftmaxPart(row_max, (weight * parts.row_sum).sum(0), (weight[..., None] * parts.acc).sum(0))


class Chunk(NamedTuple):
    """Where a chunk of T tokens continues each row: the first `count` tokens are real, the others are padding."""

    position: Int[Array, "B T"]
    count: Int[Array, "B"]
    threshold: float | Float[Array, ""]  # a token evicts iff its logit exceeds it


class CacheOps(NamedTuple):
    """The functions that touch a layer's slots, chosen for one model, policy and cache: plain XLA or kernels."""

    attend: Callable[..., Array]  # arguments of `slot_attention` up to `read`
    write: Callable[..., LayerCache]  # arguments of `compact_cache.write_pairs`
    # A decode step up to attention, in one kernel: (q, k, v, evict logits, layer, chunk, frequency) -> (rotated q,
    # layer).
    fused_step: Callable[..., tuple[Array, LayerCache]] | None = None


def fold_queries(q: Float[Array, "B T N H"], kv_heads: int) -> Float[Array, "B K R H"]:
    """Fold the queries that share a KV head into the rows of one matrix, R = G T, head by head: row g T + t."""
    b, t, n, h = q.shape
    return q.reshape(b, t, kv_heads, n // kv_heads, h).transpose(0, 2, 3, 1, 4).reshape(b, kv_heads, -1, h)


def unfold_queries(rows: Float[Array, "B K R H"], length: int) -> Float[Array, "B T N H"]:
    """Undo `fold_queries` for chunks of `length` tokens."""
    b, heads, _, h = rows.shape
    return rows.reshape(b, heads, -1, length, h).transpose(0, 3, 1, 2, 4).reshape(b, length, -1, h)


def slots_in_use(expiry: Int[Array, "B K C"], position: Int[Array, "B T"]) -> Int[Array, "B K"]:
    """Return 1 + the highest slot that a query at or after the first `position` may see; 0 if no slot is visible."""
    return jnp.max(
        jnp.where(expiry >= position[:, :1, None], jnp.arange(expiry.shape[-1], dtype=jnp.int32) + 1, 0), axis=-1
    )


# The rule for each row and head: [B T] queries, [B K S] pairs -> [B K T S].
_is_visible = jax.vmap(jax.vmap(is_visible, (None, 0, 0)), (0, 0, 0))


def extend_layer(
    layer: LayerCache,
    q: Float[Array, "B T N H"],
    k: Float[Array, "B K T H"],
    v: Float[Array, "B K T H"],
    expiries: Expiries,
    chunk: Chunk,
    policy: Any,
    ops: CacheOps,
) -> tuple[Float[Array, "B T N H"], LayerCache]:
    """Attend from a chunk to a layer's slots and to the chunk itself; return the output and the updated layer.

    `expiries` are the decisions of `policy` (a `policies.CachePolicy`) about the chunk's pairs. A policy that
    `reads_subset` is asked which slots to read, and one that `ranks_pairs` which pairs stay.
    """
    position, count = chunk.position, chunk.count
    seen = position[:, 0]
    # 1. The chunk's first token decides about the pair before the chunk.
    with jax.named_scope("apply_pending"):
        layer = apply_pending(layer, expiries, seen, count)
        layer, expiries = keep_budgets(layer, expiries, seen, count, policy.window_size)
    visible_slots = policy.read(q, layer, position) if policy.reads_subset else None
    selection = policy.select(q, k, v, expiries, layer, position, count) if policy.ranks_pairs else None
    if q.shape[1] == 1 and visible_slots is None and selection is None:
        # A single token is written before it attends, so that XLA updates the buffers in place. If attention read them
        # first, XLA would copy all keys and values at every step. Both orders see the same pairs, because a single pair
        # cannot expire before its own query. The one exception is a pair that a full buffer pushes out: in this order,
        # the token no longer sees it.
        with jax.named_scope("append"):
            layer = append(layer, k, v, expiries, seen, count, policy.window_size, write_pairs=ops.write)
        with jax.named_scope("attention"):
            return ops.attend(q, layer, position, None), layer
    # 2. Queries attend to the slots and to the chunk's own pairs, which have no slots yet.
    with jax.named_scope("attention"):
        out = ops.attend(q, layer, position, (k, v, expiries.expiry), read=visible_slots)
    # 3. The pairs of the chunk that are still live move into free slots.
    with jax.named_scope("append"):
        return out, append(layer, k, v, expiries, seen, count, policy.window_size, selection, ops.write)


@typed
def slot_attention(
    q: Float[Array, "B T N H"],
    slots: LayerCache,
    position: Int[Array, "B T"],
    chunk: tuple[Float[Array, "B K T H"], Float[Array, "B K T H"], Int[Array, "B K T"]] | None,
    block: int | None = None,
    read: Bool[Array, "B K T C"] | None = None,
) -> Float[Array, "B T N H"]:
    """Return softmax(q k / sqrt(H)) v over the slots and chunk pairs that each query sees.

    Args:
      position: absolute positions of the queries and of the chunk's pairs.
      chunk: keys, values and expiries of the pairs that are not in a slot yet; None if all pairs are in slots.
      block: keys per block; the default depends on the platform.
      read: slots that each query reads; the others stay in the cache unread. None reads all.

    The contents of a dead slot have no effect, even if they are NaN. A query that sees no pair gets 0.
    """
    t, defaults = q.shape[1], platform_defaults()
    if block is None:
        block = slots.capacity if t == 1 and defaults.loop_free_decode else defaults.slot_block
    parts = []
    if chunk is not None:
        k, v, expiry = chunk
        k_pos = jnp.broadcast_to(position[:, None], expiry.shape)
        parts.append(blocks_of(k, v, k_pos, expiry, t, block))
    used = jnp.max(slots_in_use(slots.expiry, position))
    parts.append(blocks_of(slots.k, slots.v, slots.position, slots.expiry, used, block, read))
    return attend_blocks(q, position, slots.k.shape[1], parts)


class KeyBlocks(NamedTuple):
    """Pairs of every row and head, which are loaded block by block."""

    length: int  # of all pairs
    size: int  # pairs of a block
    used: int | Int[Array, ""]  # pairs from this one on are not loaded
    # From the index of a block's first pair: its keys and values [B K size H], its positions and expiries [B K size],
    # and which of its pairs each query reads [B K T size], or None for all.
    load: Callable[[Any], Any]


def blocks_of(keys, values, k_pos, k_expiry, used, block, read=None) -> KeyBlocks:
    """Divide arrays [B K S ...] into blocks."""
    size = min(block, keys.shape[2])

    def load(start):
        part = lambda x, axis=2: lax.dynamic_slice_in_dim(x, start, size, axis)
        return *map(part, (keys, values, k_pos, k_expiry)), None if read is None else part(read, 3)

    return KeyBlocks(keys.shape[2], size, used, load)


def attend_blocks(
    q: Float[Array, "B T N H"], position: Int[Array, "B T"], kv_heads: int, parts: Sequence[KeyBlocks]
) -> Float[Array, "B T N H"]:
    """Do the work of `slot_attention` over the pairs of all `parts`."""
    part = attend_rows(fold_queries(q, kv_heads), position, parts)
    return unfold_queries(part.normalized().astype(q.dtype), q.shape[1])


def attend_rows(rows: Float[Array, "B K R H"], position: Int[Array, "B T"], parts: Sequence[KeyBlocks]) -> SoftmaxPart:
    """Return the softmax of folded queries over the pairs of all `parts`."""
    t, h = position.shape[1], rows.shape[3]
    group = rows.shape[2] // t

    def attend(carry: SoftmaxPart, keys, values, visible) -> SoftmaxPart:
        row_max, row_sum, acc = carry
        keys, values = keys.astype(rows.dtype), values.astype(rows.dtype)  # a cache may hold fewer bits
        s = jnp.einsum("bkrh,bksh->bkrs", rows, keys, preferred_element_type=jnp.float32) * h**-0.5
        visible_rows = jnp.repeat(visible[:, :, None], group, axis=2).reshape(s.shape)
        s = jnp.where(visible_rows, s, MASKED)
        new_max = jnp.maximum(row_max, s.max(-1))
        p = jnp.where(visible_rows, jnp.exp(s - new_max[..., None]), 0.0)
        values = jnp.where(visible.any(2)[..., None], values, 0)  # 0 * NaN is NaN
        rescale = jnp.exp(row_max - new_max)
        out = jnp.einsum("bkrs,bksh->bkrh", p.astype(values.dtype), values, preferred_element_type=jnp.float32)
        return SoftmaxPart(new_max, row_sum * rescale + p.sum(-1), acc * rescale[..., None] + out)

    def over_blocks(carry: SoftmaxPart, part: KeyBlocks) -> SoftmaxPart:
        def attend_block(index, carry):
            start = jnp.minimum(index * part.size, part.length - part.size)  # the last block overlaps the one before it
            keys, values, k_pos, k_expiry, read = part.load(start)
            fresh = start + jnp.arange(part.size)[None, None, None] >= index * part.size
            visible = _is_visible(position, k_pos, k_expiry) & fresh
            return attend(carry, keys, values, visible if read is None else visible & read)

        if part.size == part.length:
            return attend_block(0, carry)
        return lax.fori_loop(0, (part.used + part.size - 1) // part.size, attend_block, carry)

    carry = empty_part(rows.shape[:3], h)
    for part in parts:
        carry = over_blocks(carry, part)
    return carry


@typed
def expiring_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    expiry: Int[Array, "B K T"],
) -> Float[Array, "B T N H"]:
    """Compute causal attention of whole rows in which pair k is visible to the queries up to `expiry[k]`.

    The row serves as the slots of a cache that blocks of queries read one after the other, so no array has two axes of
    length T.
    """
    (b, t, _, _), size = q.shape, block_size(q.shape[1])
    position = jnp.broadcast_to(jnp.arange(t + -t % size, dtype=jnp.int32), (b, t + -t % size))
    row = empty_layer(b, k.shape[2], t, q.shape[3], k.dtype)
    slots = jnp.broadcast_to(position[:, None, :t], expiry.shape)
    row = replace(row, k=k.swapaxes(1, 2), v=v.swapaxes(1, 2), position=slots, expiry=expiry)
    blocks = lambda x: x.reshape(b, -1, size, *x.shape[2:]).swapaxes(0, 1)
    queries = jnp.pad(q, ((0, 0), (0, -t % size), (0, 0), (0, 0)))
    out = lax.map(lambda part: slot_attention(part[0], row, part[1], None), (blocks(queries), blocks(position)))
    return out.swapaxes(0, 1).reshape(b, -1, *q.shape[2:])[:, :t]


@typed
def attention_weights(
    q: Float[Array, "B T N H"],
    q_position: Int[Array, "B T"],
    k: Float[Array, "B K S H"],
    k_position: Int[Array, "B K S"],
    expiry: Int[Array, "B K S"],
) -> Float[Array, "B K G T S"]:
    """Return the fp32 attention weights of each of the G query heads that share a KV head.

    Policies that rank by attention use them. Memory grows as [B N T S], so pass only the queries that the policy needs.
    A query that sees no pair gets zeros.
    """
    b, t, n, h = q.shape
    rows = q.reshape(b, t, k.shape[1], -1, h).transpose(0, 2, 3, 1, 4)
    visible = _is_visible(q_position, k_position, expiry)[:, :, None]
    s = jnp.where(
        visible, jnp.einsum("bkgth,bksh->bkgts", rows, k, preferred_element_type=jnp.float32) * h**-0.5, MASKED
    )
    p = jnp.where(visible, jnp.exp(s - s.max(-1, keepdims=True)), 0.0)
    return p / jnp.maximum(p.sum(-1, keepdims=True), 1e-30)
