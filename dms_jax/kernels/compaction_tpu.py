"""Stream compaction on a TPU: the new pairs of a chunk go into free slots of the cache, in place.

Free slots and new pairs are both in order, so a block of slots receives a contiguous range of the new pairs. If blocks
of slots are the rows and blocks of pairs the columns of a table, those that meet form a staircase. The grid is (B K,
steps of the staircase); its second axis is sequential and as long as the longest head needs. A step owns [slots, H] of
keys and values.

The kernel is bound by HBM, and blocks that receive nothing are not read. Rows of narrow types are packed in sublanes
and cannot be copied one by one, so rows are moved by a product with a 0/1 matrix, which is exact.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Bool, Int

from dms_jax.axes import EXACT, Array
from dms_jax.kernels.block_sizes import PlaceBlocks
from dms_jax.kernels.mosaic_tpu import VMEM_LIMIT, column, in_hbm, slots_in_lanes
from dms_jax.kernels.operands import Pairs, fold_heads, unfold_heads

NO_PAIR, NO_SLOT = -1, -2  # ranks that match nothing


def write_pairs(
    slots: Pairs,
    pairs: Pairs,
    keep: Bool[Array, "B K C"],
    new: Bool[Array, "B K T"],
    *,
    blocks: PlaceBlocks,
    interpret: bool = False,
) -> Pairs:
    """Do `core.compact_cache.write_pairs` on the slots of a layer; donated keys and values are updated in place."""
    b, heads, capacity, h = slots.k.shape
    length = pairs.k.shape[2]
    block_s, block_t = min(blocks.slots, capacity), min(blocks.pairs, length)

    num_free, num_new = (jnp.cumsum(fold_heads(x), axis=-1, dtype=jnp.int32) for x in (~keep, new))
    receives = ~fold_heads(keep) & (num_free <= num_new[:, -1:])
    slot_rank = jnp.where(receives, num_free - 1, NO_PAIR)
    pair_rank = jnp.where(fold_heads(new), num_new - 1, NO_SLOT)
    slot_block, pair_block, count = _staircase(num_free, num_new, block_s, block_t)
    pair_numbers = jnp.stack(
        [
            pair_rank,
            fold_heads(pairs.position),
            fold_heads(pairs.expiry),
            lax.bitcast_convert_type(fold_heads(pairs.score), jnp.int32),
        ],
        axis=1,
    )  # [B K, 4, T]

    # The blocks of a step; the index maps get head and step, then the scalars.
    slots_of = lambda head, i, slot_block, pair_block, count: slot_block[head, i]
    pairs_of = lambda head, i, slot_block, pair_block, count: pair_block[head, i]
    lanes = slots_in_lanes(h)

    def rows_spec(size, which):
        if lanes:
            return pl.BlockSpec((None, h, size), lambda *at: (at[0], 0, which(*at)))
        return pl.BlockSpec((None, size, h), lambda *at: (at[0], which(*at), 0))

    numbers_spec = lambda number, size, which: pl.BlockSpec((None, number, size), lambda *at: (at[0], 0, which(*at)))
    in_layout = lambda x: x.swapaxes(-1, -2) if lanes else x
    new_k, new_v = (in_layout(fold_heads(x.astype(slots.k.dtype))) for x in (pairs.k, pairs.v))
    old_k, old_v = (in_hbm(in_layout(fold_heads(x)), interpret) for x in (slots.k, slots.v))
    old_spec = rows_spec(block_s, slots_of)
    moved_k, moved_v, moved = pl.pallas_call(
        partial(_kernel, Plan(length, lanes)),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(b * heads, jnp.maximum(jnp.max(count), 1)),
            in_specs=[
                numbers_spec(1, block_s, slots_of),
                numbers_spec(4, block_t, pairs_of),
                rows_spec(block_t, pairs_of),
                rows_spec(block_t, pairs_of),
                old_spec,
                old_spec,
            ],
            out_specs=[old_spec, old_spec, numbers_spec(3, block_s, slots_of)],
        ),
        out_shape=[
            jax.ShapeDtypeStruct(old_k.shape, slots.k.dtype),
            jax.ShapeDtypeStruct(old_v.shape, slots.v.dtype),
            jax.ShapeDtypeStruct((b * heads, 3, capacity), jnp.int32),
        ],
        input_output_aliases={7: 0, 8: 1},
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=VMEM_LIMIT
        ),
        interpret=interpret,
        name="write_pairs",
    )(slot_block, pair_block, count, slot_rank[:, None], pair_numbers, new_k, new_v, old_k, old_v)
    receives = receives.reshape(keep.shape)

    def number(i, old):  # `moved` is not written for slots that receive nothing
        return jnp.where(receives, lax.bitcast_convert_type(moved[:, i].reshape(keep.shape), old.dtype), old)

    return Pairs(
        unfold_heads(in_layout(moved_k), keep.shape),
        unfold_heads(in_layout(moved_v), keep.shape),
        number(0, slots.position),
        number(1, slots.expiry),
        number(2, slots.score),
    )


def _staircase(num_free: Int[Array, "A C"], num_new: Int[Array, "A T"], block_s: int, block_t: int):
    """Return the blocks of slots [A N] and of pairs [A N] that meet in each step, and the number of steps per head [A].

    `num_free` and `num_new` are inclusive running counts of free slots and of new pairs. Entries
    after the last step repeat it.
    """
    ends = lambda x, size: jnp.concatenate([x[:, size - 1 : x.shape[1] - 1 : size], x[:, -1:]], axis=1)
    new_until = ends(num_new, block_t)  # [A pair blocks]
    until = jnp.minimum(
        ends(num_free, block_s), num_new[:, -1:]
    )  # pairs that the blocks of slots up to each one receive
    since = jnp.pad(until, ((0, 0), (1, 0)))[:, :-1]
    block_with = lambda rank: jnp.sum(new_until[:, None] <= rank[..., None], axis=-1, dtype=jnp.int32)
    first = block_with(since)
    steps = jnp.where(until > since, block_with(until - 1) - first + 1, 0)
    end = jnp.cumsum(steps, axis=1, dtype=jnp.int32)
    count = end[:, -1]
    step = jnp.clip(jnp.arange(until.shape[1] + new_until.shape[1] - 1, dtype=jnp.int32)[None], 0, count[:, None] - 1)
    slot_block = jnp.sum(end[:, None] <= step[..., None], axis=-1, dtype=jnp.int32)
    mine = slot_block[..., None] == jnp.arange(until.shape[1])[None, None]
    pair_block = step + jnp.sum(jnp.where(mine, (first - (end - steps))[:, None], 0), axis=-1, dtype=jnp.int32)
    return slot_block, jnp.maximum(pair_block, 0), count


class Plan(NamedTuple):
    """Static facts of a call."""

    length: int  # pairs of the chunk
    lanes: bool  # `slots_in_lanes`: keys and values are [H, slots] and [H, pairs]


class Refs(NamedTuple):
    """One step's blocks."""

    slot_block: Any  # [B*K, N], scalars: the staircase
    pair_block: Any  # [B*K, N], scalars
    num_steps: Any  # [B*K], scalars
    slot_rank: Any  # [1, slots]: the rank of the pair that a slot receives, among the new pairs
    pairs: Any  # [4, pairs]: rank among the new pairs, position, expiry, bits of the score
    new_k: Any  # [pairs, H]
    new_v: Any  # [pairs, H]
    old_k: Any  # [slots, H]
    old_v: Any  # [slots, H]
    k: Any  # [slots, H], the same memory as old_k
    v: Any  # [slots, H]
    moved: Any  # [3, slots]: position, expiry, bits of the score


