"""Attention with the DMS gate in O(T) memory, value and gradient: the portable training path and the oracle of the kernels.

score[q, k] = q.k / sqrt(H) + log_keep[k] outside the window, causal, within a segment.

Both passes walk over blocks of queries and keys with an online softmax and skip blocks of the future; no array has two
axes of length T. The G query heads of a key/value head are folded into the rows of one matrix product, so keys are
neither repeated nor contracted head by head. The backward pass recomputes the scores (FlashAttention, arXiv:2205.14135)
and reduces the gradient of the gate inside the block.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Float, Int

from dms_jax.axes import Array, typed
from dms_jax.core.visibility import MASKED, is_outside_window
from dms_jax.sharding import target_device

BLOCK = {"cpu": 128}  # by platform: scores of a block stay in a CPU core's cache; accelerators want larger products
DEFAULT_BLOCK = 512


def block_size(length: int) -> int:
    """Queries, and keys, of a block of rows of `length`."""
    return min(BLOCK.get(target_device()[0], DEFAULT_BLOCK), length)


@typed
def gated_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    log_keep: Float[Array, "B K T"],
    *,
    window_size: int,
    segment_ids: Int[Array, "B T"] | None = None,
    block: int | None = None,
) -> Float[Array, "B T N H"]:
    """Causal grouped-query attention under eviction gates; equals `reference_attention`.

    `log_keep` is log(1 - evict probability) of each pair (0 keeps, MASKED evicts), fp32; gradients reach q, k, v and it.
    """
    block = block or block_size(q.shape[1])
    return with_heads_folded(
        partial(attend_in_blocks, window_size=window_size, block=block), block, q, k, v, log_keep, segment_ids
    )


def with_heads_folded(
    attend: Callable[..., Array],
    multiple: int,
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    log_keep: Float[Array, "B K T"],
    segment_ids: Int[Array, "B T"] | None,
) -> Float[Array, "B T N H"]:
    """The border between the model's layout and that of `attend(q, k, v, log_keep, segments)`, which takes q [B K G T H],
    k and v [B K T H], log_keep [B K T] fp32 and segments [B T] or None, T a `multiple`, and returns [B K G T H]."""
    b, t, n, h = q.shape
    kv_heads, pad = k.shape[2], -t % multiple
    # Padding lies in the future of every real query, so causality alone hides it.
    rows = lambda x, axis: jnp.pad(x, [(0, pad if i == axis else 0) for i in range(x.ndim)])
    out = attend(
        rows(q.reshape(b, t, kv_heads, n // kv_heads, h).transpose(0, 2, 3, 1, 4), 3),
        rows(k.transpose(0, 2, 1, 3), 2),
        rows(v.transpose(0, 2, 1, 3), 2),
        rows(log_keep.astype(jnp.float32), 2),
        None if segment_ids is None else rows(segment_ids, 1),
    )
    return out[:, :, :, :t].transpose(0, 3, 1, 2, 4).reshape(b, t, n, h)


def _block(x: Array, index: Array, size: int, axis: int) -> Array:
    return lax.dynamic_slice_in_dim(x, index * size, size, axis)


def _block_scores(q, k, log_keep, segments, i, j, window_size, block):
    """Scores [B K G bq bk] of query block i against key block j, and where the gate acted [bq bk]."""
    b, heads, group, _, h = q.shape
    s = jnp.einsum("bkrh,bksh->bkrs", q.reshape(b, heads, group * block, h), k, preferred_element_type=jnp.float32)
    s = s.reshape(b, heads, group, block, block) * h**-0.5
    q_pos = i * block + lax.broadcasted_iota(jnp.int32, (block, block), 0)
    k_pos = j * block + lax.broadcasted_iota(jnp.int32, (block, block), 1)
    gated = is_outside_window(q_pos, k_pos, window_size)
    s = s + jnp.where(gated, log_keep[:, :, None, None, :], 0.0)
    allowed = k_pos <= q_pos
    if segments is not None:
        same = _block(segments, i, block, 1)[:, :, None] == _block(segments, j, block, 1)[:, None, :]
        allowed = allowed & same[:, None, None]
    return jnp.where(allowed, s, MASKED), gated


def _rows_times(p, v):
    """[B K G bq bk] x [B K bk H] -> [B K G bq H], fp32."""
    b, heads, group, block, keys = p.shape
    out = jnp.einsum(
        "bkrs,bksh->bkrh",
        p.reshape(b, heads, group * block, keys).astype(v.dtype),
        v,
        preferred_element_type=jnp.float32,
    )
    return out.reshape(b, heads, group, block, -1)


def _columns_times(p, x):
    """[B K G bq bk] x [B K G bq H] -> [B K bk H], fp32: summed over the rows of all query heads of the group."""
    b, heads, group, block, keys = p.shape
    rows = p.reshape(b, heads, group * block, keys).astype(x.dtype), x.reshape(b, heads, group * block, -1)
    return jnp.einsum("bkrs,bkrh->bksh", *rows, preferred_element_type=jnp.float32)


def _forward(q, k, v, log_keep, segments, window_size, block):
    b, heads, group, t, h = q.shape

    def query_block(i):
        q_i = _block(q, i, block, 3)

        def key_block(j, carry):
            high, total, acc = carry
            k_j, v_j, keep_j = _block(k, j, block, 2), _block(v, j, block, 2), _block(log_keep, j, block, 2)
            s, _ = _block_scores(q_i, k_j, keep_j, segments, i, j, window_size, block)
            new_high = jnp.maximum(high, s.max(-1))
            p = jnp.exp(s - new_high[..., None])
            shrink = jnp.exp(high - new_high)
            return new_high, total * shrink + p.sum(-1), acc * shrink[..., None] + _rows_times(p, v_j)

        # Own block first, and earlier ones after it: `high` is then a real score before any block that is all MASKED
        # (an earlier segment) is met, whose weights are therefore exactly 0.
        high = jnp.full((b, heads, group, block), MASKED, jnp.float32)
        start = high, jnp.zeros_like(high), jnp.zeros((b, heads, group, block, h), jnp.float32)
        high, total, acc = lax.fori_loop(0, i + 1, lambda step, carry: key_block(i - step, carry), start)
        return (acc / total[..., None]).astype(q.dtype), high + jnp.log(total)

    out, log_total = lax.map(query_block, jnp.arange(t // block))
    return jnp.moveaxis(out, 0, 3).reshape(q.shape), jnp.moveaxis(log_total, 0, 3).reshape(b, heads, group, t)


@partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def attend_in_blocks(q, k, v, log_keep, segments, window_size, block):
    """See `with_heads_folded`."""
    return _forward(q, k, v, log_keep, segments, window_size, block)[0]


def named(out: Array, log_total: Array) -> tuple[Array, Array]:
    """Output and log-sum-exp under a name by which a rematerialisation policy can keep them: with both at hand the backward pass need
    not run the forward pass again."""
    return checkpoint_name(out, "attention"), checkpoint_name(log_total, "attention")


def row_products(d_out: Array, out: Array) -> Array:
    """What each row's gradient of the scores is relative to, fp32."""
    return jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), -1)


