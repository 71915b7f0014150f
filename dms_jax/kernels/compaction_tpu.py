"""Stream compaction of a chunk's pairs into the free slots of a cache, on TPU, in place.

Free slots and pairs are both in order, so a block of slots receives a contiguous range of the pairs that come: of the pairs of
blocks (slots x pairs) only a staircase is not empty. Grid (B K, steps of the staircase), the second axis sequential and as long as
the longest head needs. A step owns [slots, H] of keys and values; it is bound by HBM, and blocks that receive nothing are not read.
Rows of few bits are packed in sublanes and cannot be copied one by one: they move by a product with a 0/1 matrix, which is exact.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Bool, Float, Int

from dms_jax.axes import EXACT, Array
from dms_jax.kernels.block_sizes import PlaceBlocks
from dms_jax.kernels.mosaic_tpu import VMEM_LIMIT, column, in_hbm, slots_in_lanes

NO_PAIR, NO_SLOT = -1, -2  # ranks that match nothing


def write_pairs(
    k: Float[Array, "B K C H"],
    v: Float[Array, "B K C H"],
    position: Int[Array, "B K C"],
    expiry: Int[Array, "B K C"],
    score: Float[Array, "B K C"],
    new_k: Float[Array, "B K T H"],
    new_v: Float[Array, "B K T H"],
    new_position: Int[Array, "B K T"],
    new_expiry: Int[Array, "B K T"],
    new_score: Float[Array, "B K T"],
    stays: Bool[Array, "B K C"],
    comes: Bool[Array, "B K T"],
    *,
    blocks: PlaceBlocks,
    interpret: bool = False,
) -> tuple[Array, Array, Array, Array, Array]:
    """The five arrays of the layer after `core.compact_cache.write_pairs`. Keys and values are updated in place where they are donated."""
    b, heads, capacity, h = k.shape
    length = new_k.shape[2]
    block_s, block_t = min(blocks.slots, capacity), min(blocks.pairs, length)
    folded = lambda x: x.reshape(b * heads, *x.shape[2:])

    freed, came = (jnp.cumsum(folded(x), axis=-1, dtype=jnp.int32) for x in (~stays, comes))
    receives = ~folded(stays) & (freed <= came[:, -1:])
    slot_rank = jnp.where(receives, freed - 1, NO_PAIR)
    pair_rank = jnp.where(folded(comes), came - 1, NO_SLOT)
    slot_block, pair_block, count = _staircase(freed, came, block_s, block_t)
    pairs = jnp.stack(
        [pair_rank, folded(new_position), folded(new_expiry), lax.bitcast_convert_type(folded(new_score), jnp.int32)],
        axis=1,
    )  # [B K, 4, T]

    # Which blocks a step is about; `at` are head and step, then the scalars.
    slots_of = lambda head, i, slot_block, pair_block, count: slot_block[head, i]
    pairs_of = lambda head, i, slot_block, pair_block, count: pair_block[head, i]
    lanes = slots_in_lanes(h)

    def rows_spec(size, which):
        if lanes:
            return pl.BlockSpec((None, h, size), lambda *at: (at[0], 0, which(*at)))
        return pl.BlockSpec((None, size, h), lambda *at: (at[0], which(*at), 0))

    numbers_spec = lambda number, size, which: pl.BlockSpec((None, number, size), lambda *at: (at[0], 0, which(*at)))
    in_layout = lambda x: x.swapaxes(-1, -2) if lanes else x
    new_k, new_v = (in_layout(folded(x.astype(k.dtype))) for x in (new_k, new_v))
    old_k, old_v = (in_hbm(in_layout(folded(x)), interpret) for x in (k, v))
    old_spec = rows_spec(block_s, slots_of)
    moved_k, moved_v, moved = pl.pallas_call(
        partial(_kernel, length=length, lanes=lanes),
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
            jax.ShapeDtypeStruct(old_k.shape, k.dtype),
            jax.ShapeDtypeStruct(old_v.shape, v.dtype),
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
    # Where nothing is received, `moved` is not written.
    number = lambda i, old: jnp.where(
        receives, lax.bitcast_convert_type(moved[:, i].reshape(stays.shape), old.dtype), old
    )
    return (
        in_layout(moved_k).reshape(k.shape),
        in_layout(moved_v).reshape(v.shape),
        number(0, position),
        number(1, expiry),
        number(2, score),
    )


def _staircase(freed: Int[Array, "A C"], came: Int[Array, "A T"], block_s: int, block_t: int):
    """The blocks of slots [A N] and of pairs [A N] that meet, in order, and how many such steps each head has [A].

    `freed` and `came` count free slots and coming pairs up to and including each. What follows the last step repeats it."""
    ends = lambda x, size: jnp.concatenate([x[:, size - 1 : x.shape[1] - 1 : size], x[:, -1:]], axis=1)
    came_by = ends(came, block_t)  # [A pair blocks]
    until = jnp.minimum(ends(freed, block_s), came[:, -1:])  # ranks that the blocks of slots up to each one receive
    since = jnp.pad(until, ((0, 0), (1, 0)))[:, :-1]
    block_with = lambda rank: jnp.sum(came_by[:, None] <= rank[..., None], axis=-1, dtype=jnp.int32)
    first = block_with(since)
    steps = jnp.where(until > since, block_with(until - 1) - first + 1, 0)
    end = jnp.cumsum(steps, axis=1, dtype=jnp.int32)
    count = end[:, -1]
    step = jnp.clip(jnp.arange(until.shape[1] + came_by.shape[1] - 1, dtype=jnp.int32), 0, count[:, None] - 1)
    slot_block = jnp.sum(end[:, None] <= step[..., None], axis=-1, dtype=jnp.int32)
    mine = slot_block[..., None] == jnp.arange(until.shape[1])
    pair_block = step + jnp.sum(jnp.where(mine, (first - (end - steps))[:, None], 0), axis=-1, dtype=jnp.int32)
    return slot_block, jnp.maximum(pair_block, 0), count


def _kernel(
    slot_block_ref,
    pair_block_ref,
    count_ref,  # [B K, N] x2, [B K]: the staircase
    slot_rank_ref,  # [1, slots]: which of the pairs that come it receives
    pairs_ref,  # [4, pairs]: rank among those that come; position, expiry, bits of the score
    new_k_ref,
    new_v_ref,  # [pairs, H] x2, or [H, pairs] x2 with slots in lanes
    old_k_ref,
    old_v_ref,  # [slots, H] x2, or [H, slots] x2
    k_ref,
    v_ref,
    moved_ref,  # the same, in place; [3, slots]: position, expiry, bits of the score
    *,
    length,
    lanes,
):
    head, i = pl.program_id(0), pl.program_id(1)
    slot_block = slot_block_ref[head, i]

    @pl.when((i == 0) | (slot_block != slot_block_ref[head, jnp.maximum(i - 1, 0)]))
    def _():
        k_ref[...], v_ref[...] = old_k_ref[...], old_v_ref[...]
        moved_ref[...] = jnp.zeros(moved_ref.shape, jnp.int32)

    @pl.when(i < count_ref[head])
    def _():
        block_t = pairs_ref.shape[1]
        inside = pair_block_ref[head, i] * block_t + lax.broadcasted_iota(jnp.int32, (1, block_t), 1) < length
        pairs = pairs_ref[...]
        pair_rank = jnp.where(inside, pairs[:1], NO_SLOT)
        columns = jnp.concatenate([jnp.broadcast_to(pair_rank, (5, block_t)), pairs[1:]], axis=0).T  # [pairs, 8]
        match = columns[:, :1] == slot_rank_ref[...]  # [pairs, slots]
        hit = jnp.max(jnp.where(match, 1.0, 0.0), axis=0, keepdims=True)
        for row in range(3):
            moved_ref[row : row + 1] += jnp.sum(
                jnp.where(match, columns[:, 5 + row : 6 + row], 0), axis=0, keepdims=True
            )

        dtype = jnp.float32 if k_ref.dtype == jnp.float32 else jnp.bfloat16  # which holds fp8 exactly
        precision = EXACT if dtype == jnp.float32 else None
        one_hot = jnp.where(match, 1.0, 0.0).astype(dtype)
        came = (pair_rank if lanes else columns[:, :1]) >= 0
        hit = (hit if lanes else column(hit)) > 0
        for ref, new_ref in ((k_ref, new_k_ref), (v_ref, new_v_ref)):
            new = jnp.where(came, new_ref[...].astype(dtype), 0)  # 0 * NaN is NaN
            left, right, axes = (new, one_hot, ((1,), (0,))) if lanes else (one_hot, new, ((0,), (0,)))
            rows = lax.dot_general(
                left, right, (axes, ((), ())), precision=precision, preferred_element_type=jnp.float32
            )
            ref[...] = jnp.where(hit, rows, ref[...].astype(jnp.float32)).astype(ref.dtype)
