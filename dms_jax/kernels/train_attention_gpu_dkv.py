"""The gradients of keys, values and gate in attention with the DMS gate on Hopper GPUs.

A CTA owns a block of keys of one KV head and loops over the queries of all heads of its group. It recomputes the scores
from the saved log-sum-exp of each row. Keys are the rows of the scores, so the gate's gradient is the sum of a row,
which is accumulated in registers and written once. Each CTA alone writes its part of the results, so every run gives
the same result.
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
from dms_jax.kernels.key_blocks_gpu import exponent, is_live, raw_gate
from dms_jax.kernels.mosaic_gpu import COLUMN, COMPUTE, ROW, ROWS, Ops, bind, copy_blocks, interpreter


def dkv_blocks(blocks: TrainBlocks) -> TrainBlocks:
    """Return block sizes for `gradients_of_keys`, given those of the forward pass.

    A CTA owns as many keys as a CTA of the forward pass owns queries. Steps are short, because two gradients fill the
    registers.
    """
    return TrainBlocks(q=min(blocks.k, 64), k=blocks.q, steps=blocks.steps)


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
    logsumexp: Any  # [B K G T], in base 2
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
    logsumexp_s: Any
    delta_s: Any
    k_ready: Any
    ready: Any
    free: Any
    k_seg_s: Any  # None without segments
    q_seg_s: Any


class QuerySections(NamedTuple):
    """Ranges of blocks of queries, by the mask and gate that their scores need.

    Blocks in [start, past) contain the diagonal, and blocks in [past, inside) lie within the window of all keys. Blocks
    in [inside, outside) straddle the edge of the window, and blocks in [outside, end) lie beyond it. The last range is
    empty if all keys are evicted.
    """

    start: Array
    past: Array
    inside: Array
    outside: Array
    end: Array

    @classmethod
    def of_keys(cls, plan: KeysPlan, first: Array, live: Any, at: tuple) -> "QuerySections":
        """Return the sections for the keys of a CTA from `first` on; `live[at]` is 0 if all of them are evicted."""
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
    q, k, v, log_keep, segments, logsumexp, delta, d_out, window_size: int, blocks: TrainBlocks, interpret: bool
) -> tuple[Array, Array, Array]:
    """Return the gradients of keys and values [B K T H] and of the gate [B K T].

    A CTA owns `blocks.k` keys, and a step takes `blocks.q` queries.
    """
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
    return tuple(run(q, k, v, raw_gate(log_keep, h), live, logsumexp, delta, d_out, *optional))


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
        "logsumexp_s": row(steps, block),
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
            return _add_query_block(plan, refs, wg, slot, own, i, keep, k_segments, carry, gate, causal)

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


def _add_query_block(plan: KeysPlan, refs: KeysRefs, wg, slot, own, i, keep, k_segments, carry, gate, causal) -> tuple:
    """Add what query block `i` contributes to `carry`, the gradients (dk, dv, dkeep) of the keys from `own` on."""
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
    p = jnp.exp2(s * exponent(plan.head_dim) - over_keys(ops.load(refs.logsumexp_s.at[slot], ROW)))
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
    block, per_head = plan.blocks.q, sections.end - sections.start

    def copy_block(n, slot):
        g = lax.div(n, per_head)
        queries = pl.ds((sections.start + n - g * per_head) * block, block)
        arrays = (
            (refs.q, refs.q_s),
            (refs.d_out, refs.do_s),
            (refs.logsumexp, refs.logsumexp_s),
            (refs.delta, refs.delta_s),
        )
        for ref, buffer in arrays:
            plgpu.copy_gmem_to_smem(ref.at[(*at, g, queries)], buffer.at[slot], refs.ready.at[slot])
        if plan.has_segments:
            plgpu.copy_gmem_to_smem(refs.segments.at[at[0], queries], refs.q_seg_s.at[slot], refs.ready.at[slot])

    copy_blocks(plan.group * per_head, plan.blocks.steps, [(refs.free, copy_block)])
