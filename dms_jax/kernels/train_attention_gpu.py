"""Attention with the DMS gate on Hopper GPUs, value and gradient: the kernels for `core.chunked_attention`.

This file contains the forward pass. A CTA owns a block of queries of one query head, half of it in each of two
warpgroups, and loops over the blocks of keys, which a third warpgroup copies (FlashAttention-3, arXiv:2407.08608). The
gate is a row that is added to the scores of blocks outside the window, and only blocks on the diagonal need a mask. The
kernel is bound by the tensor cores, and its memory is O(T).
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Float, Int

from dms_jax.axes import Array, typed
from dms_jax.core.chunked_attention import name_residuals, softmax_delta
from dms_jax.core.visibility import MASKED
from dms_jax.kernels.block_sizes import TrainBlocks
from dms_jax.kernels.key_blocks_gpu import (
    KeySections,
    QueryPlan,
    Tile,
    copy_key_blocks,
    exponent,
    gated_scores,
    live_blocks,
    raw_gate,
)
from dms_jax.kernels.mosaic_gpu import COLUMN, COMPUTE, ROWS, Ops, bind, interpreter
from dms_jax.kernels.train_attention_gpu_dkv import dkv_blocks, gradients_of_keys
from dms_jax.kernels.train_attention_gpu_dq import gradient_of_queries


class Refs(NamedTuple):
    """Inputs and results in global memory; names that end in _s are shared memory, and the rest are barriers."""

    q: Any  # [B K G T H]
    k: Any  # [B K T H]
    v: Any  # [B K T H]
    keep: Any  # [B K T]
    live: Any  # [B K blocks]
    before: Any  # [B K blocks]
    segments: Any  # [B T], or None
    out: Any  # [B K G T H]
    logsumexp: Any  # [B K G T], in base 2
    q_s: Any
    k_s: Any
    v_s: Any
    keep_s: Any
    logsumexp_s: Any
    q_ready: Any
    k_ready: Any
    v_ready: Any
    k_free: Any
    v_free: Any
    turn: Any
    q_seg_s: Any  # None without segments
    k_seg_s: Any


def _forward(
    q, k, v, log_keep, segments, window_size: int, blocks: TrainBlocks, interpret: bool
) -> tuple[Array, Array]:
    """Return the output [B K G T H], and the log-sum-exp of each row in base 2 [B K G T]."""
    b, heads, group, length, h = q.shape
    has_segments = segments is not None
    plan = QueryPlan(Ops(interpret), blocks, window_size, length, h, q.dtype, has_segments)
    run = plgpu.kernel(
        bind(train_attention_forward, plan, Refs, () if has_segments else ("segments", "q_seg_s", "k_seg_s")),
        out_type=[jax.ShapeDtypeStruct(q.shape, q.dtype), jax.ShapeDtypeStruct(q.shape[:-1], jnp.float32)],
        scratch_types=_scratch(plan),
        # The last axis varies fastest, so the heads of a group share keys in L2.
        grid=(b, heads, length // blocks.q, group),
        grid_names=("batch", "head", "block", "group"),
        num_threads=COMPUTE + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpreter() if interpret else None,
    )
    optional = [segments] if has_segments else []
    return tuple(run(q, k, v, raw_gate(log_keep, h), *live_blocks(log_keep, blocks.k), *optional))


def _scratch(plan: QueryPlan) -> dict[str, Any]:
    rows, block, steps = plan.rows, plan.blocks.k, plan.blocks.steps
    operand = lambda *shape: plan.ops.matrix((*shape, plan.head_dim), plan.dtype)
    scratch: dict[str, Any] = {
        "q_s": operand(COMPUTE, rows),
        "k_s": operand(steps, block),
        "v_s": operand(steps, block),
        "keep_s": plgpu.SMEM((steps, block), jnp.float32),
        "logsumexp_s": plgpu.SMEM((COMPUTE, rows), jnp.float32),
        "q_ready": plgpu.Barrier(num_arrivals=1 + plan.has_segments, num_barriers=COMPUTE),
        "k_ready": plgpu.Barrier(num_arrivals=2 + plan.has_segments, num_barriers=steps),
        "v_ready": plgpu.Barrier(num_barriers=steps),
        "k_free": plgpu.Barrier(num_arrivals=COMPUTE, num_barriers=steps),
        "turn": plgpu.Barrier(num_arrivals=COMPUTE),
        "v_free": plgpu.Barrier(num_arrivals=COMPUTE, num_barriers=steps),
    }
    return scratch | plan.segment_scratch()


def train_attention_forward(plan: QueryPlan, refs: Refs) -> None:
    """The kernel: what each warpgroup does."""
    batch, head, g, wg = (lax.axis_index(name) for name in ("batch", "head", "group", "warpgroup"))
    first, sections = plan.first_and_sections()
    num_live = refs.before[batch, head, sections.outside]
    pl.when(wg < COMPUTE)(lambda: _compute(plan, refs, (batch, head, g), wg, first, sections, num_live))
    pl.when(wg == COMPUTE)(lambda: _copy(plan, refs, (batch, head), sections, num_live))


def _compute(plan: QueryPlan, refs: Refs, at: tuple, wg, first, sections: KeySections, num_live) -> None:
    """A compute warpgroup: the online softmax of its queries."""
    plgpu.set_max_registers(240, action="increase")
    ops, rows, h, factor = plan.ops, plan.rows, plan.head_dim, exponent(plan.head_dim)
    own, block = first + wg * rows, plan.blocks.k
    q_w = refs.q_s.at[wg]
    plgpu.copy_gmem_to_smem(refs.q.at[(*at, pl.ds(own, rows))], q_w, refs.q_ready.at[wg])
    if plan.has_segments:
        source = refs.segments.at[at[0], pl.ds(own, rows)]
        plgpu.copy_gmem_to_smem(source, refs.q_seg_s.at[wg], refs.q_ready.at[wg])
    plgpu.barrier_wait(refs.q_ready.at[wg])
    q_segments = ops.load(refs.q_seg_s.at[wg], COLUMN) if plan.has_segments else None

    def change_turns():
        plgpu.barrier_arrive(refs.turn)
        plgpu.barrier_wait(refs.turn)

    def step(n, carry, gate, causal):
        row_max, row_sum, acc = carry
        slot = lax.rem(n, jnp.int32(plan.blocks.steps))
        plgpu.barrier_wait(refs.k_ready.at[slot])
        s = ops.dot(q_w, refs.k_s.at[slot], (rows, block), transpose_b=True, meanwhile=change_turns)
        tile = Tile(own, sections.block_of(n) * block, (rows, block), plan.window_size, q_segments)
        k_segments = refs.k_seg_s.at[slot] if plan.has_segments else None
        s = gated_scores(ops, s, tile, refs.keep_s.at[slot], k_segments, gate, causal)
        plgpu.barrier_arrive(refs.k_free.at[slot])
        new_max = jnp.maximum(row_max, s.max(axis=1) * factor)
        p = jnp.exp2(s * factor - lax.broadcast_in_dim(new_max, s.shape, [0]))
        rescale = jnp.exp2(row_max - new_max)
        row_sum = row_sum * rescale + p.sum(axis=1)
        acc = acc * lax.broadcast_in_dim(rescale, acc.shape, [0])
        new_max, row_sum, acc, p = lax.optimization_barrier((new_max, row_sum, acc, p.astype(plan.dtype)))
        plgpu.barrier_arrive(refs.turn)
        plgpu.barrier_wait(refs.v_ready.at[slot])
        plgpu.barrier_wait(refs.turn)
        acc = ops.add_dot(acc, p, refs.v_s.at[slot])
        plgpu.barrier_arrive(refs.v_free.at[slot])
        return new_max, row_sum, acc

    # The second warpgroup is half a step behind, so that one computes exponentials while the other multiplies matrices.
    pl.when(wg == 1)(change_turns)
    # The initial maximum is higher than any masked score, so the sums of a row that has met only masked scores stay 0.
    # (If the maximum were MASKED itself, the fused multiply-add would pass the rounding error of the product, about
    # 1e21, to the exponential.)
    start = (
        ops.full((rows,), MASKED * factor / 2, COLUMN),
        ops.full((rows,), 0.0, COLUMN),
        ops.full((rows, h), 0.0, ROWS),
    )
    row_max, row_sum, acc = sections.fold(step, num_live, block, plan.blocks.q, plan.window_size, start)
    pl.when(wg == 0)(change_turns)
    q_w[...] = (acc / lax.broadcast_in_dim(row_sum, acc.shape, [0])).astype(plan.dtype)
    refs.logsumexp_s.at[wg][...] = row_max + jnp.log2(row_sum)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(q_w, refs.out.at[(*at, pl.ds(own, rows))])
    plgpu.copy_smem_to_gmem(refs.logsumexp_s.at[wg], refs.logsumexp.at[(*at, pl.ds(own, rows))])
    plgpu.wait_smem_to_gmem(0)


def _copy(plan: QueryPlan, refs: Refs, at: tuple, sections: KeySections, num_live) -> None:
    """The copying warpgroup: keys and gate, and values, block after block."""
    plgpu.set_max_registers(24, action="decrease")
    block = plan.blocks.k
    rows_of = lambda ref, j: ref.at[(*at, pl.ds(j * block, block))]

    def with_keys(j, slot):
        plgpu.copy_gmem_to_smem(rows_of(refs.k, j), refs.k_s.at[slot], refs.k_ready.at[slot])
        plgpu.copy_gmem_to_smem(rows_of(refs.keep, j), refs.keep_s.at[slot], refs.k_ready.at[slot])
        if plan.has_segments:
            source = refs.segments.at[at[0], pl.ds(j * block, block)]
            plgpu.copy_gmem_to_smem(source, refs.k_seg_s.at[slot], refs.k_ready.at[slot])

    def with_values(j, slot):
        plgpu.copy_gmem_to_smem(rows_of(refs.v, j), refs.v_s.at[slot], refs.v_ready.at[slot])

    parts = [(refs.k_free, with_keys), (refs.v_free, with_values)]
    copy_key_blocks(sections, num_live, refs.live.at[at], plan.blocks.steps, parts)


@typed
def attend(
    q: Float[Array, "B K G T H"],
    k: Float[Array, "B K T H"],
    v: Float[Array, "B K T H"],
    log_keep: Float[Array, "B K T"],
    segments: Int[Array, "B T"] | None,
    *,
    window_size: int,
    blocks: TrainBlocks,
    interpret: bool = False,
) -> Float[Array, "B K G T H"]:
    """Compute attention in the layout of `core.chunked_attention.with_heads_folded`.

    It is differentiable in q, k, v and log_keep. T must be a multiple of both block sizes.
    """
    length = q.shape[3]
    assert length % blocks.q == 0 and length % blocks.k == 0, (length, blocks)
    assert interpret or (
        blocks.q % 128 == 0 and blocks.k % 64 == 0 and q.shape[-1] % 64 == 0 and q.dtype == jnp.bfloat16
    ), (blocks, q)
    # Position differences are at most T - 1, so a window of T equals any longer one, and sums with it stay within
    # int32.
    return _attend(q, k, v, log_keep, segments, min(window_size, length), blocks, interpret)


@partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7))
def _attend(q, k, v, log_keep, segments, window_size, blocks, interpret):
    return _forward(q, k, v, log_keep, segments, window_size, blocks, interpret)[0]


def _attend_fwd(q, k, v, log_keep, segments, window_size, blocks, interpret):
    out, logsumexp = name_residuals(*_forward(q, k, v, log_keep, segments, window_size, blocks, interpret))
    return out, (q, k, v, log_keep, segments, out, logsumexp)


def _attend_bwd(window_size, blocks, interpret, saved, d_out):
    q, k, v, log_keep, segments, out, logsumexp = saved
    delta = softmax_delta(d_out, out)
    args = q, k, v, log_keep, segments, logsumexp, delta, d_out, window_size
    dk, dv, dkeep = gradients_of_keys(*args, dkv_blocks(blocks), interpret)
    return gradient_of_queries(*args, blocks, interpret), dk, dv, dkeep, None


_attend.defvjp(_attend_fwd, _attend_bwd)
