"""Attention of query rows over the slots of a compact cache on a TPU, for decode and for chunks.

One pass goes over the slots in use. The grid is (cores, B K / cores, blocks of rows, blocks of slots); its last axis is
only as long as the longest head needs. A step has [keys, H] of keys and values, and the accumulators of its rows stay
in VMEM. Decode is bound by HBM, long chunks by the MXU.
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
from dms_jax.core.slot_attention import SoftmaxPart
from dms_jax.kernels.block_sizes import SlotBlocks
from dms_jax.kernels.mosaic_tpu import CORES, LANES, VMEM_LIMIT, OnlineSoftmax, in_hbm, slots_in_lanes
from dms_jax.kernels.operands import fold_heads

FIRST, LAST = jnp.iinfo(jnp.int32).min, jnp.iinfo(jnp.int32).max


def attend_slots(
    rows: Float[Array, "B K R H"],
    q_position: Int[Array, "B R"],
    keys: Float[Array, "B K S H"],
    values: Float[Array, "B K S H"],
    k_position: Int[Array, "B K S"],
    expiry: Int[Array, "B K S"],
    used: Int[Array, "B K"],
    *,
    blocks: SlotBlocks,
    interpret: bool = False,
) -> SoftmaxPart:
    """Return the softmax of each row over the slots that it sees, as one part [1 B K R]; see `core.slot_attention`.

    Slots from `used` on are not read, except for the rest of the last block.
    """
    b, heads, num_rows, h = rows.shape
    slots = keys.shape[2]
    block_r, block_s = min(blocks.rows, num_rows), min(blocks.keys, slots)
    row_blocks, pad = pl.cdiv(num_rows, block_r), -num_rows % block_r
    rows = fold_heads(jnp.pad(rows, ((0, 0), (0, 0), (0, pad), (0, 0))))
    # Padding rows get a position before all others, so they see nothing and do not widen the range of their block.
    low, high = (
        limit(
            jnp.pad(q_position, ((0, 0), (0, pad)), constant_values=fill).reshape(b, row_blocks, block_r), axis=-1
        ).reshape(-1)
        for limit, fill in ((jnp.min, LAST), (jnp.max, FIRST))
    )
    q_position = jnp.pad(q_position, ((0, 0), (0, pad)), constant_values=FIRST)[:, None]
    used = used.reshape(-1)
    cores = CORES if b * heads % CORES == 0 else 1
    heads_per_core = b * heads // cores

    def rows_of(core, head, i, j, used, low, high):
        return core * heads_per_core + head, i, 0

    def slots_of(core, head, i, j, used, low, high):
        # Steps after the last block in use name the block that is needed next, so that it is fetched early.
        head = core * heads_per_core + head
        here, more_rows = j * block_s < used[head], i + 1 < row_blocks
        following = jnp.where(more_rows, head, jnp.minimum(head + 1, b * heads - 1))
        return jnp.where(here, head, following), jnp.where(here, j, 0)

    # Copies of numbers take full rows of lanes, so these small arrays are padded if blocks do not divide the slots.
    block_n = block_s if block_s < slots else pl.cdiv(slots, LANES) * LANES
    k_position, expiry = (jnp.pad(x, ((0, 0), (0, 0), (0, -slots % block_n))) for x in (k_position, expiry))
    lanes = slots_in_lanes(h)
    if lanes:
        keys, values = keys.swapaxes(2, 3), values.swapaxes(2, 3)
        slot_spec = pl.BlockSpec((None, h, block_s), lambda *at: (slots_of(*at)[0], 0, slots_of(*at)[1]))
    else:
        slot_spec = pl.BlockSpec((None, block_s, h), lambda *at: (*slots_of(*at), 0))
    steps = jnp.maximum(lax.div(jnp.max(used) + block_s - 1, block_s), 1)
    acc, statistics = pl.pallas_call(
        partial(_kernel, Plan(heads, lanes)),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(cores, heads_per_core, row_blocks, steps),
            in_specs=[
                pl.BlockSpec(
                    (None, 1, block_r),
                    lambda core, head, i, j, *_: (lax.div(core * heads_per_core + head, heads), 0, i),
                ),
                pl.BlockSpec((None, block_r, h), rows_of),
                slot_spec,
                slot_spec,
                pl.BlockSpec(memory_space=pltpu.HBM),
                pl.BlockSpec(memory_space=pltpu.HBM),
            ],
            out_specs=[
                pl.BlockSpec((None, block_r, h), rows_of),
                pl.BlockSpec((None, 2, block_r), lambda core, head, i, j, *_: (core * heads_per_core + head, 0, i)),
            ],
            scratch_shapes=[
                *[pltpu.VMEM((block_r, LANES), dtype) for dtype in (jnp.int32, jnp.float32, jnp.float32)],
                pltpu.VMEM((2, 2, 1, block_n), jnp.int32),
                pltpu.SemaphoreType.DMA((2,)),
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct(rows.shape, jnp.float32),
            jax.ShapeDtypeStruct((b * heads, 2, rows.shape[1]), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary", "arbitrary"), vmem_limit_bytes=VMEM_LIMIT
        ),
        interpret=interpret,
        name="attend_slots",
    )(
        used,
        low,
        high,
        q_position,
        rows,
        *(in_hbm(fold_heads(x), interpret) for x in (keys, values)),
        k_position,
        expiry,
    )
    part = lambda x: x[:, :num_rows].reshape(1, b, heads, num_rows, *x.shape[2:])
    return SoftmaxPart(part(statistics[:, 0]), part(statistics[:, 1]), part(acc))


class Plan(NamedTuple):
    """Static facts of a call."""

    heads: int  # KV heads per batch row
    lanes: bool  # `slots_in_lanes`: keys and values are [H, keys]


class Refs(NamedTuple):
    """Scalars, blocks of a step in VMEM, arrays in HBM, and scratch memory."""

    used: Any  # [B*K]: slots in use
    low: Any  # [B*blocks of rows]: first position of each block of rows
    high: Any  # [B*blocks of rows]: last position
    q_position: Any  # [1, rows]
    rows: Any  # [rows, H]
    keys: Any  # [keys, H]; dead slots may hold anything, even NaN
    values: Any  # [keys, H]
    k_position_hbm: Any  # [B, K, S]
    expiry_hbm: Any  # [B, K, S]
    acc: Any  # [rows, H]
    statistics: Any  # [2, rows]: max and sum
    column: Any  # [rows, 128], all lanes equal: position of each row
    max: Any  # [rows, 128], all lanes equal: online softmax
    sum: Any
    slots: Any  # [2, 2, 1, keys padded to full lanes]: position and expiry, for this step and the next
    ready: Any


def _kernel(plan: Plan, *arrays) -> None:
    refs = Refs(*arrays)
    core, local, i, j = (pl.program_id(axis) for axis in range(4))
    heads_per_core, row_blocks, steps = (pl.num_programs(axis) for axis in (1, 2, 3))
    head = core * heads_per_core + local
    block_s = refs.keys.shape[1 if plan.lanes else 0]
    softmax = OnlineSoftmax(refs.acc, refs.max, refs.sum)
    used, start = refs.used[head], j * block_s

    # Position and expiry of a block are one row each, less than a tile, so they are copied explicitly, one step ahead.
    parity = lax.rem((local * row_blocks + i) * steps + j, 2)

    def copied(head, j, parity, do):
        size = refs.slots.shape[3]
        for which, hbm in enumerate((refs.k_position_hbm, refs.expiry_hbm)):
            source = hbm.at[
                lax.div(head, plan.heads), lax.rem(head, plan.heads), pl.ds(pl.multiple_of(j * size, size), size)
            ]
            do(pltpu.make_async_copy(source, refs.slots.at[parity, which, 0], refs.ready.at[parity]))

    @pl.when((local == 0) & (i == 0) & (j == 0) & (start < used))
    def _():
        copied(head, j, parity, lambda copy: copy.start())

    same_rows, same_head = j + 1 < steps, i + 1 < row_blocks
    next_local = jnp.where(same_rows | same_head, local, local + 1)
    next_head, next_j = (
        core * heads_per_core + jnp.minimum(next_local, heads_per_core - 1),
        jnp.where(same_rows, j + 1, 0),
    )

    @pl.when((next_local < heads_per_core) & (next_j * block_s < refs.used[next_head]))
    def _():
        copied(next_head, next_j, 1 - parity, lambda copy: copy.start())

    @pl.when(j == 0)
    def _():
        refs.column[...] = jnp.broadcast_to(refs.q_position[...], (LANES, refs.rows.shape[0])).T
        softmax.clear()

    attend = lambda visible: softmax.add(refs.rows[...], refs.keys[...], refs.values[...], visible, plan.lanes)

    @pl.when(start < used)
    def _():
        copied(head, j, parity, lambda copy: copy.wait())
        block = lax.div(head, plan.heads) * row_blocks + i
        low, high = refs.low[block], refs.high[block]
        position, expiry = refs.slots[parity, 0][:, :block_s], refs.slots[parity, 1][:, :block_s]
        fresh = start + lax.broadcasted_iota(jnp.int32, (1, block_s), 1) < used
        some_see = fresh & (position <= high) & (low <= expiry)
        all_see = fresh & (position <= low) & (high <= expiry)
        every_slot = jnp.min(jnp.where(all_see, 1.0, 0.0)) > 0

        @pl.when(every_slot)
        def _():
            attend(None)

        @pl.when(jnp.logical_not(every_slot) & (jnp.max(jnp.where(some_see, 1.0, 0.0)) > 0))
        def _():
            at = refs.column[:, :1]
            attend(fresh & (position <= at) & (at <= expiry))

    @pl.when(j == steps - 1)
    def _():
        softmax.write(refs.statistics)
