"""The gradient of attention with the DMS gate on Hopper GPUs: one kernel for the queries, one for keys, values and the gate.

Both recompute the scores from the saved log-sum-exp of each row, and neither adds to memory that another CTA writes, so every run gives
the same result. `gradient_of_queries` loops over keys as the forward pass does. In `gradients_of_keys` a CTA owns a block of keys of one
KV head and loops over the queries of all heads of its group. There keys are the rows of the scores, so the gate's gradient is the sum of
a row, which is accumulated in registers and written once.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from dms_jax.axes import Array
from dms_jax.core.visibility import MASKED
from dms_jax.kernels.block_sizes import TrainBlocks
from dms_jax.kernels.key_blocks_gpu import (
    COMPUTE,
    KeySections,
    Tile,
    copy_key_blocks,
    exponent,
    gated_scores,
    is_live,
    live_blocks,
    raw_gate,
)
from dms_jax.kernels.mosaic_gpu import COLUMN, ROW, ROWS, Ops, bind, interpreter


def dkv_blocks(blocks: TrainBlocks) -> TrainBlocks:
    """Block sizes for `gradients_of_keys`. A CTA owns as many keys as a CTA of the forward pass owns queries; steps are short, because two
    gradients fill the registers."""
    return TrainBlocks(q=min(blocks.k, 64), k=blocks.q, steps=blocks.steps)


def gradient_of_queries(
    q, k, v, log_keep, segments, log_total, delta, d_out, window_size: int, blocks: TrainBlocks, interpret: bool
) -> Array:
    """The gradient of the queries [B K G T H]. `log_total` comes from the forward pass, and `delta` is rowsum(dO * O), both [B K G T]."""
    b, heads, group, length, h = q.shape
    rows, block, steps = blocks.q // COMPUTE, blocks.k, blocks.steps
    ops, dtype, factor = Ops(interpret), q.dtype, exponent(h)
    has_segments = segments is not None

    def train_attention_dq(
        *refs,
        q_s,
        do_s,
        k_s,
        v_s,
        keep_s,
        total_s,
        delta_s,
        q_ready,
        ready,
        free,
        q_seg_s: Any = None,
        k_seg_s: Any = None,
    ):
        q_ref, k_ref, v_ref, keep_ref, live_ref, before_ref, total_ref, delta_ref, do_ref, *maybe_segments, dq_ref = (
            refs
        )
        segments_ref: Any = maybe_segments[0] if has_segments else None
        batch, head, g, wg = (lax.axis_index(name) for name in ("batch", "head", "group", "warpgroup"))
        first = (length // blocks.q - 1 - lax.axis_index("block")) * blocks.q  # the longest rows start first
        sections = KeySections.of_queries(first, blocks.q, block, window_size)
        num_live = before_ref[batch, head, sections.outside]

        @pl.when(wg < COMPUTE)
        def compute():
            plgpu.set_max_registers(240, action="increase")
            own = first + wg * rows
            mine = (batch, head, g, pl.ds(own, rows))
            for ref, buffer in ((q_ref, q_s), (do_ref, do_s), (total_ref, total_s), (delta_ref, delta_s)):
                plgpu.copy_gmem_to_smem(ref.at[mine], buffer.at[wg], q_ready.at[wg])
            if has_segments:
                plgpu.copy_gmem_to_smem(segments_ref.at[batch, pl.ds(own, rows)], q_seg_s.at[wg], q_ready.at[wg])
            plgpu.barrier_wait(q_ready.at[wg])
            log_total, delta = ops.load(total_s.at[wg], COLUMN), ops.load(delta_s.at[wg], COLUMN)
            q_segments = ops.load(q_seg_s.at[wg], COLUMN) if has_segments else None
            over_keys = lambda x: lax.broadcast_in_dim(x, (rows, block), [0])

            def step(n, dq, gate, causal):
                slot = lax.rem(n, jnp.int32(steps))
                plgpu.barrier_wait(ready.at[slot])
                products = [(q_s.at[wg], k_s.at[slot], False, True), (do_s.at[wg], v_s.at[slot], False, True)]
                s, dp = ops.dots(products, (rows, block))
                tile = Tile(own, sections.block_of(n) * block, (rows, block), window_size, q_segments)
                s = gated_scores(
                    ops, s, tile, keep_s.at[slot], k_seg_s.at[slot] if has_segments else None, gate, causal
                )
                ds = jnp.exp2(s * factor - over_keys(log_total)) * (dp - over_keys(delta))
                dq = ops.add_dot(dq, ds.astype(dtype), k_s.at[slot])
                plgpu.barrier_arrive(free.at[slot])
                return dq

            dq = sections.fold(step, num_live, block, blocks.q, window_size, ops.full((rows, h), 0.0, ROWS))
            q_s.at[wg][...] = (dq * h**-0.5).astype(dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(q_s.at[wg], dq_ref.at[mine])
            plgpu.wait_smem_to_gmem(0)

        @pl.when(wg == COMPUTE)
        def copy():
            plgpu.set_max_registers(24, action="decrease")

            def with_keys_and_values(j, slot):
                for ref, buffer in ((k_ref, k_s), (v_ref, v_s), (keep_ref, keep_s)):
                    plgpu.copy_gmem_to_smem(
                        ref.at[batch, head, pl.ds(j * block, block)], buffer.at[slot], ready.at[slot]
                    )
                if has_segments:
                    plgpu.copy_gmem_to_smem(
                        segments_ref.at[batch, pl.ds(j * block, block)], k_seg_s.at[slot], ready.at[slot]
                    )

            copy_key_blocks(sections, num_live, live_ref.at[batch, head], steps, [(free, with_keys_and_values)])

    operand = lambda *shape: ops.matrix((*shape, h), dtype)
    scratch: dict[str, Any] = {
        "q_s": operand(COMPUTE, rows),
        "do_s": operand(COMPUTE, rows),
        "k_s": operand(steps, block),
        "v_s": operand(steps, block),
        "keep_s": plgpu.SMEM((steps, block), jnp.float32),
        "total_s": plgpu.SMEM((COMPUTE, rows), jnp.float32),
        "delta_s": plgpu.SMEM((COMPUTE, rows), jnp.float32),
        "q_ready": plgpu.Barrier(num_arrivals=4 + has_segments, num_barriers=COMPUTE),
        "ready": plgpu.Barrier(num_arrivals=3 + has_segments, num_barriers=steps),
        "free": plgpu.Barrier(num_arrivals=COMPUTE, num_barriers=steps),
    }
    if has_segments:
        scratch |= {"q_seg_s": plgpu.SMEM((COMPUTE, rows), jnp.int32), "k_seg_s": plgpu.SMEM((steps, block), jnp.int32)}
    run = plgpu.kernel(
        train_attention_dq,
        out_type=jax.ShapeDtypeStruct(q.shape, dtype),
        scratch_types=scratch,
        grid=(b, heads, length // blocks.q, group),
        grid_names=("batch", "head", "block", "group"),
        num_threads=COMPUTE + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpreter() if interpret else None,
    )
    return run(
        q,
        k,
        v,
        raw_gate(log_keep, h),
        *live_blocks(log_keep, block),
        log_total,
        delta,
        d_out,
        *([segments] if has_segments else []),
    )


class KeysPlan(NamedTuple):
    """Static facts of a call of `gradients_of_keys`."""

    ops: Ops
    blocks: TrainBlocks  # `k` keys per CTA, `q` queries per step
    window_size: int
    length: int
    group: int  # query heads per KV head
    head_dim: int
    dtype: Any
    has_segments: bool

    @property
    def rows(self) -> int:
        """Keys per warpgroup."""
        return self.blocks.k // COMPUTE


class KeysRefs(NamedTuple):
    """Inputs and results in global memory; names that end in _s are shared memory, and the rest are barriers."""

    q: Any  # [B K G T H]
    k: Any  # [B K T H]
    v: Any  # [B K T H]
    keep: Any  # [B K T]
    live: Any  # [B K T/blocks.k]
    log_total: Any  # [B K G T]
    delta: Any  # [B K G T]
    d_out: Any  # [B K G T H]
    segments: Any  # [B T], or None
    dk: Any  # [B K T H]
    dv: Any  # [B K T H]
    dkeep: Any  # [B K T]
    k_s: Any
    v_s: Any
    keep_s: Any
    dkeep_s: Any
    q_s: Any
    do_s: Any
    total_s: Any
    delta_s: Any
    k_ready: Any
    ready: Any
    free: Any
    k_seg_s: Any  # None without segments
    q_seg_s: Any


class QuerySections(NamedTuple):
    """Blocks of queries by what their scores need. [start, past) hold the diagonal, [past, inside) lie within the window of all keys,
    [inside, outside) straddle its edge, and [outside, end) lie beyond it; the last are skipped if all keys are evicted."""

    start: Array
    past: Array
    inside: Array
    outside: Array
    end: Array

    @classmethod
    def of_keys(cls, plan: KeysPlan, first: Array, live: Any, at: tuple) -> "QuerySections":
        """The sections for the keys of a CTA, which begin at `first`; `live[at]` says whether any of them is not evicted."""
        block, window_size = plan.blocks.q, plan.window_size
        blocks = plan.length // block
        count = lambda queries: jnp.minimum(lax.div(queries + block - 1, jnp.int32(block)), blocks)
        start, past = lax.div(first, jnp.int32(block)), count(first + plan.blocks.k - 1)
        outside = jnp.maximum(count(first + plan.blocks.k + window_size), past)
        inside = jnp.minimum(jnp.maximum(lax.div(first + window_size + 1, jnp.int32(block)), past), outside)
        return cls(start, past, inside, outside, jnp.where(live[at] > 0, jnp.int32(blocks), outside))

    def fold(self, step: Any, plan: KeysPlan, carry: Any) -> Any:
        """Run step(i, carry, gate, causal) for all blocks; `gate` is None, "all" or "outside"."""
        near = "outside" if plan.window_size < plan.blocks.k + plan.blocks.q else None
        sections = (
            (self.start, self.past, near, True),
            (self.past, self.inside, None, False),
            (self.inside, self.outside, "outside", False),
            (self.outside, self.end, "all", False),
        )
        for low, high, gate, causal in sections:
            carry = lax.fori_loop(low, high, lambda i, carry, how=(gate, causal): step(i, carry, *how), carry)
        return carry


def gradients_of_keys(
    q, k, v, log_keep, segments, log_total, delta, d_out, window_size: int, blocks: TrainBlocks, interpret: bool
) -> tuple[Array, Array, Array]:
    """The gradients of keys and values [B K T H] and of the gate [B K T]. A CTA owns `blocks.k` keys; a step takes `blocks.q` queries."""
    b, heads, group, length, h = q.shape
    has_segments = segments is not None
    plan = KeysPlan(Ops(interpret), blocks, window_size, length, group, h, q.dtype, has_segments)
    run = plgpu.kernel(
        bind(train_attention_dkv, plan, KeysRefs, () if has_segments else ("segments", "k_seg_s", "q_seg_s")),
        out_type=[
            jax.ShapeDtypeStruct(k.shape, q.dtype),
            jax.ShapeDtypeStruct(v.shape, q.dtype),
            jax.ShapeDtypeStruct(log_keep.shape, jnp.float32),
        ],
        scratch_types=_scratch(plan),
        grid=(b, heads, length // blocks.k),
        grid_names=("batch", "head", "block"),
        num_threads=COMPUTE + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpreter() if interpret else None,
    )
    live = is_live(log_keep, blocks.k).astype(jnp.int32)
    optional = [segments] if has_segments else []
    return tuple(run(q, k, v, raw_gate(log_keep, h), live, log_total, delta, d_out, *optional))


def _scratch(plan: KeysPlan) -> dict[str, Any]:
    rows, block, steps = plan.rows, plan.blocks.q, plan.blocks.steps
    operand = lambda *shape: plan.ops.matrix((*shape, plan.head_dim), plan.dtype)
    row = lambda *shape: plgpu.SMEM(shape, jnp.float32)
    scratch: dict[str, Any] = {
        "k_s": operand(COMPUTE, rows),
        "v_s": operand(COMPUTE, rows),
        "keep_s": row(COMPUTE, rows),
        "dkeep_s": row(COMPUTE, rows),
        "q_s": operand(steps, block),
        "do_s": operand(steps, block),
        "total_s": row(steps, block),
        "delta_s": row(steps, block),
        "k_ready": plgpu.Barrier(num_arrivals=3 + plan.has_segments, num_barriers=COMPUTE),
        "ready": plgpu.Barrier(num_arrivals=4 + plan.has_segments, num_barriers=steps),
        "free": plgpu.Barrier(num_arrivals=COMPUTE, num_barriers=steps),
    }
    if plan.has_segments:
        scratch["k_seg_s"] = plgpu.SMEM((COMPUTE, rows), jnp.int32)
        scratch["q_seg_s"] = plgpu.SMEM((steps, block), jnp.int32)
    return scratch


def train_attention_dkv(plan: KeysPlan, refs: KeysRefs) -> None:
    """The kernel: what each warpgroup does."""
    batch, head, owned, wg = (lax.axis_index(name) for name in ("batch", "head", "block", "warpgroup"))
    first = owned * plan.blocks.k
    sections = QuerySections.of_keys(plan, first, refs.live, (batch, head, owned))
    pl.when(wg < COMPUTE)(lambda: _compute_keys(plan, refs, (batch, head), first, sections, wg))
    pl.when(wg == COMPUTE)(lambda: _copy_queries(plan, refs, (batch, head), sections))


def _compute_keys(plan: KeysPlan, refs: KeysRefs, at: tuple, first, sections: QuerySections, wg) -> None:
    """A compute warpgroup: accumulate the gradients of its keys in registers."""
    plgpu.set_max_registers(240, action="increase")
    ops, rows = plan.ops, plan.rows
    own = first + wg * rows
    mine = (*at, pl.ds(own, rows))
    for ref, buffer in ((refs.k, refs.k_s), (refs.v, refs.v_s), (refs.keep, refs.keep_s)):
        plgpu.copy_gmem_to_smem(ref.at[mine], buffer.at[wg], refs.k_ready.at[wg])
    if plan.has_segments:
        source = refs.segments.at[at[0], pl.ds(own, rows)]
        plgpu.copy_gmem_to_smem(source, refs.k_seg_s.at[wg], refs.k_ready.at[wg])
    plgpu.barrier_wait(refs.k_ready.at[wg])
    keep = ops.load(refs.keep_s.at[wg], COLUMN)
    k_segments = ops.load(refs.k_seg_s.at[wg], COLUMN) if plan.has_segments else None

    def head_of_group(g, carry):
        def step(i, carry, gate, causal):
            slot = lax.rem(g * (sections.end - sections.start) + (i - sections.start), jnp.int32(plan.blocks.steps))
            return _meet_queries(plan, refs, wg, slot, own, i, keep, k_segments, carry, gate, causal)

        return sections.fold(step, plan, carry)

    shape = (rows, plan.head_dim)
    zeros = ops.full(shape, 0.0, ROWS), ops.full(shape, 0.0, ROWS), ops.full((rows,), 0.0, COLUMN)
    dk, dv, dkeep = lax.fori_loop(0, plan.group, head_of_group, zeros)
    refs.k_s.at[wg][...] = (dk * plan.head_dim**-0.5).astype(plan.dtype)
    refs.v_s.at[wg][...] = dv.astype(plan.dtype)
    refs.dkeep_s.at[wg][...] = dkeep
    plgpu.commit_smem()
    for buffer, ref in ((refs.k_s, refs.dk), (refs.v_s, refs.dv), (refs.dkeep_s, refs.dkeep)):
        plgpu.copy_smem_to_gmem(buffer.at[wg], ref.at[mine])
    plgpu.wait_smem_to_gmem(0)


def _meet_queries(plan: KeysPlan, refs: KeysRefs, wg, slot, own, i, keep, k_segments, carry, gate, causal) -> tuple:
    """Add the gradients that query block `i` gives to (dk, dv, dkeep) of the keys from `own` on."""
    ops, shape = plan.ops, (plan.rows, plan.blocks.q)
    over_queries = lambda x: lax.broadcast_in_dim(x, shape, [0])
    over_keys = lambda x: lax.broadcast_in_dim(x, shape, [1])
    dk, dv, dkeep = carry
    plgpu.barrier_wait(refs.ready.at[slot])
    s, dp = ops.dots(
        [
            (refs.k_s.at[wg], refs.q_s.at[slot], False, True),
            (refs.v_s.at[wg], refs.do_s.at[slot], False, True),
        ],
        shape,
    )
    later_than = lambda shift: ops.iota(shape, 1) >= ops.iota(shape, 0) + (own - i * plan.blocks.q + shift)
    gated = later_than(plan.window_size + 1) if gate == "outside" else None
    if gate is not None:
        s = s + over_queries(keep) if gated is None else jnp.where(gated, s + over_queries(keep), s)
    if causal:
        s = jnp.where(later_than(0), s, MASKED)
    if plan.has_segments:
        s = jnp.where(over_queries(k_segments) == over_keys(ops.load(refs.q_seg_s.at[slot], ROW)), s, MASKED)
    p = jnp.exp2(s * exponent(plan.head_dim) - over_keys(ops.load(refs.total_s.at[slot], ROW)))
    ds = p * (dp - over_keys(ops.load(refs.delta_s.at[slot], ROW)))
    if gate is not None:
        dkeep = dkeep + (ds if gated is None else jnp.where(gated, ds, 0.0)).sum(axis=1)
    products = [
        (p.astype(plan.dtype), refs.do_s.at[slot], False, False),
        (ds.astype(plan.dtype), refs.q_s.at[slot], False, False),
    ]
    dv, dk = ops.add_dots([dv, dk], products)
    plgpu.barrier_arrive(refs.free.at[slot])
    return dk, dv, dkeep


def _copy_queries(plan: KeysPlan, refs: KeysRefs, at: tuple, sections: QuerySections) -> None:
    """The copying warpgroup: the queries of all heads of the group, block after block."""
    plgpu.set_max_registers(24, action="decrease")
    block, steps = plan.blocks.q, plan.blocks.steps
    per_head = sections.end - sections.start
    total = plan.group * per_head

    def copy_block(n, _):
        g, slot = lax.div(n, per_head), lax.rem(n, jnp.int32(steps))
        queries = pl.ds((sections.start + n - g * per_head) * block, block)
        pl.when(n >= steps)(lambda: plgpu.barrier_wait(refs.free.at[slot]))
        arrays = (
            (refs.q, refs.q_s),
            (refs.d_out, refs.do_s),
            (refs.log_total, refs.total_s),
            (refs.delta, refs.delta_s),
        )
        for ref, buffer in arrays:
            plgpu.copy_gmem_to_smem(ref.at[(*at, g, queries)], buffer.at[slot], refs.ready.at[slot])
        if plan.has_segments:
            plgpu.copy_gmem_to_smem(refs.segments.at[at[0], queries], refs.q_seg_s.at[slot], refs.ready.at[slot])

    def drain(n, _):
        plgpu.barrier_wait(refs.free.at[lax.rem(n, jnp.int32(steps))])

    lax.fori_loop(0, total, copy_block, None)
    lax.fori_loop(jnp.maximum(total - steps, 0), total, drain, None)
