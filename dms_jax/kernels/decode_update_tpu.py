"""What one decoded token does to a layer of the cache, on TPU, in one kernel and in place: RoPE, apply_pending what was pending, append.

Grid (blocks of rows of the batch, blocks of heads); a step owns [rows, heads, C] of position, expiry and score in VMEM, finds the
slot of each of its heads, and copies to and from HBM only the tiles of keys, values and book-keeping that hold it. It is bound by
reading the book-keeping, and by the latency of those copies, which all heads of a step share.
"""

from functools import partial
from typing import Any

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

SUBLANES = {1: 32, 2: 16, 4: 8}  # rows of a tile, by the bytes of a number
HEADS_AT_ONCE = 64  # whose copies overlap
NUMBERS_LIMIT = 20 * 2**20  # bytes of VMEM for position, expiry and score of a step; keys and values take the rest


def decode_update(
    q: Float[Array, "B N H"],
    k: Float[Array, "B K H"],
    v: Float[Array, "B K H"],
    cos: Float[Array, "B H/2"],
    sin: Float[Array, "B H/2"],
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
) -> tuple[Array, Array, Array, Array, Array, Array, Array]:
    """The rotated queries, the layer's five arrays after `apply_pending` and `append` of one token, and which heads [B K] pushed a pair out.

    `k` and `v` are not rotated yet; `decision_shift` None marks nothing. The arrays are updated in place where they are donated.
    """
    b, heads, capacity, h = k_cache.shape
    lanes, itemsize = slots_in_lanes(h), k_cache.dtype.itemsize
    block_h = 8 if heads % 8 == 0 else heads
    fits = min(HEADS_AT_ONCE, NUMBERS_LIMIT // (9 * 4 * capacity)) // block_h
    block_b = max(size for size in range(1, b + 1) if b % size == 0 and size <= max(fits, 1))
    along = LANES if lanes else SUBLANES[itemsize]
    tile = along if capacity % along == 0 else capacity  # whole heads where tiles do not divide them
    if (size := 2 * block_b * block_h * tile * h * itemsize) > VMEM_LIMIT // 2 and not interpret:
        raise NotImplementedError(
            f"tiles of {capacity} slots would take {size / 2**20:.0f} MiB; make the capacity a multiple of {along}"
        )

    seen, count = (jnp.broadcast_to(x[:, None], (b, heads)) for x in (seen, count))
    numbers = jnp.stack(
        [seen, count, lax.bitcast_convert_type(logit, jnp.int32), (logit > threshold).astype(jnp.int32)], axis=-1
    )
    in_layout = lambda x: x.swapaxes(2, 3) if lanes else x
    cache = tuple(in_hbm(in_layout(x), interpret) for x in (k_cache, v_cache))
    by_heads = lambda *shape: pl.BlockSpec((block_b, *shape), lambda i, j: (i, j, 0))
    angle_spec = pl.BlockSpec((block_b, 1, h // 2), lambda i, j: (i, 0, 0))
    hbm_spec = pl.BlockSpec(memory_space=pltpu.HBM)
    query_heads = q.shape[1] // heads * block_h
    slots = (block_b, block_h, capacity)
    tile_shape = (h, tile) if lanes else (tile, h)
    out = pl.pallas_call(
        partial(_kernel, window_size=window_size, decision_shift=decision_shift, lanes=lanes, tile=tile),
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
            for x in (q, jax.ShapeDtypeStruct((b, heads, 1), jnp.int32), position, expiry, score, *cache)
        ],
        scratch_shapes=[
            pltpu.VMEM(slots, jnp.int32),
            pltpu.VMEM(slots, jnp.int32),
            pltpu.VMEM(slots, jnp.float32),
            *[pltpu.VMEM((block_b, block_h, h), jnp.float32)] * 2,
            *[pltpu.VMEM((block_b, block_h, *tile_shape), k_cache.dtype)] * 2,
            pltpu.VMEM((block_b, block_h, LANES), jnp.int32),
            pltpu.SMEM((block_b, block_h, LANES), jnp.int32),
            pltpu.SemaphoreType.DMA,
            pltpu.SemaphoreType.DMA,
        ],
        input_output_aliases={6: 2, 7: 3, 8: 4, 9: 5, 10: 6},
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel"), vmem_limit_bytes=VMEM_LIMIT),
        interpret=interpret,
        name="decode_update",
    )(numbers, cos[:, None], sin[:, None], q, k, v, position, expiry, score, *cache)
    q, forced, position, expiry, score, k_cache, v_cache = out
    return q, in_layout(k_cache), in_layout(v_cache), position, expiry, score, forced[:, :, 0]


def _settled(numbers, position, expiry, score, window_size, decision_shift):
    """Expiry and score of the slots once this token has decided, which slot it decided about (C: none), expiry and score of its pair."""
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
    """The lowest slot that is true; C where none is."""
    lane = lax.broadcasted_iota(jnp.int32, slots.shape, 2)
    return jnp.min(jnp.where(slots, lane, slots.shape[2]), axis=2, keepdims=True)


def _victim(position, score, seen, window_size):
    """`compact_cache.victim` of full heads. The new pair is inside the window and younger than all others: it is never chosen."""
    outside = seen > position + window_size
    worst = jnp.max(jnp.where(outside, score, -jnp.inf), axis=2, keepdims=True)
    some = jnp.max(jnp.where(outside, 1.0, 0.0), axis=2, keepdims=True) > 0
    oldest_of = jnp.where(jnp.logical_not(some) | (outside & (score == worst)), position, EMPTY)
    return _lowest(oldest_of == jnp.min(oldest_of, axis=2, keepdims=True))


def _kernel(
    numbers_ref,  # [rows, heads, 4]: tokens seen, tokens now (0 or 1), bits of the logit, is it marked
    cos_ref,
    sin_ref,  # [rows, 1, H/2] x2
    q_ref,
    k_ref,
    v_ref,  # [rows, G heads, H], [rows, heads, H] x2
    old_position_ref,
    old_expiry_ref,
    old_score_ref,  # [rows, heads, C] x3
    _old_k_ref,
    _old_v_ref,  # the outputs are the same memory
    q_out_ref,
    forced_ref,  # [rows, G heads, H], [rows, heads, 1]
    position_hbm,
    expiry_hbm,
    score_hbm,
    k_hbm,
    v_hbm,  # [B, K, C] x3, [B, K, C, H] x2 or [B, K, H, C] x2
    position_ref,
    expiry_ref,
    score_ref,  # [rows, heads, C] x3: after this token
    new_k_ref,
    new_v_ref,  # [rows, heads, H] x2
    k_tile_ref,
    v_tile_ref,  # [rows, heads, tile, H] x2 or [rows, heads, H, tile] x2
    target_ref,
    target_smem,  # [rows, heads, 128] x2: the slot that the pair takes (-1: none), the one decided about
    ready,
    done,
    *,
    window_size,
    decision_shift,
    lanes,
    tile,
):
    block_b, block_h, capacity = position_ref.shape
    cos, sin = cos_ref[...], sin_ref[...]
    q_out_ref[...] = apply_rope(q_ref[...], cos, sin)
    new_k_ref[...] = apply_rope(k_ref[...], cos, sin).astype(jnp.float32)
    new_v_ref[...] = v_ref[...].astype(jnp.float32)

    numbers, position = numbers_ref[...], old_position_ref[...]
    seen, real = numbers[..., 0:1], numbers[..., 1:2] > 0
    expiry, score, decided, new_expiry, new_score = _settled(
        numbers, position, old_expiry_ref[...], old_score_ref[...], window_size, decision_shift
    )
    slot = _lowest(expiry < seen)
    full = real & (slot == capacity)
    forced_ref[...] = full.astype(jnp.int32)
    slot = lax.cond(
        jnp.max(jnp.where(full, 1.0, 0.0)) > 0,
        lambda: jnp.where(full, _victim(position, score, seen, window_size), slot),
        lambda: slot,
    )
    slot = jnp.where(real, slot, -1)
    taken = lax.broadcasted_iota(jnp.int32, position.shape, 2) == slot
    position_ref[...] = jnp.where(taken, seen, position)
    expiry_ref[...] = jnp.where(taken, new_expiry, expiry)
    score_ref[...] = jnp.where(taken, new_score, score)

    lane = lax.broadcasted_iota(jnp.int32, target_ref.shape, 2)
    target_ref[...] = jnp.where(lane == 0, slot, jnp.where(decided < capacity, decided, slot))
    to_scalars = pltpu.make_async_copy(target_ref, target_smem, ready)  # the addresses of the copies that follow
    to_scalars.start()
    to_scalars.wait()

    first_b, first_h = pl.program_id(0) * block_b, pl.program_id(1) * block_h

    def start_of(slot, size):
        return pl.multiple_of(lax.div(slot, size) * size, size) if size < capacity else 0

    def tiles(b, h):
        """Keys and values: what is in HBM, and what is here."""
        at = pl.ds(start_of(target_smem[b, h, 0], tile), tile)
        at = (first_b + b, first_h + h, slice(None), at) if lanes else (first_b + b, first_h + h, at)
        return (k_hbm.at[at], k_tile_ref.at[b, h]), (v_hbm.at[at], v_tile_ref.at[b, h])

    def written(b, h):
        """The copies out of a head, each with whether it is needed: a tile is written once."""
        size = LANES if capacity % LANES == 0 else capacity
        start, other = (start_of(target_smem[b, h, i], size) for i in range(2))
        copies: list[tuple[Any, Any, Any]] = [(True, here, there) for there, here in tiles(b, h)]
        for there, here in ((position_hbm, position_ref), (expiry_hbm, expiry_ref), (score_hbm, score_ref)):
            part = pl.ds(start, size)
            copies.append((True, here.at[b, h, part], there.at[first_b + b, first_h + h, part]))
            if decision_shift == 1 and size < capacity and there is not position_hbm:
                part = pl.ds(other, size)
                copies.append((other != start, here.at[b, h, part], there.at[first_b + b, first_h + h, part]))
        return [(needed, pltpu.make_async_copy(source, target, done)) for needed, source, target in copies]

    def for_heads(body):
        """`body(row, head)` for each head whose row has a token."""

        @pl.loop(0, block_b * block_h)
        def _(i):
            b, h = lax.div(i, block_h), lax.rem(i, block_h)
            pl.when(target_smem[b, h, 0] >= 0)(lambda: body(b, h))

    def fetch(b, h):
        for there, here in tiles(b, h):
            pltpu.make_async_copy(there, here, ready).start()

    def fetched(b, h):
        for there, here in tiles(b, h):
            pltpu.make_async_copy(there, here, ready).wait()

    def write(b, h):
        slot = target_smem[b, h, 0]
        for tile_ref, new_ref in ((k_tile_ref, new_k_ref), (v_tile_ref, new_v_ref)):
            new, old = new_ref[b, pl.ds(h, 1)], tile_ref[b, h].astype(jnp.float32)
            here = lax.broadcasted_iota(jnp.int32, old.shape, 1 if lanes else 0) == slot - start_of(slot, tile)
            tile_ref[b, h] = jnp.where(here, column(new) if lanes else new, old).astype(tile_ref.dtype)
        for needed, copy in written(b, h):
            pl.when(needed)(copy.start)

    def finish(b, h):
        for needed, copy in written(b, h):
            pl.when(needed)(copy.wait)

    for body in (fetch, fetched, write, finish):
        for_heads(body)
