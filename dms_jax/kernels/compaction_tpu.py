"""Stream compaction on a TPU: the pairs of a chunk that stay go into free slots of the cache, in place.

Free slots and pairs are both in order, so a block of slots receives a contiguous range of the pairs that come: of all combinations
of a block of slots and a block of pairs, only a staircase is not empty. Grid (B K, steps of the staircase); the second axis is
sequential and as long as the longest head needs. A step owns [slots, H] of keys and values. It is bound by HBM, and blocks that
receive nothing are not read. Rows of narrow types are packed in sublanes and cannot be copied one by one, so rows are moved by a product
with a 0/1 matrix, which is exact.
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
    new: Pairs,
    stays: Bool[Array, "B K C"],
    comes: Bool[Array, "B K T"],
    *,
    blocks: PlaceBlocks,
    interpret: bool = False,
) -> Pairs:
    """`core.compact_cache.write_pairs` on the slots of a layer. Keys and values are updated in place where the caller donates them."""
    b, heads, capacity, h = slots.k.shape
    length = new.k.shape[2]
    block_s, block_t = min(blocks.slots, capacity), min(blocks.pairs, length)

    freed, came = (jnp.cumsum(fold_heads(x), axis=-1, dtype=jnp.int32) for x in (~stays, comes))
    receives = ~fold_heads(stays) & (freed <= came[:, -1:])
    slot_rank = jnp.where(receives, freed - 1, NO_PAIR)
    pair_rank = jnp.where(fold_heads(comes), came - 1, NO_SLOT)
    slot_block, pair_block, count = _staircase(freed, came, block_s, block_t)
    pairs = jnp.stack(
        [
            pair_rank,
            fold_heads(new.position),
            fold_heads(new.expiry),
            lax.bitcast_convert_type(fold_heads(new.score), jnp.int32),
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
    new_k, new_v = (in_layout(fold_heads(x.astype(slots.k.dtype))) for x in (new.k, new.v))
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
    )(slot_block, pair_block, count, slot_rank[:, None], pairs, new_k, new_v, old_k, old_v)
    receives = receives.reshape(stays.shape)

    def number(i, old):  # where a slot receives nothing, `moved` is not written
        return jnp.where(receives, lax.bitcast_convert_type(moved[:, i].reshape(stays.shape), old.dtype), old)

    return Pairs(
        unfold_heads(in_layout(moved_k), stays.shape),
        unfold_heads(in_layout(moved_v), stays.shape),
        number(0, slots.position),
        number(1, slots.expiry),
        number(2, slots.score),
    )


def _staircase(freed: Int[Array, "A C"], came: Int[Array, "A T"], block_s: int, block_t: int):
    """The blocks of slots [A N] and of pairs [A N] that meet, step by step, and the number of steps of each head [A].

    `freed` and `came` are inclusive running counts of free slots and of coming pairs. Entries after the last step repeat it."""
    ends = lambda x, size: jnp.concatenate([x[:, size - 1 : x.shape[1] - 1 : size], x[:, -1:]], axis=1)
    came_by = ends(came, block_t)  # [A pair blocks]
    until = jnp.minimum(ends(freed, block_s), came[:, -1:])  # ranks that the blocks of slots up to each one receive
    since = jnp.pad(until, ((0, 0), (1, 0)))[:, :-1]
    block_with = lambda rank: jnp.sum(came_by[:, None] <= rank[..., None], axis=-1, dtype=jnp.int32)
    first = block_with(since)
    steps = jnp.where(until > since, block_with(until - 1) - first + 1, 0)
    end = jnp.cumsum(steps, axis=1, dtype=jnp.int32)
    count = end[:, -1]
    step = jnp.clip(jnp.arange(until.shape[1] + came_by.shape[1] - 1, dtype=jnp.int32)[None], 0, count[:, None] - 1)
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
    slot_rank: Any  # [1, slots]: the rank of the pair that a slot receives, among the pairs that come
    pairs: Any  # [4, pairs]: rank among the pairs that come, position, expiry, bits of the score
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
        came = (pair_rank if plan.lanes else columns[:, :1]) >= 0
        hit = (hit if plan.lanes else column(hit)) > 0
        for ref, new_ref in ((refs.k, refs.new_k), (refs.v, refs.new_v)):
            new = jnp.where(came, new_ref[...].astype(dtype), 0)  # 0 * NaN is NaN
            left, right, axes = (new, one_hot, ((1,), (0,))) if plan.lanes else (one_hot, new, ((0,), (0,)))
            rows = lax.dot_general(
                left, right, (axes, ((), ())), precision=precision, preferred_element_type=jnp.float32
            )
            ref[...] = jnp.where(hit, rows, ref[...].astype(jnp.float32)).astype(ref.dtype)
