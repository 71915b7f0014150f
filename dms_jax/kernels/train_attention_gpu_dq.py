"""The gradient of the queries in attention with the DMS gate on Hopper GPUs.

The kernel loops over blocks of keys as the forward pass does, and recomputes the scores from the saved log-sum-exp of
each row.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from dms_jax.axes import Array
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


class Refs(NamedTuple):
    """Inputs and result in global memory; names that end in _s are shared memory, and the rest are barriers."""

    q: Any  # [B K G T H]
    k: Any  # [B K T H]
    v: Any  # [B K T H]
    keep: Any  # [B K T]
    live: Any  # [B K blocks]
    before: Any  # [B K blocks]
    logsumexp: Any  # [B K G T], in base 2
    delta: Any  # [B K G T]
    d_out: Any  # [B K G T H]
    segments: Any  # [B T], or None
    dq: Any  # [B K G T H]
    q_s: Any
    do_s: Any
    k_s: Any
    v_s: Any
    keep_s: Any
    logsumexp_s: Any
    delta_s: Any
    q_ready: Any
    ready: Any
    free: Any
    q_seg_s: Any  # None without segments
    k_seg_s: Any


def gradient_of_queries(
    q, k, v, log_keep, segments, logsumexp, delta, d_out, window_size: int, blocks: TrainBlocks, interpret: bool
) -> Array:
    """Return the gradient of the queries [B K G T H].

    `logsumexp` comes from the forward pass, and `delta` is rowsum(dO * O); both are [B K G T].
    """
    b, heads, group, length, h = q.shape
    has_segments = segments is not None
    plan = QueryPlan(Ops(interpret), blocks, window_size, length, h, q.dtype, has_segments)
    run = plgpu.kernel(
        bind(train_attention_dq, plan, Refs, () if has_segments else ("segments", "q_seg_s", "k_seg_s")),
        out_type=jax.ShapeDtypeStruct(q.shape, q.dtype),
        scratch_types=_scratch(plan),
        grid=(b, heads, length // blocks.q, group),
        grid_names=("batch", "head", "block", "group"),
        num_threads=COMPUTE + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpreter() if interpret else None,
    )
    optional = [segments] if has_segments else []
    return run(q, k, v, raw_gate(log_keep, h), *live_blocks(log_keep, blocks.k), logsumexp, delta, d_out, *optional)


def _scratch(plan: QueryPlan) -> dict[str, Any]:
    rows, block, steps = plan.rows, plan.blocks.k, plan.blocks.steps
    operand = lambda *shape: plan.ops.matrix((*shape, plan.head_dim), plan.dtype)
    scratch: dict[str, Any] = {
        "q_s": operand(COMPUTE, rows),
        "do_s": operand(COMPUTE, rows),
        "k_s": operand(steps, block),
        "v_s": operand(steps, block),
        "keep_s": plgpu.SMEM((steps, block), jnp.float32),
        "logsumexp_s": plgpu.SMEM((COMPUTE, rows), jnp.float32),
        "delta_s": plgpu.SMEM((COMPUTE, rows), jnp.float32),
        "q_ready": plgpu.Barrier(num_arrivals=4 + plan.has_segments, num_barriers=COMPUTE),
        "ready": plgpu.Barrier(num_arrivals=3 + plan.has_segments, num_barriers=steps),
        "free": plgpu.Barrier(num_arrivals=COMPUTE, num_barriers=steps),
    }
    return scratch | plan.segment_scratch()


def train_attention_dq(plan: QueryPlan, refs: Refs) -> None:
    """The kernel: what each warpgroup does."""
    batch, head, g, wg = (lax.axis_index(name) for name in ("batch", "head", "group", "warpgroup"))
    first, sections = plan.first_and_sections()
    num_live = refs.before[batch, head, sections.outside]
    pl.when(wg < COMPUTE)(lambda: _compute(plan, refs, (batch, head, g), wg, first, sections, num_live))
    pl.when(wg == COMPUTE)(lambda: _copy(plan, refs, (batch, head), sections, num_live))


def _compute(plan: QueryPlan, refs: Refs, at: tuple, wg, first, sections: KeySections, num_live) -> None:
    """A compute warpgroup: accumulate the gradient of its queries in registers."""
    plgpu.set_max_registers(240, action="increase")
    ops, rows, block = plan.ops, plan.rows, plan.blocks.k
    own = first + wg * rows
    mine = (*at, pl.ds(own, rows))
    arrays = (refs.q, refs.q_s), (refs.d_out, refs.do_s), (refs.logsumexp, refs.logsumexp_s), (refs.delta, refs.delta_s)
    for ref, buffer in arrays:
        plgpu.copy_gmem_to_smem(ref.at[mine], buffer.at[wg], refs.q_ready.at[wg])
    if plan.has_segments:
        source = refs.segments.at[at[0], pl.ds(own, rows)]
        plgpu.copy_gmem_to_smem(source, refs.q_seg_s.at[wg], refs.q_ready.at[wg])
    plgpu.barrier_wait(refs.q_ready.at[wg])
    logsumexp, delta = ops.load(refs.logsumexp_s.at[wg], COLUMN), ops.load(refs.delta_s.at[wg], COLUMN)
    q_segments = ops.load(refs.q_seg_s.at[wg], COLUMN) if plan.has_segments else None
    over_keys = lambda x: lax.broadcast_in_dim(x, (rows, block), [0])

    def step(n, dq, gate, causal):
        slot = lax.rem(n, jnp.int32(plan.blocks.steps))
        plgpu.barrier_wait(refs.ready.at[slot])
        products = [
            (refs.q_s.at[wg], refs.k_s.at[slot], False, True),
            (refs.do_s.at[wg], refs.v_s.at[slot], False, True),
        ]
        s, dp = ops.dots(products, (rows, block))
        tile = Tile(own, sections.block_of(n) * block, (rows, block), plan.window_size, q_segments)
        k_segments = refs.k_seg_s.at[slot] if plan.has_segments else None
        s = gated_scores(ops, s, tile, refs.keep_s.at[slot], k_segments, gate, causal)
        ds = jnp.exp2(s * exponent(plan.head_dim) - over_keys(logsumexp)) * (dp - over_keys(delta))
        dq = ops.add_dot(dq, ds.astype(plan.dtype), refs.k_s.at[slot])
        plgpu.barrier_arrive(refs.free.at[slot])
        return dq

    start = ops.full((rows, plan.head_dim), 0.0, ROWS)
    dq = sections.fold(step, num_live, block, plan.blocks.q, plan.window_size, start)
    refs.q_s.at[wg][...] = (dq * plan.head_dim**-0.5).astype(plan.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(refs.q_s.at[wg], refs.dq.at[mine])
    plgpu.wait_smem_to_gmem(0)


def _copy(plan: QueryPlan, refs: Refs, at: tuple, sections: KeySections, num_live) -> None:
    """The copying warpgroup: keys, values and gate, block after block."""
    plgpu.set_max_registers(24, action="decrease")
    block = plan.blocks.k

    def with_keys_and_values(j, slot):
        for ref, buffer in ((refs.k, refs.k_s), (refs.v, refs.v_s), (refs.keep, refs.keep_s)):
            plgpu.copy_gmem_to_smem(ref.at[(*at, pl.ds(j * block, block))], buffer.at[slot], refs.ready.at[slot])
        if plan.has_segments:
            source = refs.segments.at[at[0], pl.ds(j * block, block)]
            plgpu.copy_gmem_to_smem(source, refs.k_seg_s.at[slot], refs.ready.at[slot])

    parts = [(refs.free, with_keys_and_values)]
    copy_key_blocks(sections, num_live, refs.live.at[at], plan.blocks.steps, parts)
