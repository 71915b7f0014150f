"""The gradient of attention with the DMS gate on Hopper GPUs: one kernel for the queries, one for keys, values and the gate.

Both recompute the scores from the saved log-sum of each row, and neither adds to memory that another CTA writes: the result is
the same in every run. `gradient_of_queries` walks over keys as the forward pass does. In `gradients_of_keys` a CTA owns a block
of keys of one key/value head and walks over the queries of all heads of its group; keys are the rows of its scores, so what
their gate gets is the sum of a row, taken in registers and written once.
"""

from typing import Any

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
from dms_jax.kernels.mosaic_gpu import COLUMN, ROW, ROWS, Ops, interpreter


def dkv_blocks(blocks: TrainBlocks) -> TrainBlocks:
    """A CTA owns as many keys as one of the forward pass owns queries. The steps are short: two gradients fill the registers."""
    return TrainBlocks(q=min(blocks.k, 64), k=blocks.q, steps=blocks.steps)


def gradient_of_queries(
    q, k, v, log_keep, segments, log_total, delta, d_out, window_size: int, blocks: TrainBlocks, interpret: bool
) -> Array:
    """[B K G T H]. `log_total` is the forward pass's, `delta` of each row the product of its output and that one's gradient."""
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
        sections = KeySections.of(first, blocks.q, block, window_size)
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


