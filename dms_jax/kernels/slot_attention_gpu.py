"""Attention of query rows over the slots of a compact cache on Hopper: decode and chunked prefill in one kernel.

`row_attention_gpu` has the grid and the softmax. Here is what slots add: their positions and expiries are copied with
their keys and values, and decide which rows see them.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Float, Int

from dms_jax.axes import Array
from dms_jax.core.slot_attention import SoftmaxPart
from dms_jax.core.visibility import NEVER
from dms_jax.kernels.block_sizes import SlotBlocks
from dms_jax.kernels.mosaic_gpu import COLUMN, COMPUTE, ROW, copy_blocks
from dms_jax.kernels.operands import fold_heads
from dms_jax.kernels.row_attention_gpu import GROUP, RowPlan, Share, Visibility, attend, copy_rows, run

PADDING_POSITION = -1  # position of padding rows: before any pair, so they see nothing


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
    """Return softmax parts [P B K R] of each row over the slots that it sees, for `core.slot_attention.merge_parts`.

    P is 2 `blocks.parts` for blocks of 64 rows, and `blocks.parts` for blocks of 128. Only slots below `used`, rounded
    up to a block, are read. The query positions of a batch row must be consecutive: then a slot that no row sees lies
    before or after all rows, and its contents have no effect.
    """
    keys, values, k_position, expiry, block = _with_whole_blocks(keys, values, k_position, expiry, blocks.keys)
    plan = RowPlan.of(rows, keys.dtype, keys.shape[2], blocks._replace(keys=block), interpret)
    padding = plan.groups * GROUP - q_position.shape[1]
    q_position = jnp.pad(q_position, ((0, 0), (0, padding)), constant_values=PADDING_POSITION)
    cache = (fold_heads(x) for x in (keys, values, k_position, expiry, used))
    return run(plan, slot_attention, Refs, _scratch(plan), rows, q_position, _bounds(q_position), *cache)


def _with_whole_blocks(keys, values, k_position, expiry, block):
    """Return the arrays and a block size that divides their number of slots, padded with empty slots if necessary."""
    slots = keys.shape[2]
    block = block if slots % block == 0 else min(block, GROUP)
    pad = lambda x, fill: jnp.pad(
        x, [(0, -slots % block if axis == 2 else 0) for axis in range(x.ndim)], constant_values=fill
    )
    if slots % block:
        keys, values, k_position, expiry = (
            pad(keys, 0),
            pad(values, 0),
            pad(k_position, NEVER),
            pad(expiry, PADDING_POSITION),
        )
    return keys, values, k_position, expiry, block


def _bounds(q_position: Int[Array, "B R"]) -> Int[Array, "B groups+1 2"]:
    """Return the first and last query position of each group of rows, and in the last entry those of all groups."""
    groups = q_position.reshape(q_position.shape[0], -1, GROUP)
    groups = jnp.stack([jnp.where(groups == PADDING_POSITION, NEVER, groups).min(-1), groups.max(-1)], axis=-1)
    all_rows = jnp.stack([groups[..., 0].min(-1), groups[..., 1].max(-1)], axis=-1)
    return jnp.concatenate([groups, all_rows[:, None]], axis=1).astype(jnp.int32)


class Refs(NamedTuple):
    """Inputs and results in global memory; names that end in _s are shared memory, and the rest are barriers."""

    rows: Any  # [B*K padded H]
    q_position: Any  # [B groups*GROUP]
    bounds: Any  # [B groups+1 2]
    keys: Any  # [B*K S H]
    values: Any  # [B*K S H]
    k_position: Any  # [B*K S]
    expiry: Any  # [B*K S]
    used: Any  # [B*K]
    row_max: Any  # [P B*K groups*GROUP]
    row_sum: Any  # [P B*K groups*GROUP]
    acc: Any  # [P B*K padded H]
    rows_s: Any
    q_position_s: Any
    k_s: Any
    v_s: Any
    k_position_s: Any
    expiry_s: Any
    row_max_s: Any
    row_sum_s: Any
    acc_s: Any
    rows_full: Any
    full: Any  # a buffer holds its block
    empty: Any  # a buffer may be filled again
    k_wide_s: Any  # only if keys and values are narrow: a converted block for each warpgroup
    v_wide_s: Any
    dead_zeroed: Any  # only if both warpgroups read the same values: dead values have been set to 0


class Queries(NamedTuple):
    """Positions of the rows of a warpgroup, and the ranges that decide which blocks they see."""

    position: Array  # [GROUP], COLUMN
    own_first: Array  # first and last position of the rows of this warpgroup
    own_last: Array
    first: Array  # first and last position of all rows
    last: Array


def _scratch(plan: RowPlan) -> dict[str, Any]:
    """Return the shared memory and the barriers that slots need, by name."""
    block, steps = plan.blocks.keys, plan.blocks.steps
    ints = lambda *shape: plgpu.SMEM(shape, jnp.int32)
    return {
        "q_position_s": ints(plan.own_groups, GROUP),
        "k_position_s": ints(steps, block),
        "expiry_s": ints(steps, block),
        "rows_full": plgpu.Barrier(num_arrivals=2 * plan.own_groups),
        "full": plgpu.Barrier(num_arrivals=4, num_barriers=steps),
    }


def slot_attention(plan: RowPlan, refs: Refs) -> None:
    """The kernel: what each warpgroup does."""
    head, thread = lax.axis_index("head"), lax.axis_index("thread")
    batch, share = lax.div(head, jnp.int32(plan.heads)), Share.of(plan, refs.used[head])
    pl.when(thread < COMPUTE)(lambda: _compute(plan, refs, batch, share, thread))
    pl.when(thread == COMPUTE)(lambda: _copy(plan, refs, batch, share))


def _compute(plan: RowPlan, refs: Refs, batch: Array, share: Share, thread: Array) -> None:
    """A compute warpgroup."""
    plgpu.set_max_registers(232, action="increase")
    own_first, own_last = (refs.bounds[batch, share.group(plan, thread), i] for i in range(2))
    first, last = (refs.bounds[batch, plan.groups, i] for i in range(2))
    plgpu.barrier_wait(refs.rows_full)
    position = plan.ops.load(refs.q_position_s.at[0 if plan.alternate else thread], COLUMN, optimized=False)
    queries = Queries(position, own_first, own_last, first, last)
    attend(plan, refs, share, thread, lambda _, stage: _visibility(plan, refs, queries, stage))


def _visibility(plan: RowPlan, refs: Refs, queries: Queries, stage: Array) -> Visibility:
    """Return what the rows see of the slots in buffer `stage`."""
    numbers = lambda layout: (
        plan.ops.load(x.at[stage], layout, optimized=False) for x in (refs.k_position_s, refs.expiry_s)
    )
    position, expiry = numbers(ROW)
    oldest, newest, soonest, latest = jnp.min(position), jnp.max(position), jnp.min(expiry), jnp.max(expiry)

    def visible(shape):
        wide = lambda x, axis: lax.broadcast_in_dim(x, shape, [axis])
        row, begin, end = wide(queries.position, 0), wide(position, 1), wide(expiry, 1)
        return (begin <= row) & (row <= end)

    def alive(shape):
        position, expiry = numbers(COLUMN)
        return lax.broadcast_in_dim((position <= queries.last) & (expiry >= queries.first), shape, [0])

    return Visibility(
        some_visible=(oldest <= queries.own_last) & (latest >= queries.own_first),
        all_visible=(newest <= queries.own_first) & (soonest >= queries.own_last),
        some_dead=(newest > queries.last) | (soonest < queries.first),
        visible=visible,
        alive=alive,
    )


def _copy(plan: RowPlan, refs: Refs, batch: Array, share: Share) -> None:
    """The copying warpgroup: the rows once, then block after block of slots into buffers that are free."""
    plgpu.set_max_registers(40, action="decrease")
    copy_rows(plan, refs, share)
    for i in range(plan.own_groups):
        source = refs.q_position.at[batch, share.rows(plan, i, GROUP)]
        plgpu.copy_gmem_to_smem(source, refs.q_position_s.at[i], refs.rows_full)

    def copy_block(j, stage):
        slots = pl.ds((share.first + j) * plan.blocks.keys, plan.blocks.keys)
        arrays = (
            (refs.k_position, refs.k_position_s),
            (refs.expiry, refs.expiry_s),
            (refs.keys, refs.k_s),
            (refs.values, refs.v_s),
        )
        for source, target in arrays:
            plgpu.copy_gmem_to_smem(source.at[share.head, slots], target.at[stage], refs.full.at[stage])

    copy_blocks(share.number, plan.blocks.steps, [(refs.empty, copy_block)])