def _kernel(plan: Plan, *arrays) -> None:
    refs = Refs(*arrays)
    head, i = pl.program_id(0), pl.program_id(1)
    slot_block = refs.slot_block[head, i]

    @pl.when((i == 0) | (slot_block != refs.slot_block[head, jnp.maximum(i - 1, 0)]))
    def _():
        refs.k[...], refs.v[...] = refs.old_k[...], refs.old_v[...]
        refs.moved[...] = jnp.zeros(refs.moved.shape, jnp.int32)

    @pl.when(i < refs.num_steps[head])
    def _():
        block_t = refs.pairs.shape[1]
        inside = refs.pair_block[head, i] * block_t + lax.broadcasted_iota(jnp.int32, (1, block_t), 1) < plan.length
        pairs = refs.pairs[...]
        pair_rank = jnp.where(inside, pairs[:1], NO_SLOT)
        columns = jnp.concatenate([jnp.broadcast_to(pair_rank, (5, block_t)), pairs[1:]], axis=0).T  # [pairs, 8]
        match = columns[:, :1] == refs.slot_rank[...]  # [pairs, slots]
        hit = jnp.max(jnp.where(match, 1.0, 0.0), axis=0, keepdims=True)
        for row in range(3):
            refs.moved[row : row + 1] += jnp.sum(
                jnp.where(match, columns[:, 5 + row : 6 + row], 0), axis=0, keepdims=True
            )

        dtype = jnp.float32 if refs.k.dtype == jnp.float32 else jnp.bfloat16  # bfloat16 holds fp8 exactly
        precision = EXACT if dtype == jnp.float32 else None
        one_hot = jnp.where(match, 1.0, 0.0).astype(dtype)
        is_new = (pair_rank if plan.lanes else columns[:, :1]) >= 0
        hit = (hit if plan.lanes else column(hit)) > 0
        for ref, new_ref in ((refs.k, refs.new_k), (refs.v, refs.new_v)):
            new = jnp.where(is_new, new_ref[...].astype(dtype), 0)  # 0 * NaN is NaN
            left, right, axes = (new, one_hot, ((1,), (0,))) if plan.lanes else (one_hot, new, ((0,), (0,)))
            rows = lax.dot_general(
                left, right, (axes, ((), ())), precision=precision, preferred_element_type=jnp.float32
            )
            ref[...] = jnp.where(hit, rows, ref[...].astype(jnp.float32)).astype(ref.dtype)
