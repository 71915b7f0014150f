"""Attention with the DMS gate on Hopper GPUs, value and gradient: the kernels for `core.chunked_attention`.

This file holds the forward pass. A CTA owns a block of queries of one query head, half of it in each of two warpgroups, and loops over the
blocks of keys, which a third warpgroup copies (FlashAttention-3, arXiv:2407.08608). The gate is a row that is added to the scores of
blocks outside the window, and a mask is made only for blocks on the diagonal. It is bound by the tensor cores, and its memory is O(T).
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Float, Int

from dms_jax.axes import Array, typed
from dms_jax.core.chunked_attention import named, row_products
from dms_jax.core.visibility import MASKED
from dms_jax.kernels.block_sizes import TrainBlocks
from dms_jax.kernels.key_blocks_gpu import (
    COMPUTE,
    KeySections,
    Tile,
    copy_key_blocks,
    exponent,
    gated_scores,
    live_blocks,
    raw_gate,
)
from dms_jax.kernels.mosaic_gpu import COLUMN, ROWS, Ops, interpreter
from dms_jax.kernels.train_attention_gpu_backward import dkv_blocks, gradient_of_queries, gradients_of_keys


def _forward(
    q, k, v, log_keep, segments, window_size: int, blocks: TrainBlocks, interpret: bool
) -> tuple[Array, Array]:
    """The output [B K G T H], and the log-sum-exp of each row in base 2 [B K G T]."""
    b, heads, group, length, h = q.shape
    rows, block, steps = blocks.q // COMPUTE, blocks.k, blocks.steps
    ops, dtype, factor = Ops(interpret), q.dtype, exponent(h)
    has_segments = segments is not None

    def train_attention_forward(
        *refs,
        q_s,
        k_s,
        v_s,
        keep_s,
        total_s,
        q_ready,
        k_ready,
        v_ready,
        k_free,
        v_free,
        turn,
        q_seg_s: Any = None,
        k_seg_s: Any = None,
    ):
        q_ref, k_ref, v_ref, keep_ref, live_ref, before_ref, *maybe_segments, out_ref, total_ref = refs
        segments_ref: Any = maybe_segments[0] if has_segments else None
        batch, head, g, wg = (lax.axis_index(name) for name in ("batch", "head", "group", "warpgroup"))
        first = (length // blocks.q - 1 - lax.axis_index("block")) * blocks.q  # the longest rows start first
        sections = KeySections.of_queries(first, blocks.q, block, window_size)
        num_live = before_ref[batch, head, sections.outside]

        @pl.when(wg < COMPUTE)
        def compute():
            plgpu.set_max_registers(240, action="increase")
            own = first + wg * rows
            q_w = q_s.at[wg]
            plgpu.copy_gmem_to_smem(q_ref.at[batch, head, g, pl.ds(own, rows)], q_w, q_ready.at[wg])
            if has_segments:
                plgpu.copy_gmem_to_smem(segments_ref.at[batch, pl.ds(own, rows)], q_seg_s.at[wg], q_ready.at[wg])
            plgpu.barrier_wait(q_ready.at[wg])
            q_segments = ops.load(q_seg_s.at[wg], COLUMN) if has_segments else None

            def change_turns():
                plgpu.barrier_arrive(turn)
                plgpu.barrier_wait(turn)

            def step(n, carry, gate, causal):
                high, total, acc = carry
                slot = lax.rem(n, jnp.int32(steps))
                plgpu.barrier_wait(k_ready.at[slot])
                s = ops.dot(q_w, k_s.at[slot], (rows, block), transpose_b=True, meanwhile=change_turns)
                tile = Tile(own, sections.block_of(n) * block, (rows, block), window_size, q_segments)
                s = gated_scores(
                    ops, s, tile, keep_s.at[slot], k_seg_s.at[slot] if has_segments else None, gate, causal
                )
                plgpu.barrier_arrive(k_free.at[slot])
                new_high = jnp.maximum(high, s.max(axis=1) * factor)
                p = jnp.exp2(s * factor - lax.broadcast_in_dim(new_high, s.shape, [0]))
                rescale = jnp.exp2(high - new_high)
                total = total * rescale + p.sum(axis=1)
                acc = acc * lax.broadcast_in_dim(rescale, acc.shape, [0])
                new_high, total, acc, p = lax.optimization_barrier((new_high, total, acc, p.astype(dtype)))
                plgpu.barrier_arrive(turn)
                plgpu.barrier_wait(v_ready.at[slot])
                plgpu.barrier_wait(turn)
                acc = ops.add_dot(acc, p, v_s.at[slot])
                plgpu.barrier_arrive(v_free.at[slot])
                return new_high, total, acc

            # The second warpgroup is half a step behind, so that one computes exponentials while the other multiplies matrices.
            pl.when(wg == 1)(change_turns)
            # The first maximum is higher than any masked score, so a row that has met only masked scores holds zeros. (If the maximum
            # were MASKED itself, the fused multiply-add would pass the rounding error of the product, about 1e21, to the exponential.)
            start = (
                ops.full((rows,), MASKED * factor / 2, COLUMN),
                ops.full((rows,), 0.0, COLUMN),
                ops.full((rows, h), 0.0, ROWS),
            )
            high, total, acc = sections.fold(step, num_live, block, blocks.q, window_size, start)
            pl.when(wg == 0)(change_turns)
            q_w[...] = (acc / lax.broadcast_in_dim(total, acc.shape, [0])).astype(dtype)
            total_s.at[wg][...] = high + jnp.log2(total)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(q_w, out_ref.at[batch, head, g, pl.ds(own, rows)])
            plgpu.copy_smem_to_gmem(total_s.at[wg], total_ref.at[batch, head, g, pl.ds(own, rows)])
            plgpu.wait_smem_to_gmem(0)

        @pl.when(wg == COMPUTE)
        def copy():
            plgpu.set_max_registers(24, action="decrease")
            rows_of = lambda ref, j: ref.at[batch, head, pl.ds(j * block, block)]

            def with_keys(j, slot):
                plgpu.copy_gmem_to_smem(rows_of(k_ref, j), k_s.at[slot], k_ready.at[slot])
                plgpu.copy_gmem_to_smem(rows_of(keep_ref, j), keep_s.at[slot], k_ready.at[slot])
                if has_segments:
                    plgpu.copy_gmem_to_smem(
                        segments_ref.at[batch, pl.ds(j * block, block)], k_seg_s.at[slot], k_ready.at[slot]
                    )

            with_values = lambda j, slot: plgpu.copy_gmem_to_smem(rows_of(v_ref, j), v_s.at[slot], v_ready.at[slot])
            copy_key_blocks(
                sections, num_live, live_ref.at[batch, head], steps, [(k_free, with_keys), (v_free, with_values)]
            )

    operand = lambda *shape: ops.matrix((*shape, h), dtype)
    scratch: dict[str, Any] = {
        "q_s": operand(COMPUTE, rows),
        "k_s": operand(steps, block),
        "v_s": operand(steps, block),
        "keep_s": plgpu.SMEM((steps, block), jnp.float32),
        "total_s": plgpu.SMEM((COMPUTE, rows), jnp.float32),
        "q_ready": plgpu.Barrier(num_arrivals=1 + has_segments, num_barriers=COMPUTE),
        "k_ready": plgpu.Barrier(num_arrivals=2 + has_segments, num_barriers=steps),
        "v_ready": plgpu.Barrier(num_barriers=steps),
        "k_free": plgpu.Barrier(num_arrivals=COMPUTE, num_barriers=steps),
        "turn": plgpu.Barrier(num_arrivals=COMPUTE),
        "v_free": plgpu.Barrier(num_arrivals=COMPUTE, num_barriers=steps),
    }
    if has_segments:
        scratch |= {"q_seg_s": plgpu.SMEM((COMPUTE, rows), jnp.int32), "k_seg_s": plgpu.SMEM((steps, block), jnp.int32)}
    run = plgpu.kernel(
        train_attention_forward,
        out_type=[jax.ShapeDtypeStruct(q.shape, dtype), jax.ShapeDtypeStruct(q.shape[:-1], jnp.float32)],
        scratch_types=scratch,
        grid=(
            b,
            heads,
            length // blocks.q,
            group,
        ),  # the last axis varies fastest, so the heads of a group share keys in L2
        grid_names=("batch", "head", "block", "group"),
        num_threads=COMPUTE + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpreter() if interpret else None,
    )
    return tuple(
        run(q, k, v, raw_gate(log_keep, h), *live_blocks(log_keep, block), *([segments] if has_segments else []))
    )


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
    """See `core.chunked_attention.with_heads_folded`; differentiable in q, k, v and log_keep. T must be a multiple of both block sizes."""
    length = q.shape[3]
    assert length % blocks.q == 0 and length % blocks.k == 0, (length, blocks)
    assert interpret or (
        blocks.q % 128 == 0 and blocks.k % 64 == 0 and q.shape[-1] % 64 == 0 and q.dtype == jnp.bfloat16
    ), (blocks, q)
    # Position differences are at most T - 1, so a window of T is as good as a longer one, and sums with it stay within int32.
    return _attend(q, k, v, log_keep, segments, min(window_size, length), blocks, interpret)


@partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7))
def _attend(q, k, v, log_keep, segments, window_size, blocks, interpret):
    return _forward(q, k, v, log_keep, segments, window_size, blocks, interpret)[0]


def _attend_fwd(q, k, v, log_keep, segments, window_size, blocks, interpret):
    out, log_total = named(*_forward(q, k, v, log_keep, segments, window_size, blocks, interpret))
    return out, (q, k, v, log_keep, segments, out, log_total)


def _attend_bwd(window_size, blocks, interpret, saved, d_out):
    q, k, v, log_keep, segments, out, log_total = saved
    delta = row_products(d_out, out)
    args = q, k, v, log_keep, segments, log_total, delta, d_out, window_size
    dk, dv, dkeep = gradients_of_keys(*args, dkv_blocks(blocks), interpret)
    return gradient_of_queries(*args, blocks, interpret), dk, dv, dkeep, None


_attend.defvjp(_attend_fwd, _attend_bwd)