def gradients_of_keys(
    q, k, v, log_keep, segments, log_total, delta, d_out, window_size: int, blocks: TrainBlocks, interpret: bool
) -> tuple[Array, Array, Array]:
    """Of keys and values [B K T H] and of the gate [B K T]. `blocks.k` are the keys a CTA owns, `blocks.q` the queries of a step."""
    b, heads, group, length, h = q.shape
    rows, block, steps = blocks.k // COMPUTE, blocks.q, blocks.steps
    ops, dtype, factor = Ops(interpret), q.dtype, exponent(h)
    has_segments = segments is not None

    def train_attention_dkv(
        *refs,
        k_s,
        v_s,
        keep_s,
        dkeep_s,
        q_s,
        do_s,
        total_s,
        delta_s,
        k_ready,
        ready,
        free,
        k_seg_s: Any = None,
        q_seg_s: Any = None,
    ):
        (
            q_ref,
            k_ref,
            v_ref,
            keep_ref,
            live_ref,
            total_ref,
            delta_ref,
            do_ref,
            *maybe_segments,
            dk_ref,
            dv_ref,
            dkeep_ref,
        ) = refs
        segments_ref: Any = maybe_segments[0] if has_segments else None
        batch, head, owned, wg = (lax.axis_index(name) for name in ("batch", "head", "block", "warpgroup"))
        first = owned * blocks.k
        # Blocks of queries: [start, past) hold the diagonal, [past, inside) lie within the window of all keys,
        # [inside, outside) straddle its edge, [outside, end) lie beyond it and are skipped when all keys are gone.
        count = lambda queries: jnp.minimum(lax.div(queries + block - 1, jnp.int32(block)), length // block)
        start, past = lax.div(first, jnp.int32(block)), count(first + blocks.k - 1)
        outside = jnp.maximum(count(first + blocks.k + window_size), past)
        inside = jnp.minimum(jnp.maximum(lax.div(first + window_size + 1, jnp.int32(block)), past), outside)
        end = jnp.where(live_ref[batch, head, owned] > 0, jnp.int32(length // block), outside)

        @pl.when(wg < COMPUTE)
        def compute():
            plgpu.set_max_registers(240, action="increase")
            own = first + wg * rows
            mine = (batch, head, pl.ds(own, rows))
            for ref, buffer in ((k_ref, k_s), (v_ref, v_s), (keep_ref, keep_s)):
                plgpu.copy_gmem_to_smem(ref.at[mine], buffer.at[wg], k_ready.at[wg])
            if has_segments:
                plgpu.copy_gmem_to_smem(segments_ref.at[batch, pl.ds(own, rows)], k_seg_s.at[wg], k_ready.at[wg])
            plgpu.barrier_wait(k_ready.at[wg])
            shape = (rows, block)
            over_queries = lambda x: lax.broadcast_in_dim(x, shape, [0])
            over_keys = lambda x: lax.broadcast_in_dim(x, shape, [1])
            keep = ops.load(keep_s.at[wg], COLUMN)
            k_segments = ops.load(k_seg_s.at[wg], COLUMN) if has_segments else None

            def step(g, i, carry, gate, causal):
                dk, dv, dkeep = carry
                slot = lax.rem(g * (end - start) + (i - start), jnp.int32(steps))
                plgpu.barrier_wait(ready.at[slot])
                s, dp = ops.dots(
                    [(k_s.at[wg], q_s.at[slot], False, True), (v_s.at[wg], do_s.at[slot], False, True)], shape
                )
                later_than = lambda shift: ops.iota(shape, 1) >= ops.iota(shape, 0) + (own - i * block + shift)
                gated = later_than(window_size + 1) if gate == "outside" else None
                if gate is not None:
                    s = s + over_queries(keep) if gated is None else jnp.where(gated, s + over_queries(keep), s)
                if causal:
                    s = jnp.where(later_than(0), s, MASKED)
                if has_segments:
                    s = jnp.where(over_queries(k_segments) == over_keys(ops.load(q_seg_s.at[slot], ROW)), s, MASKED)
                p = jnp.exp2(s * factor - over_keys(ops.load(total_s.at[slot], ROW)))
                ds = p * (dp - over_keys(ops.load(delta_s.at[slot], ROW)))
                if gate is not None:
                    dkeep = dkeep + (ds if gated is None else jnp.where(gated, ds, 0.0)).sum(axis=1)
                products = [
                    (p.astype(dtype), do_s.at[slot], False, False),
                    (ds.astype(dtype), q_s.at[slot], False, False),
                ]
                dv, dk = ops.add_dots([dv, dk], products)
                plgpu.barrier_arrive(free.at[slot])
                return dk, dv, dkeep

            near = "outside" if window_size < blocks.k + block else None
            sections = (
                (start, past, near, True),
                (past, inside, None, False),
                (inside, outside, "outside", False),
                (outside, end, "all", False),
            )

            def head_of_group(g, carry):
                for low, high, gate, causal in sections:
                    carry = lax.fori_loop(
                        low, high, lambda i, carry, how=(gate, causal): step(g, i, carry, *how), carry
                    )
                return carry

            zeros = ops.full((rows, h), 0.0, ROWS), ops.full((rows, h), 0.0, ROWS), ops.full((rows,), 0.0, COLUMN)
            dk, dv, dkeep = lax.fori_loop(0, group, head_of_group, zeros)
            k_s.at[wg][...] = (dk * h**-0.5).astype(dtype)
            v_s.at[wg][...] = dv.astype(dtype)
            dkeep_s.at[wg][...] = dkeep
            plgpu.commit_smem()
            for buffer, ref in ((k_s, dk_ref), (v_s, dv_ref), (dkeep_s, dkeep_ref)):
                plgpu.copy_smem_to_gmem(buffer.at[wg], ref.at[mine])
            plgpu.wait_smem_to_gmem(0)

        @pl.when(wg == COMPUTE)
        def copy():
            plgpu.set_max_registers(24, action="decrease")
            per_head = end - start
            total = group * per_head

            def copy_queries(n, _):
                g, slot = lax.div(n, per_head), lax.rem(n, jnp.int32(steps))
                queries = pl.ds((start + n - g * per_head) * block, block)

                @pl.when(n >= steps)
                def _():
                    plgpu.barrier_wait(free.at[slot])

                for ref, buffer in ((q_ref, q_s), (do_ref, do_s), (total_ref, total_s), (delta_ref, delta_s)):
                    plgpu.copy_gmem_to_smem(ref.at[batch, head, g, queries], buffer.at[slot], ready.at[slot])
                if has_segments:
                    plgpu.copy_gmem_to_smem(segments_ref.at[batch, queries], q_seg_s.at[slot], ready.at[slot])

            def drain(n, _):
                plgpu.barrier_wait(free.at[lax.rem(n, jnp.int32(steps))])

            lax.fori_loop(0, total, copy_queries, None)
            lax.fori_loop(jnp.maximum(total - steps, 0), total, drain, None)

    operand = lambda *shape: ops.matrix((*shape, h), dtype)
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
        "k_ready": plgpu.Barrier(num_arrivals=3 + has_segments, num_barriers=COMPUTE),
        "ready": plgpu.Barrier(num_arrivals=4 + has_segments, num_barriers=steps),
        "free": plgpu.Barrier(num_arrivals=COMPUTE, num_barriers=steps),
    }
    if has_segments:
        scratch |= {"k_seg_s": plgpu.SMEM((COMPUTE, rows), jnp.int32), "q_seg_s": plgpu.SMEM((steps, block), jnp.int32)}
    run = plgpu.kernel(
        train_attention_dkv,
        out_type=[
            jax.ShapeDtypeStruct(k.shape, dtype),
            jax.ShapeDtypeStruct(v.shape, dtype),
            jax.ShapeDtypeStruct(log_keep.shape, jnp.float32),
        ],
        scratch_types=scratch,
        grid=(b, heads, length // blocks.k),
        grid_names=("batch", "head", "block"),
        num_threads=COMPUTE + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpreter() if interpret else None,
    )
    live = is_live(log_keep, blocks.k).astype(jnp.int32)
    return tuple(
        run(q, k, v, raw_gate(log_keep, h), live, log_total, delta, d_out, *([segments] if has_segments else []))
    )
