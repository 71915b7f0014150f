"""Attention with the DMS gate in O(T) memory: the portable training path, and the oracle of the training kernels.

score[q, k] = q.k / sqrt(H), causal and within a segment; outside the window, log_keep[k] is added.

Both passes loop over blocks of queries and keys with an online softmax and skip blocks of the future, so no array has
two axes of length T. The G query heads of a KV head are folded into the rows of one matrix product, so keys are
neither repeated nor contracted head by head. The backward pass recomputes the scores (FlashAttention,
arXiv:2205.14135) and reduces the gradient of the gate inside each block.
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
from dms_jax.platform_defaults import platform_defaults


def block_size(length: int) -> int:
    """Return the number of queries, and of keys, in a block of rows of `length` tokens."""
    return min(platform_defaults().attention_block, length)


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
    """Compute causal grouped-query attention under eviction gates; equals `reference_attention`.

    `log_keep` is log(1 - evict probability) of each pair (0 keeps, MASKED evicts), fp32. Gradients reach q, k, v and
    `log_keep`. `block` is the number of queries and of keys in a block; the default depends on the platform.
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
    """Call `attend(q, k, v, log_keep, segments)` in the kernel layout and return the result in the model's layout.

    `attend` takes q [B K G T H], k and v [B K T H], log_keep [B K T] in fp32 and segments [B T] or None, with T padded
    to a multiple of `multiple`, and returns [B K G T H].
    """
    b, t, n, h = q.shape
    kv_heads, pad = k.shape[2], -t % multiple
    # Padding lies in the future of every real query, so the causal mask hides it.
    padded = lambda x, axis: jnp.pad(x, [(0, pad if i == axis else 0) for i in range(x.ndim)])
    out = attend(
        padded(q.reshape(b, t, kv_heads, n // kv_heads, h).transpose(0, 2, 3, 1, 4), 3),
        padded(k.transpose(0, 2, 1, 3), 2),
        padded(v.transpose(0, 2, 1, 3), 2),
        padded(log_keep.astype(jnp.float32), 2),
        None if segment_ids is None else padded(segment_ids, 1),
    )
    return out[:, :, :, :t].transpose(0, 3, 1, 2, 4).reshape(b, t, n, h)


def _block(x: Array, index: Array, size: int, axis: int) -> Array:
    return lax.dynamic_slice_in_dim(x, index * size, size, axis)


def _block_scores(q, k, log_keep, segments, i, j, window_size, block):
    """Return the scores [B K G bq bk] of query block i against key block j, and where the gate acts [bq bk].

    q [B K G bq H], k [B K bk H] and log_keep [B K bk] are blocks; segments [B T] covers whole rows.
    """
    b, heads, group, _, h = q.shape
    s = jnp.einsum("bkrh,bksh->bkrs", q.reshape(b, heads, group * block, h), k, preferred_element_type=jnp.float32)
    s = s.reshape(b, heads, group, block, block) * h**-0.5
    q_pos = i * block + lax.broadcasted_iota(i.dtype, (block, block), 0)
    k_pos = j * block + lax.broadcasted_iota(j.dtype, (block, block), 1)
    gated = is_outside_window(q_pos, k_pos, window_size)
    s = s + jnp.where(gated[None, None, None], log_keep[:, :, None, None, :], 0.0)
    allowed = (k_pos <= q_pos)[None, None, None]
    if segments is not None:
        same = _block(segments, i, block, 1)[:, :, None] == _block(segments, j, block, 1)[:, None, :]
        allowed = allowed & same[:, None, None]
    return jnp.where(allowed, s, MASKED), gated


def _rows_times(p, v):
    """Multiply weights by values: [B K G bq bk] x [B K bk H] -> [B K G bq H], fp32."""
    b, heads, group, block, keys = p.shape
    out = jnp.einsum(
        "bkrs,bksh->bkrh",
        p.reshape(b, heads, group * block, keys).astype(v.dtype),
        v,
        preferred_element_type=jnp.float32,
    )
    return out.reshape(b, heads, group, block, -1)


def _columns_times(p, x):
    """Multiply transposed weights by rows and sum over G: [B K G bq bk] x [B K G bq H] -> [B K bk H], fp32."""
    b, heads, group, block, keys = p.shape
    rows = p.reshape(b, heads, group * block, keys).astype(x.dtype), x.reshape(b, heads, group * block, -1)
    return jnp.einsum("bkrs,bkrh->bksh", *rows, preferred_element_type=jnp.float32)


def _forward(q, k, v, log_keep, segments, window_size, block):
    """Return the output [B K G T H] and each row's log-sum-exp [B K G T]; arguments as in `with_heads_folded`."""
    b, heads, group, t, h = q.shape

    def query_block(i):
        q_i = _block(q, i, block, 3)

        def key_block(j, carry):
            row_max, row_sum, acc = carry
            k_j, v_j, keep_j = _block(k, j, block, 2), _block(v, j, block, 2), _block(log_keep, j, block, 2)
            s, _ = _block_scores(q_i, k_j, keep_j, segments, i, j, window_size, block)
            new_max = jnp.maximum(row_max, s.max(-1))
            p = jnp.exp(s - new_max[..., None])
            rescale = jnp.exp(row_max - new_max)
            return new_max, row_sum * rescale + p.sum(-1), acc * rescale[..., None] + _rows_times(p, v_j)

        # A block's own keys come first, then earlier blocks. `row_max` is thus a real score before any block of an
        # earlier segment, which is all MASKED, and the weights of that block are exactly 0.
        row_max = jnp.full((b, heads, group, block), MASKED, jnp.float32)
        start = row_max, jnp.zeros_like(row_max), jnp.zeros((b, heads, group, block, h), jnp.float32)
        row_max, row_sum, acc = lax.fori_loop(0, i + 1, lambda step, carry: key_block(i - step, carry), start)
        return (acc / row_sum[..., None]).astype(q.dtype), row_max + jnp.log(row_sum)

    out, logsumexp = lax.map(query_block, jnp.arange(t // block))
    return jnp.moveaxis(out, 0, 3).reshape(q.shape), jnp.moveaxis(logsumexp, 0, 3).reshape(b, heads, group, t)


@partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def attend_in_blocks(q, k, v, log_keep, segments, window_size, block):
    """Compute `gated_attention` in the layout of `with_heads_folded`, T a multiple of `block`."""
    return _forward(q, k, v, log_keep, segments, window_size, block)[0]


def name_residuals(out: Array, logsumexp: Array) -> tuple[Array, Array]:
    """Name output and log-sum-exp, so that a rematerialization policy can save both and not repeat the forward pass."""
    return checkpoint_name(out, "attention"), checkpoint_name(logsumexp, "attention")


def softmax_delta(d_out: Array, out: Array) -> Array:
    """Return delta = rowsum(dO * O), fp32, the softmax-backward correction of FlashAttention (arXiv:2205.14135)."""
    return jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), -1)


def _attend_fwd(q, k, v, log_keep, segments, window_size, block):
    out, logsumexp = name_residuals(*_forward(q, k, v, log_keep, segments, window_size, block))
    return out, (q, k, v, log_keep, segments, out, logsumexp)


def _attend_bwd(window_size, block, saved, d_out):
    q, k, v, log_keep, segments, out, logsumexp = saved
    num_blocks = q.shape[3] // block
    delta = softmax_delta(d_out, out)
    scale = q.shape[-1] ** -0.5

    def key_block(dq, j):
        k_j, v_j, keep_j = _block(k, j, block, 2), _block(v, j, block, 2), _block(log_keep, j, block, 2)

        def query_block(i, carry):
            dq, dk, dv, dkeep = carry
            q_i, d_i = _block(q, i, block, 3), _block(d_out, i, block, 3)
            s, gated = _block_scores(q_i, k_j, keep_j, segments, i, j, window_size, block)
            p = jnp.exp(s - _block(logsumexp, i, block, 3)[..., None])
            ds = p * (_rows_times(d_i, v_j.swapaxes(2, 3)) - _block(delta, i, block, 3)[..., None])
            dkeep = dkeep + jnp.where(gated, ds, 0.0).sum((2, 3))
            ds = ds.astype(q.dtype)
            dq_i = _block(dq, i, block, 3) + _rows_times(ds, k_j) * scale
            dk = dk + _columns_times(ds, q_i) * scale
            dv = dv + _columns_times(p, d_i)
            return lax.dynamic_update_slice_in_dim(dq, dq_i, i * block, 3), dk, dv, dkeep

        zero = jnp.zeros(k_j.shape, jnp.float32)
        start = dq, zero, zero, jnp.zeros(keep_j.shape, jnp.float32)
        dq, dk, dv, dkeep = lax.fori_loop(j, num_blocks, query_block, start)
        return dq, (dk, dv, dkeep)

    dq, grads = lax.scan(key_block, jnp.zeros(q.shape, jnp.float32), jnp.arange(num_blocks))
    dk, dv, dkeep = (
        jnp.moveaxis(g, 0, 2).reshape(x.shape).astype(x.dtype) for g, x in zip(grads, (k, v, log_keep), strict=True)
    )
    return dq.astype(q.dtype), dk, dv, dkeep, None


attend_in_blocks.defvjp(_attend_fwd, _attend_bwd)
