"""The cache update of one decode step on a TPU, in one kernel and in place: RoPE, apply_pending, append.

The grid is (blocks of rows of the batch, blocks of heads). A step has [rows, heads, C] of position, expiry and score in
VMEM, finds the slot of each of its heads, and copies from and to HBM only the tiles of keys, values and numbers that
contain this slot. The kernel is bound by reading the numbers, and by the latency of the copies, which overlap for all
heads of a step.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Float, Int

from dms_jax.axes import Array
from dms_jax.core.compact_cache import EMPTY
from dms_jax.core.rotary import apply_rope
from dms_jax.core.visibility import NEVER
from dms_jax.kernels.mosaic_tpu import LANES, VMEM_LIMIT, column, in_hbm, slots_in_lanes
from dms_jax.kernels.operands import Pairs, Token

SUBLANES = {1: 32, 2: 16, 4: 8}  # rows of a tile, by the bytes of a number
HEADS_AT_ONCE = 64  # heads whose copies overlap
NUMBERS_LIMIT = 20 * 2**20  # bytes of VMEM for position, expiry and score of a step; keys and values take the rest


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
    """Do `apply_pending` and `append` of `core.compact_cache` for one token per row; see `attention_api.decode_update`.

    Return the rotated queries, the slots, which are updated in place if the caller donates them, and 1 for each head
    that had to push a pair out. Raises NotImplementedError if a tile does not fit into VMEM.
    """
    b, heads, capacity, h = slots.k.shape
    lanes, itemsize = slots_in_lanes(h), slots.k.dtype.itemsize
    block_h = 8 if heads % 8 == 0 else heads
    fits = min(HEADS_AT_ONCE, NUMBERS_LIMIT // (9 * 4 * capacity)) // block_h
    block_b = max(size for size in range(1, b + 1) if b % size == 0 and size <= max(fits, 1))
    along = LANES if lanes else SUBLANES[itemsize]
    tile = along if capacity % along == 0 else capacity  # all slots of a head, if tiles do not divide them
    if (size := 2 * block_b * block_h * tile * h * itemsize) > VMEM_LIMIT // 2 and not interpret:
        raise NotImplementedError(
            f"the cache capacity must be a multiple of {along}, got {capacity}, "
            f"whose tiles would take {size / 2**20:.0f} MiB of VMEM"
        )

    seen, count = (jnp.broadcast_to(x[:, None], (b, heads)) for x in (seen, count))
    numbers = jnp.stack(
        [seen, count, lax.bitcast_convert_type(token.logit, jnp.int32), (token.logit > threshold).astype(jnp.int32)],
        axis=-1,
    )
    in_layout = lambda x: x.swapaxes(2, 3) if lanes else x
    cache = tuple(in_hbm(in_layout(x), interpret) for x in (slots.k, slots.v))
    by_heads = lambda *shape: pl.BlockSpec((block_b, *shape), lambda i, j: (i, j, 0))
    angle_spec = pl.BlockSpec((block_b, 1, h // 2), lambda i, j: (i, 0, 0))
    hbm_spec = pl.BlockSpec(memory_space=pltpu.HBM)
    query_heads = token.q.shape[1] // heads * block_h
    numbers_shape = (block_b, block_h, capacity)
    tile_shape = (h, tile) if lanes else (tile, h)
    out = pl.pallas_call(
        partial(_kernel, Plan(window_size, decision_shift, lanes, tile)),
        grid=(b // block_b, heads // block_h),
        in_specs=[
            by_heads(block_h, 4),
            angle_spec,
            angle_spec,
            by_heads(query_heads, h),
            by_heads(block_h, h),
            by_heads(block_h, h),
            *[by_heads(block_h, capacity)] * 3,
            hbm_spec,
            hbm_spec,
        ],
        out_specs=[by_heads(query_heads, h), by_heads(block_h, 1), *[hbm_spec] * 5],
        out_shape=[
            jax.ShapeDtypeStruct(x.shape, x.dtype)
            for x in (token.q, jax.ShapeDtypeStruct((b, heads, 1), jnp.int32), *slots[2:], *cache)
        ],
        scratch_shapes=[
            pltpu.VMEM(numbers_shape, jnp.int32),
            pltpu.VMEM(numbers_shape, jnp.int32),
            pltpu.VMEM(numbers_shape, jnp.float32),
            *[pltpu.VMEM((block_b, block_h, h), jnp.float32)] * 2,
            *[pltpu.VMEM((block_b, block_h, *tile_shape), slots.k.dtype)] * 2,
            pltpu.VMEM((block_b, block_h, LANES), jnp.int32),
            pltpu.SMEM((block_b, block_h, LANES), jnp.int32),
            pltpu.SemaphoreType.DMA,
            pltpu.SemaphoreType.DMA,
        ],
        input_output_aliases={6: 2, 7: 3, 8: 4, 9: 5, 10: 6},
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel"), vmem_limit_bytes=VMEM_LIMIT),
        interpret=interpret,
        name="decode_update",
    )(numbers, token.cos[:, None], token.sin[:, None], *token[:3], *slots[2:], *cache)
    q, forced, position, expiry, score, k_cache, v_cache = out
    return q, Pairs(in_layout(k_cache), in_layout(v_cache), position, expiry, score), forced[:, :, 0]


def _after_decision(numbers, position, expiry, score, window_size, decision_shift):
    """Apply this token's decision.

    Return expiry and score of the slots, the slot that the decision is about (C if it is about no slot), and expiry and
    score of the new pair.
    """
    seen, marked = numbers[..., 0:1], numbers[..., 3:4] > 0
    logit = lax.bitcast_convert_type(numbers[..., 2:3], jnp.float32)
    decided = jnp.full(seen.shape, position.shape[2], jnp.int32)
    if decision_shift == 1:
        pending = position == seen - 1
        expiry = jnp.where(pending, jnp.where(marked, seen - 1 + window_size, NEVER), expiry)
        score = jnp.where(pending, logit, score)
        decided = _lowest(pending)
    if decision_shift == 0:
        return expiry, score, decided, jnp.where(marked, seen + window_size, NEVER), logit
    return expiry, score, decided, jnp.full(seen.shape, NEVER, jnp.int32), jnp.zeros(seen.shape, jnp.float32)


def _lowest(slots):
    """Return the lowest slot that is true; C if all are false."""
    lane = lax.broadcasted_iota(jnp.int32, slots.shape, 2)
    return jnp.min(jnp.where(slots, lane, slots.shape[2]), axis=2, keepdims=True)


def _victim(position, score, seen, window_size):
    """Do `compact_cache.victim` for full heads. The new pair, the youngest one, is never the victim."""
    outside = seen > position + window_size
    worst = jnp.max(jnp.where(outside, score, -jnp.inf), axis=2, keepdims=True)
    some = jnp.max(jnp.where(outside, 1.0, 0.0), axis=2, keepdims=True) > 0
    oldest_of = jnp.where(jnp.logical_not(some) | (outside & (score == worst)), position, EMPTY)
    return _lowest(oldest_of == jnp.min(oldest_of, axis=2, keepdims=True))


class Plan(NamedTuple):
    """Static facts of a call."""

    window_size: int
    decision_shift: int | None
    lanes: bool  # `slots_in_lanes`: tiles of keys and values are [H, tile]
    tile: int  # slots per tile


class Refs(NamedTuple):
    """Blocks of a step in VMEM, arrays in HBM, and scratch memory. "rows" are batch rows, "heads" are KV heads."""

    numbers: Any  # [rows, heads, 4]: tokens seen, tokens now (0 or 1), bits of the logit, whether it marks
    cos: Any  # [rows, 1, H/2]
    sin: Any
    q: Any  # [rows, G heads, H]
    k: Any  # [rows, heads, H]
    v: Any
    old_position: Any  # [rows, heads, C]
    old_expiry: Any
    old_score: Any
    old_k: Any  # unused, because the outputs are the same memory
    old_v: Any
    q_out: Any  # [rows, G heads, H]
    forced: Any  # [rows, heads, 1]
    position_hbm: Any  # [B, K, C]
    expiry_hbm: Any
    score_hbm: Any
    k_hbm: Any  # [B, K, C, H]
    v_hbm: Any
    position: Any  # [rows, heads, C], after this token
    expiry: Any
    score: Any
    new_k: Any  # [rows, heads, H]
    new_v: Any
    k_tile: Any  # [rows, heads, tile, H]
    v_tile: Any
    target: Any  # [rows, heads, 128]: the slot of the new pair (-1: none), and the slot that the decision is about
    target_smem: Any
    ready: Any
    done: Any


def _kernel(plan: Plan, *arrays) -> None:
    refs = Refs(*arrays)
    block_b, block_h, capacity = refs.position.shape
    cos, sin = refs.cos[...], refs.sin[...]
    refs.q_out[...] = apply_rope(refs.q[...], cos, sin)
    refs.new_k[...] = apply_rope(refs.k[...], cos, sin).astype(jnp.float32)
    refs.new_v[...] = refs.v[...].astype(jnp.float32)

    numbers, position = refs.numbers[...], refs.old_position[...]
    seen, real = numbers[..., 0:1], numbers[..., 1:2] > 0
    expiry, score, decided, new_expiry, new_score = _after_decision(
        numbers, position, refs.old_expiry[...], refs.old_score[...], plan.window_size, plan.decision_shift
    )
    slot = _lowest(expiry < seen)
    full = real & (slot == capacity)
    refs.forced[...] = full.astype(jnp.int32)
    slot = lax.cond(
        jnp.max(jnp.where(full, 1.0, 0.0)) > 0,
        lambda: jnp.where(full, _victim(position, score, seen, plan.window_size), slot),
        lambda: slot,
    )
    slot = jnp.where(real, slot, -1)
    taken = lax.broadcasted_iota(jnp.int32, position.shape, 2) == slot
    refs.position[...] = jnp.where(taken, seen, position)
    refs.expiry[...] = jnp.where(taken, new_expiry, expiry)
    refs.score[...] = jnp.where(taken, new_score, score)

    lane = lax.broadcasted_iota(jnp.int32, refs.target.shape, 2)
    refs.target[...] = jnp.where(lane == 0, slot, jnp.where(decided < capacity, decided, slot))
    # Addresses of copies must be scalars.
    to_scalars = pltpu.make_async_copy(refs.target, refs.target_smem, refs.ready)
    to_scalars.start()
    to_scalars.wait()

    first_b, first_h = pl.program_id(0) * block_b, pl.program_id(1) * block_h

    def start_of(slot, size):
        return pl.multiple_of(lax.div(slot, size) * size, size) if size < capacity else 0

    def tiles(b, h):
        """Return, for keys and for values, a tile in HBM and its place in VMEM."""
        at = pl.ds(start_of(refs.target_smem[b, h, 0], plan.tile), plan.tile)
        at = (first_b + b, first_h + h, slice(None), at) if plan.lanes else (first_b + b, first_h + h, at)
        return (refs.k_hbm.at[at], refs.k_tile.at[b, h]), (refs.v_hbm.at[at], refs.v_tile.at[b, h])

    def written(b, h):
        """Return a head's copies from VMEM to HBM, each with whether it is needed: no tile is written twice."""
        size = LANES if capacity % LANES == 0 else capacity
        start, other = (start_of(refs.target_smem[b, h, i], size) for i in range(2))
        copies: list[tuple[Any, Any, Any]] = [(True, here, there) for there, here in tiles(b, h)]
        for there, here in (
            (refs.position_hbm, refs.position),
            (refs.expiry_hbm, refs.expiry),
            (refs.score_hbm, refs.score),
        ):
            part = pl.ds(start, size)
            copies.append((True, here.at[b, h, part], there.at[first_b + b, first_h + h, part]))
            if plan.decision_shift == 1 and size < capacity and there is not refs.position_hbm:
                part = pl.ds(other, size)
                copies.append((other != start, here.at[b, h, part], there.at[first_b + b, first_h + h, part]))
        return [(needed, pltpu.make_async_copy(source, target, refs.done)) for needed, source, target in copies]

    def for_heads(body):
        """Run `body(row, head)` for each head whose row has a token."""

        @pl.loop(0, block_b * block_h)
        def _(i):
            b, h = lax.div(i, block_h), lax.rem(i, block_h)
            pl.when(refs.target_smem[b, h, 0] >= 0)(lambda: body(b, h))

    def fetch(b, h):
        for there, here in tiles(b, h):
            pltpu.make_async_copy(there, here, refs.ready).start()

    def fetched(b, h):
        for there, here in tiles(b, h):
            pltpu.make_async_copy(there, here, refs.ready).wait()

    def write(b, h):
        slot = refs.target_smem[b, h, 0]
        for tile_ref, new_ref in ((refs.k_tile, refs.new_k), (refs.v_tile, refs.new_v)):
            new, old = new_ref[b, pl.ds(h, 1)], tile_ref[b, h].astype(jnp.float32)
            index = lax.broadcasted_iota(jnp.int32, old.shape, 1 if plan.lanes else 0)
            here = index == slot - start_of(slot, plan.tile)
            tile_ref[b, h] = jnp.where(here, column(new) if plan.lanes else new, old).astype(tile_ref.dtype)
        for needed, copy in written(b, h):
            pl.when(needed)(copy.start)

    def finish(b, h):
        for needed, copy in written(b, h):
            pl.when(needed)(copy.wait)

    for body in (fetch, fetched, write, finish):
        for_heads(body)
