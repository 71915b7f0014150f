"""The cache update of one decode step on Hopper, in one kernel: RoPE, apply_pending, find a slot, write.

The grid is (batch, KV head). Each CTA rotates the queries of its group and its key, scans the integers of its head for
the lowest free slot or, if all slots are taken, for the pair to push out, and writes one row of keys and one of values,
in place. The kernel is bound by the latency of the scan, which reads 8 bytes per slot; attention reads 512.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

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
from dms_jax.kernels.mosaic_gpu import ROW, ROWS, Ops, bind, update_in_place
from dms_jax.kernels.operands import Pairs, Token

ROW_LENGTH = 64  # the numbers of a head's slots form a matrix with rows of this length, in tiles of as many rows
BUFFERS = 2  # tiles in flight
LOWEST = float(np.finfo(np.float32).min)  # below any score


class Plan(NamedTuple):
    """Static facts of a call. The numbers of a head's slots are [slot_rows, row_length]."""

    ops: Ops
    group: int  # query heads per KV head
    head_dim: int
    capacity: int
    row_length: int
    dtype: Any  # of the token
    k_dtype: Any  # of the cache
    v_dtype: Any
    window_size: int
    shift: int | None

    @property
    def slot_rows(self) -> int:
        return self.capacity // self.row_length

    @property
    def tile(self) -> int:
        """Rows per tile."""
        return min(ROW_LENGTH, self.slot_rows)


class Refs(NamedTuple):
    """The slots of the layer, which are updated, the token, the results, and scratch memory for one head."""

    k_cache: Any  # [B K C H]
    v_cache: Any  # [B K C H]
    position: Any  # [B K slot_rows row_length]
    expiry: Any  # [B K slot_rows row_length]
    score: Any  # [B K slot_rows row_length]
    q: Any  # [B N H]
    k: Any  # [B K H]
    v: Any  # [B K H]
    cos: Any  # [B H/2]
    sin: Any  # [B H/2]
    logit: Any  # [B K]
    seen: Any  # [B]
    num_tokens: Any  # [B], 0 or 1
    threshold: Any  # [1]
    q_out: Any  # [B N H]
    forced: Any  # [B K], 0 or 1
    q_s: Any
    k_s: Any
    v_s: Any
    cos_s: Any
    sin_s: Any
    k_out_s: Any
    v_out_s: Any
    position_s: Any
    expiry_s: Any
    score_s: Any
    token_here: Any
    slots_here: Any
    scores_here: Any


class Step(NamedTuple):
    """Facts about a CTA's head and its new token."""

    batch: Array
    head: Array
    seen: Array
    logit: Array
    decided: Array  # the expiry of the pair that the token decides about


