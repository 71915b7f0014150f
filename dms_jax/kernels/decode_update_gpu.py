"""What happens to a layer's cache when one token per row comes, in one Hopper kernel: RoPE, apply_pending, find a slot, write.

Grid (batch, KV head); each CTA rotates the queries of its group and its key, scans the integers of its head for the lowest
free slot, only when there is none also for the pair that leaves, and writes one row of keys and of values. In place. Bound by
the latency of the scan, 8 bytes a slot, where attention reads 512.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Float, Int

from dms_jax.axes import Array
from dms_jax.core.compact_cache import EMPTY
from dms_jax.core.visibility import NEVER
from dms_jax.kernels.mosaic_gpu import ROW, ROWS, Ops, update_in_place

LANES = 64  # the slots of a head as a matrix of rows of this many, in tiles of as many rows
BUFFERS = 2  # tiles in flight
LOWEST = float(np.finfo(np.float32).min)  # below any score


def decode_update(
    q: Float[Array, "B N H"],
    k: Float[Array, "B K H"],
    v: Float[Array, "B K H"],
    cos: Float[Array, "B half"],
    sin: Float[Array, "B half"],
    logit: Float[Array, "B K"],
    k_cache: Float[Array, "B K C H"],
    v_cache: Float[Array, "B K C H"],
    position: Int[Array, "B K C"],
    expiry: Int[Array, "B K C"],
    score: Float[Array, "B K C"],
    seen: Int[Array, "B"],
    count: Int[Array, "B"],
    threshold: Float[Array, ""],
    *,
    window_size: int,
    decision_shift: int | None,
    interpret: bool = False,
) -> tuple[Array, ...]:
    """(q rotated [B N H], the five arrays, forced [B K] 0/1): `apply_pending` and `append` of `core.compact_cache` under
    `LearnedEviction.mark` for one token, which `count` 0 leaves out. `decision_shift` None: nothing is ever marked."""
    b, heads, capacity, h = k_cache.shape
    group, lanes = q.shape[1] // heads, math.gcd(capacity, LANES)
    as_rows = lambda x: x.reshape(b, heads, capacity // lanes, lanes)
    kernel, out_type, scratch = _program(
        b,
        heads,
        group,
        h,
        capacity,
        lanes,
        q.dtype,
        k_cache.dtype,
        v_cache.dtype,
        window_size=window_size,
        shift=decision_shift,
        ops=Ops(interpret),
    )
    inputs = [q, k, v, cos, sin, logit, seen, count, threshold.reshape(1)]
    k_cache, v_cache, position, expiry, score, q, forced = update_in_place(
        kernel,
        [k_cache, v_cache, *map(as_rows, (position, expiry, score))],
        inputs,
        out_type,
        grid={"batch": b, "head": heads},
        scratch=scratch,
        interpret=interpret,
    )
    return q, k_cache, v_cache, *(x.reshape(b, heads, capacity) for x in (position, expiry, score)), forced


def _program(b, heads, group, h, capacity, lanes, dtype, k_dtype, v_dtype, *, window_size, shift, ops) -> Any:
    """The kernel, and the types of its outputs and of its scratch memory."""
    half, slot_rows = h // 2, capacity // lanes
    tile = min(LANES, slot_rows)
    tiles = -(-slot_rows // tile)

    def turned(ref, cos, sin):
        """Channel pairs (i, i + half) of a vector, rotated in fp32."""
        low, high = (
            ops.load(ref.at[pl.ds(start, half)], ROW, optimized=False).astype(jnp.float32) for start in (0, half)
        )
        return (low * cos - high * sin).astype(dtype), (high * cos + low * sin).astype(dtype)

    def narrowed(x, dtype):
        return x.astype(jnp.float32).astype(dtype) if x.dtype != dtype else x  # 8 bits are reached from 32 only

    def update(
        k_cache_ref,
        v_cache_ref,
        position_ref,
        expiry_ref,
        score_ref,
        q_ref,
        k_ref,
        v_ref,
        cos_ref,
        sin_ref,
        logit_ref,
        seen_ref,
        count_ref,
        threshold_ref,
        q_out_ref,
        forced_ref,
        *,
        q_s,
        k_s,
        v_s,
        cos_s,
        sin_s,
        k_out_s,
        v_out_s,
        position_s,
        expiry_s,
        score_s,
        token_here,
        slots_here,
        scores_here,
    ):
        batch, head = lax.axis_index("batch"), lax.axis_index("head")
        heads_of_group = pl.ds(head * group, group)
        copies = (
            (q_ref.at[batch, heads_of_group], q_s),
            (k_ref.at[batch, head], k_s),
            (v_ref.at[batch, head], v_s),
            (cos_ref.at[batch], cos_s),
            (sin_ref.at[batch], sin_s),
        )
        for source, target in copies:
            plgpu.copy_gmem_to_smem(source, target, token_here)
        seen, real, logit = seen_ref[batch], count_ref[batch] > 0, logit_ref[batch, head]
        expiry_if_marked = seen + (window_size - 1 if shift == 1 else window_size)
        decided = jnp.where(logit > threshold_ref[0], expiry_if_marked, NEVER)

        def scan(fold, start, with_score=False):
            """Fold `fold(carry, index, position, expiry, score)`, settled, over the slots in tiles; the last may overlap the one
            before it. Where a tile is larger than all slots, index is at least `capacity` and the rest is arbitrary."""
            first_row = lambda i: jnp.minimum(i * tile, slot_rows - tile)

            def fetch(i):
                buffer, of_tile = lax.rem(i, jnp.int32(BUFFERS)), (batch, head, pl.ds(first_row(i), tile))
                plgpu.copy_gmem_to_smem(
                    position_ref.at[of_tile], position_s.at[buffer, pl.ds(0, tile)], slots_here.at[buffer]
                )
                plgpu.copy_gmem_to_smem(
                    expiry_ref.at[of_tile], expiry_s.at[buffer, pl.ds(0, tile)], slots_here.at[buffer]
                )
                if with_score:
                    plgpu.copy_gmem_to_smem(
                        score_ref.at[of_tile], score_s.at[buffer, pl.ds(0, tile)], scores_here.at[buffer]
                    )

            def one_tile(i, carry):
                pl.when(i + 1 < tiles)(lambda: fetch(i + 1))
                buffer = lax.rem(i, jnp.int32(BUFFERS))
                plgpu.barrier_wait(slots_here.at[buffer])
                position, expiry = (ops.load(x.at[buffer], ROWS, optimized=False) for x in (position_s, expiry_s))
                row, lane = ops.iota((LANES, lanes), 0), ops.iota((LANES, lanes), 1)
                index = (first_row(i) + row) * lanes + lane
                pending = position == seen - 1
                if shift == 1:
                    expiry = jnp.where(pending, decided, expiry)
                if not with_score:
                    return fold(carry, index, position, expiry, None)
                plgpu.barrier_wait(scores_here.at[buffer])
                score = ops.load(score_s.at[buffer], ROWS, optimized=False)
                return fold(carry, index, position, expiry, jnp.where(pending, logit, score) if shift == 1 else score)

            fetch(jnp.int32(0))
            return lax.fori_loop(0, tiles, one_tile, start)

        def free_and_pending(carry, index, position, expiry, _):
            free, pending = carry
            free = jnp.minimum(free, _least(jnp.where(expiry < seen, index, capacity)))
            return free, jnp.minimum(pending, _least(jnp.where(position == seen - 1, index, capacity)))

        def victim():
            """core.compact_cache.victim of slots that are all alive and of the new pair: a slot, or `capacity` for the pair itself."""
            outside = lambda index, position: (index < capacity) & (position + window_size < seen)

            def highest(best, index, position, _, score):
                return jnp.maximum(best, _most(jnp.where(outside(index, position), score, LOWEST)))

            best = scan(highest, jnp.float32(LOWEST), with_score=True)

            def leaves(index, position, score):
                return (outside(index, position) & (score == best)) | ((index < capacity) & (best <= LOWEST))

            def oldest(first, index, position, _, score):
                return jnp.minimum(first, _least(jnp.where(leaves(index, position, score), position, EMPTY)))

            first = scan(oldest, jnp.int32(EMPTY), with_score=True)

            def slot_of(slot, index, position, _, score):
                return jnp.minimum(
                    slot, _least(jnp.where(leaves(index, position, score) & (position == first), index, capacity))
                )

            slot = scan(slot_of, jnp.int32(capacity), with_score=True)
            return jnp.where(first > seen, capacity, slot)

        free, pending = scan(free_and_pending, (jnp.int32(capacity), jnp.int32(capacity)))
        slot = lax.cond(free < capacity, lambda: free, victim)
        forced_ref[batch, head] = jnp.where(real & (free == capacity), 1, 0)

        plgpu.barrier_wait(token_here)
        cos, sin = (ops.load(x, ROW, optimized=False) for x in (cos_s, sin_s))
        for start, k_half in zip((0, half), turned(k_s, cos, sin), strict=True):
            k_out_s.at[pl.ds(start, half)][...] = narrowed(k_half, k_dtype)
        # Queries one by one: as rows of one matrix, jax 0.11.2 rotates them wrongly on an H200, which no interpreter shows.
        for query in range(group):
            for start, q_half in zip((0, half), turned(q_s.at[query], cos, sin), strict=True):
                q_s.at[query, pl.ds(start, half)][...] = q_half
        v_out_s[...] = narrowed(ops.load(v_s, ROW, optimized=False), v_dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(q_s, q_out_ref.at[batch, heads_of_group])

        @pl.when(real & (slot < capacity))
        def _append():
            plgpu.copy_smem_to_gmem(k_out_s, k_cache_ref.at[batch, head, slot])
            plgpu.copy_smem_to_gmem(v_out_s, v_cache_ref.at[batch, head, slot])
            at = batch, head, lax.div(slot, jnp.int32(lanes)), lax.rem(slot, jnp.int32(lanes))
            position_ref[at] = seen
            expiry_ref[at] = decided if shift == 0 else jnp.int32(NEVER)
            score_ref[at] = logit if shift == 0 else jnp.float32(0)

        if shift == 1:

            @pl.when(real & (pending < capacity) & (pending != slot))
            def _settle():
                at = batch, head, lax.div(pending, jnp.int32(lanes)), lax.rem(pending, jnp.int32(lanes))
                expiry_ref[at] = decided
                score_ref[at] = logit

        plgpu.wait_smem_to_gmem(0)

    out_type = jax.ShapeDtypeStruct((b, heads * group, h), dtype), jax.ShapeDtypeStruct((b, heads), jnp.int32)
    tiles_of = lambda dtype: plgpu.SMEM((BUFFERS, LANES, lanes), dtype)
    scratch = {
        "q_s": plgpu.SMEM((group, h), dtype),
        "k_s": plgpu.SMEM((h,), dtype),
        "v_s": plgpu.SMEM((h,), dtype),
        "cos_s": plgpu.SMEM((half,), jnp.float32),
        "sin_s": plgpu.SMEM((half,), jnp.float32),
        "k_out_s": plgpu.SMEM((h,), k_dtype),
        "v_out_s": plgpu.SMEM((h,), v_dtype),
        "position_s": tiles_of(jnp.int32),
        "expiry_s": tiles_of(jnp.int32),
        "score_s": tiles_of(jnp.float32),
        "token_here": plgpu.Barrier(num_arrivals=5),
        "slots_here": plgpu.Barrier(num_arrivals=2, num_barriers=BUFFERS),
        "scores_here": plgpu.Barrier(num_barriers=BUFFERS),
    }
    return update, out_type, scratch


def _least(x: Array) -> Array:
    return jnp.min(jnp.min(x, axis=1))


def _most(x: Array) -> Array:
    return jnp.max(jnp.max(x, axis=1))