def _attend_fwd(q, k, v, log_keep, segments, window_size, block):
    out, log_total = named(*_forward(q, k, v, log_keep, segments, window_size, block))
    return out, (q, k, v, log_keep, segments, out, log_total)


def _attend_bwd(window_size, block, saved, d_out):
    q, k, v, log_keep, segments, out, log_total = saved
    num_blocks = q.shape[3] // block
    delta = row_products(d_out, out)
    scale = q.shape[-1] ** -0.5

    def key_block(dq, j):
        k_j, v_j, keep_j = _block(k, j, block, 2), _block(v, j, block, 2), _block(log_keep, j, block, 2)

        def query_block(i, carry):
            dq, dk, dv, dkeep = carry
            q_i, d_i = _block(q, i, block, 3), _block(d_out, i, block, 3)
            s, gated = _block_scores(q_i, k_j, keep_j, segments, i, j, window_size, block)
            p = jnp.exp(s - _block(log_total, i, block, 3)[..., None])
            ds = p * (_rows_times(d_i, v_j.swapaxes(2, 3)) - _block(delta, i, block, 3)[..., None])
            dkeep = dkeep + jnp.where(gated, ds, 0.0).sum((2, 3))
            ds = ds.astype(q.dtype)
            dq_i = _block(dq, i, block, 3) + _rows_times(ds, k_j) * scale
            dk = dk + _columns_times(ds, q_i) * scale
            dv = dv + _columns_times(p, d_i)
            return lax.dynamic_update_slice_in_dim(dq, dq_i, i * block, 3), dk, dv, dkeep

        zero = jnp.zeros(k_j.shape, jnp.float32)
        dq, dk, dv, dkeep = lax.fori_loop(
            j, num_blocks, query_block, (dq, zero, zero, jnp.zeros(keep_j.shape, jnp.float32))
        )
        return dq, (dk, dv, dkeep)

    dq, grads = lax.scan(key_block, jnp.zeros(q.shape, jnp.float32), jnp.arange(num_blocks))
    dk, dv, dkeep = (
        jnp.moveaxis(g, 0, 2).reshape(x.shape).astype(x.dtype) for g, x in zip(grads, (k, v, log_keep), strict=True)
    )
    return dq.astype(q.dtype), dk, dv, dkeep, None


attend_in_blocks.defvjp(_attend_fwd, _attend_bwd)