def decode_update(
    token: Token,
    slots: Pairs,
    seen: Int[Array, "B"],
    count: Int[Array, "B"],
    threshold: Float[Array, ""],
    *,
    window_size: int,
    decision_shift: int | None,
    interpret: bool = False,
) -> tuple[Float[Array, "B N H"], Pairs, Int[Array, "B K"]]:
    """Do `apply_pending` and `append` of `core.compact_cache` under `LearnedEviction.mark`, for one token per row.

    Return the rotated queries, the slots, and 1 for each head that had to push a pair out. Rows of `count` 0 are
    unchanged. If `decision_shift` is None, no pair is ever marked.
    """
    b, heads, capacity, h = slots.k.shape
    row_length = math.gcd(capacity, ROW_LENGTH)
    group = token.q.shape[1] // heads
    plan = Plan(
        Ops(interpret),
        group,
        h,
        capacity,
        row_length,
        token.q.dtype,
        slots.k.dtype,
        slots.v.dtype,
        window_size,
        decision_shift,
    )
    inputs = [*token, seen, count, threshold.reshape(1)]
    as_rows = lambda x: x.reshape(b, heads, capacity // row_length, row_length)
    k_cache, v_cache, position, expiry, score, q, forced = update_in_place(
        bind(update, plan, Refs),
        [slots.k, slots.v, *map(as_rows, slots[2:])],
        inputs,
        (jax.ShapeDtypeStruct(token.q.shape, plan.dtype), jax.ShapeDtypeStruct((b, heads), jnp.int32)),
        grid={"batch": b, "head": heads},
        scratch=_scratch(plan),
        interpret=interpret,
    )
    return q, Pairs(k_cache, v_cache, *(x.reshape(b, heads, capacity) for x in (position, expiry, score))), forced


def _scratch(plan: Plan) -> dict[str, Any]:
    h, half = plan.head_dim, plan.head_dim // 2
    tiles_of = lambda dtype: plgpu.SMEM((BUFFERS, ROW_LENGTH, plan.row_length), dtype)
    return {
        "q_s": plgpu.SMEM((plan.group, h), plan.dtype),
        "k_s": plgpu.SMEM((h,), plan.dtype),
        "v_s": plgpu.SMEM((h,), plan.dtype),
        "cos_s": plgpu.SMEM((half,), jnp.float32),
        "sin_s": plgpu.SMEM((half,), jnp.float32),
        "k_out_s": plgpu.SMEM((h,), plan.k_dtype),
        "v_out_s": plgpu.SMEM((h,), plan.v_dtype),
        "position_s": tiles_of(jnp.int32),
        "expiry_s": tiles_of(jnp.int32),
        "score_s": tiles_of(jnp.float32),
        "token_here": plgpu.Barrier(num_arrivals=5),
        "slots_here": plgpu.Barrier(num_arrivals=2, num_barriers=BUFFERS),
        "scores_here": plgpu.Barrier(num_barriers=BUFFERS),
    }


def update(plan: Plan, refs: Refs) -> None:
    """The kernel: one token of one head."""
    capacity, shift = plan.capacity, plan.shift
    batch, head = lax.axis_index("batch"), lax.axis_index("head")
    query_heads = pl.ds(head * plan.group, plan.group)
    copies = (
        (refs.q.at[batch, query_heads], refs.q_s),
        (refs.k.at[batch, head], refs.k_s),
        (refs.v.at[batch, head], refs.v_s),
        (refs.cos.at[batch], refs.cos_s),
        (refs.sin.at[batch], refs.sin_s),
    )
    for source, target in copies:
        plgpu.copy_gmem_to_smem(source, target, refs.token_here)
    seen, real, logit = refs.seen[batch], refs.num_tokens[batch] > 0, refs.logit[batch, head]
    expiry_if_marked = seen + (plan.window_size - 1 if shift == 1 else plan.window_size)
    decided = jnp.where(logit > refs.threshold[0], expiry_if_marked, NEVER)
    step = Step(batch, head, seen, logit, decided)

    # Find the slot of the pending pair, and a slot for the new pair: the lowest free one, or that of the victim.
    def free_and_pending(carry, index, position, expiry, _):
        free, pending = carry
        free = jnp.minimum(free, _min(jnp.where(expiry < seen, index, capacity)))
        return free, jnp.minimum(pending, _min(jnp.where(position == seen - 1, index, capacity)))

    free, pending = _scan(plan, refs, step, free_and_pending, (jnp.int32(capacity), jnp.int32(capacity)))
    slot = lax.cond(free < capacity, lambda: free, lambda: _victim(plan, refs, step))
    refs.forced[batch, head] = jnp.where(real & (free == capacity), 1, 0)

    plgpu.barrier_wait(refs.token_here)
    _rotate(plan, refs)
    plgpu.copy_smem_to_gmem(refs.q_s, refs.q_out.at[batch, query_heads])

    @pl.when(real & (slot < capacity))
    def _append():
        plgpu.copy_smem_to_gmem(refs.k_out_s, refs.k_cache.at[batch, head, slot])
        plgpu.copy_smem_to_gmem(refs.v_out_s, refs.v_cache.at[batch, head, slot])
        at = batch, head, lax.div(slot, jnp.int32(plan.row_length)), lax.rem(slot, jnp.int32(plan.row_length))
        refs.position[at] = seen
        refs.expiry[at] = decided if shift == 0 else jnp.int32(NEVER)
        refs.score[at] = logit if shift == 0 else jnp.float32(0)

    if shift == 1:

        @pl.when(real & (pending < capacity) & (pending != slot))
        def _apply_pending():
            at = batch, head, lax.div(pending, jnp.int32(plan.row_length)), lax.rem(pending, jnp.int32(plan.row_length))
            refs.expiry[at] = decided
            refs.score[at] = logit

    plgpu.wait_smem_to_gmem(0)


def _scan(plan: Plan, refs: Refs, step: Step, fold: Callable, start: Any, with_score: bool = False) -> Any:
    """Fold `fold(carry, index, position, expiry, score)` over the slots, after the pending decision, tile by tile.

    The last tile may overlap the one before it. If a tile is larger than all slots together, its entries beyond the
    slots have an `index` of `capacity` or more and arbitrary other values.
    """
    ops, tile, row_length = plan.ops, plan.tile, plan.row_length
    tiles = -(-plan.slot_rows // tile)
    first_row = lambda i: jnp.minimum(i * tile, plan.slot_rows - tile)

    def fetch(i):
        buffer, rows = lax.rem(i, jnp.int32(BUFFERS)), (step.batch, step.head, pl.ds(first_row(i), tile))
        arrays = [
            (refs.position, refs.position_s, refs.slots_here),
            (refs.expiry, refs.expiry_s, refs.slots_here),
            (refs.score, refs.score_s, refs.scores_here),
        ]
        for source, target, here in arrays[: 3 if with_score else 2]:
            plgpu.copy_gmem_to_smem(source.at[rows], target.at[buffer, pl.ds(0, tile)], here.at[buffer])

    def one_tile(i, carry):
        pl.when(i + 1 < tiles)(lambda: fetch(i + 1))
        buffer = lax.rem(i, jnp.int32(BUFFERS))
        plgpu.barrier_wait(refs.slots_here.at[buffer])
        position, expiry = (ops.load(x.at[buffer], ROWS, optimized=False) for x in (refs.position_s, refs.expiry_s))
        row, column = ops.iota((ROW_LENGTH, row_length), 0), ops.iota((ROW_LENGTH, row_length), 1)
        index = (first_row(i) + row) * row_length + column
        pending = position == step.seen - 1
        if plan.shift == 1:
            expiry = jnp.where(pending, step.decided, expiry)
        if not with_score:
            return fold(carry, index, position, expiry, None)
        plgpu.barrier_wait(refs.scores_here.at[buffer])
        score = ops.load(refs.score_s.at[buffer], ROWS, optimized=False)
        if plan.shift == 1:
            score = jnp.where(pending, step.logit, score)
        return fold(carry, index, position, expiry, score)

    fetch(jnp.int32(0))
    return lax.fori_loop(0, tiles, one_tile, start)


def _victim(plan: Plan, refs: Refs, step: Step) -> Array:
    """Do `core.compact_cache.victim` on full slots and the new pair. Return a slot, or `capacity` for the new pair."""
    capacity, seen = plan.capacity, step.seen
    outside = lambda index, position: (index < capacity) & (position + plan.window_size < seen)

    def highest(best, index, position, _, score):
        return jnp.maximum(best, _max(jnp.where(outside(index, position), score, LOWEST)))

    best = _scan(plan, refs, step, highest, jnp.float32(LOWEST), with_score=True)

    def leaves(index, position, score):
        return (outside(index, position) & (score == best)) | ((index < capacity) & (best <= LOWEST))

    def oldest(first, index, position, _, score):
        return jnp.minimum(first, _min(jnp.where(leaves(index, position, score), position, EMPTY)))

    first = _scan(plan, refs, step, oldest, jnp.int32(EMPTY), with_score=True)

    def lowest(slot, index, position, _, score):
        matches = leaves(index, position, score) & (position == first)
        return jnp.minimum(slot, _min(jnp.where(matches, index, capacity)))

    slot = _scan(plan, refs, step, lowest, jnp.int32(capacity), with_score=True)
    return jnp.where(first > seen, capacity, slot)


def _rotate(plan: Plan, refs: Refs) -> None:
    """Apply RoPE to queries and key in shared memory, and convert key and value to the cache's dtypes."""
    ops, half = plan.ops, plan.head_dim // 2
    load = lambda ref: ops.load(ref, ROW, optimized=False)
    cos, sin = load(refs.cos_s), load(refs.sin_s)

    def rotated(ref):  # channel pairs (i, i + half) of a vector, in fp32
        low, high = (load(ref.at[pl.ds(start, half)]).astype(jnp.float32) for start in (0, half))
        return (low * cos - high * sin).astype(plan.dtype), (high * cos + low * sin).astype(plan.dtype)

    def narrowed(x, dtype):  # only fp32 can be converted to 8-bit types
        return x.astype(jnp.float32).astype(dtype) if x.dtype != dtype else x

    for start, k_half in zip((0, half), rotated(refs.k_s), strict=True):
        refs.k_out_s.at[pl.ds(start, half)][...] = narrowed(k_half, plan.k_dtype)
    # Rotate queries one by one: on an H200, but not in the interpreter, jax 0.11.2 miscompiles this for a matrix of
    # rows.
    for query in range(plan.group):
        for start, q_half in zip((0, half), rotated(refs.q_s.at[query]), strict=True):
            refs.q_s.at[query, pl.ds(start, half)][...] = q_half
    refs.v_out_s[...] = narrowed(load(refs.v_s), plan.v_dtype)
    plgpu.commit_smem()


def _min(x: Array) -> Array:
    return jnp.min(jnp.min(x, axis=1))


def _max(x: Array) -> Array:
    return jnp.max(jnp.max(x, axis=1))
