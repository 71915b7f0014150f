"""Attention of query rows over the slots of a compact cache on Hopper: decode and chunked prefill in one kernel.

The grid is (batch x KV head, block of rows, part). Each CTA has two compute warpgroups, and a third one that only
issues copies and keeps `steps` blocks of keys and values in flight. With blocks of 64 rows (decode), both compute
warpgroups have the same rows, alternate between the blocks of keys, and compute separate softmaxes, so the result has
two parts. With blocks of 128 rows, each warpgroup has its own 64 rows, and both read all blocks.

A decode step is bound by the bytes of the slots in use, which are read once for all heads of a group. The tensor cores
multiply 64 rows although a group has only G, which costs nothing, because they wait for memory.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Float, Int

from dms_jax.axes import Array
from dms_jax.core.slot_attention import SoftmaxPart
from dms_jax.core.visibility import MASKED, NEVER
from dms_jax.kernels.block_sizes import SlotBlocks
from dms_jax.kernels.mosaic_gpu import COLUMN, COMPUTE, ROW, ROWS, Ops, bind, copy_blocks, interpreter
from dms_jax.kernels.operands import fold_heads

GROUP = 64  # rows of one warpgroup, as a Hopper matrix instruction takes them
MULTIPROCESSORS = 132  # of an H100 or H200
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
    b, heads, r, h = rows.shape
    alternate = blocks.rows == GROUP
    assert blocks.rows in (GROUP, 2 * GROUP), blocks
    # Warpgroups that alternate count only their own blocks, so each must get the same buffers in every round.
    assert not alternate or blocks.steps % 2 == 0, blocks
    padded = -(-r // 8) * 8 if alternate and r <= GROUP else -(-r // blocks.rows) * blocks.rows
    groups = -(-padded // GROUP)
    keys, values, k_position, expiry, block = _with_whole_blocks(keys, values, k_position, expiry, blocks.keys)
    blocks = blocks._replace(keys=block, parts=blocks.parts or _enough_parts(b * heads, keys.shape[2]))
    q_position = jnp.pad(q_position, ((0, 0), (0, groups * GROUP - r)), constant_values=PADDING_POSITION)
    if keys.dtype.itemsize == 1 and rows.dtype == jnp.bfloat16:
        # A float16 holds both 8-bit types exactly, and converting takes one instruction instead of three.
        rows = rows.astype(jnp.float16)
    plan = Plan(Ops(interpret), blocks, heads, h, padded, groups, rows.dtype, keys.dtype)
    row_max, row_sum, acc = _run(
        plan,
        fold_heads(jnp.pad(rows, ((0, 0), (0, 0), (0, padded - r), (0, 0)))),
        q_position,
        _bounds(q_position),
        *(fold_heads(x) for x in (keys, values, k_position, expiry, used)),
    )
    split = lambda x: x.reshape(x.shape[0], b, heads, *x.shape[2:])[:, :, :, :r]
    return SoftmaxPart(split(row_max), split(row_sum), split(acc))


def _enough_parts(heads: int, slots: int) -> int:
    """Return the smallest number of parts per head that keeps 95% of the multiprocessors busy with one CTA each.

    If no number does, return the one that keeps most of them busy. A part has at least 512 slots.
    """

    def busy(parts: int) -> float:
        ctas = heads * parts
        return ctas / (MULTIPROCESSORS * -(-ctas // MULTIPROCESSORS))

    return max(range(1, max(2, min(17, slots // 512 + 1))), key=lambda parts: (min(busy(parts), 0.95), -parts))


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


class Plan(NamedTuple):
    """Static facts of a call."""

    ops: Ops
    blocks: SlotBlocks
    heads: int  # KV heads per batch row
    head_dim: int
    padded: int  # rows per head, with padding
    groups: int  # groups of GROUP rows per head
    dtype: Any  # of rows, and of the operands of products
    cache_dtype: Any  # of keys and values

    @property
    def alternate(self) -> bool:
        """Whether both compute warpgroups have the same rows and alternate between blocks."""
        return self.blocks.rows == GROUP

    @property
    def narrow(self) -> bool:
        """Whether keys and values must be converted before they are multiplied."""
        return self.cache_dtype != self.dtype

    @property
    def stored_rows(self) -> int:
        """Rows of a group that exist in global memory."""
        return min(GROUP, self.padded)

    @property
    def own_groups(self) -> int:
        """Groups of rows per CTA."""
        return self.blocks.rows // GROUP


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


class Share(NamedTuple):
    """The work of a CTA: its head, its rows, and the `number` blocks of slots from block `first` on."""

    head: Any
    batch: Any
    row_block: Any
    part: Any
    first: Any
    number: Any

    def group(self, plan: Plan, thread: Any) -> Any:
        """Return the group of rows of warpgroup `thread`."""
        return self.row_block if plan.alternate else 2 * self.row_block + thread

    def rows(self, plan: Plan, thread: Any, size: int) -> Any:
        """Return the slice of the first `size` rows of the group of warpgroup `thread`."""
        return pl.ds(self.group(plan, thread) * GROUP, size)


class Queries(NamedTuple):
    """Positions of the rows of a warpgroup, and the ranges that decide which blocks they see."""

    position: Array  # [GROUP], COLUMN
    own_first: Array  # first and last position of the rows of this warpgroup
    own_last: Array
    first: Array  # first and last position of all rows
    last: Array


def _run(plan: Plan, rows, q_position, bounds, keys, *other_inputs) -> list[Array]:
    """Return row_max and row_sum [P B*K groups*GROUP], and acc [P B*K padded H]."""
    scratch, absent = _scratch(plan)
    results = 2 * plan.blocks.parts if plan.alternate else plan.blocks.parts
    flat_heads = rows.shape[0]
    statistics = jax.ShapeDtypeStruct((results, flat_heads, plan.groups * GROUP), jnp.float32)
    acc = jax.ShapeDtypeStruct((results, flat_heads, plan.padded, plan.head_dim), jnp.float32)
    run = plgpu.kernel(
        bind(slot_attention, plan, Refs, absent),
        out_type=[statistics, statistics, acc],
        grid=(flat_heads, -(-plan.padded // plan.blocks.rows), plan.blocks.parts),
        grid_names=("head", "rows", "part"),
        num_threads=COMPUTE + 1,
        thread_name="thread",
        scratch_types=scratch,
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpreter() if plan.ops.interpret else None,
    )
    return run(rows, q_position, bounds, keys, *other_inputs)


def _scratch(plan: Plan) -> tuple[dict[str, Any], list[str]]:
    """Return shared memory and barriers by name, and the names of those that this plan does not need."""
    block, steps = plan.blocks.keys, plan.blocks.steps
    matrix = lambda shape, dtype: plan.ops.matrix((*shape, plan.head_dim), dtype)
    ints, floats = lambda *shape: plgpu.SMEM(shape, jnp.int32), lambda *shape: plgpu.SMEM(shape, jnp.float32)
    scratch = {
        "rows_s": matrix((plan.own_groups, GROUP), plan.dtype),
        "q_position_s": ints(plan.own_groups, GROUP),
        "k_s": matrix((steps, block), plan.cache_dtype),
        "v_s": matrix((steps, block), plan.cache_dtype),
        "k_position_s": ints(steps, block),
        "expiry_s": ints(steps, block),
        "row_max_s": floats(2, GROUP),
        "row_sum_s": floats(2, GROUP),
        "acc_s": matrix((2, GROUP), jnp.float32),
        "rows_full": plgpu.Barrier(num_arrivals=2 * plan.own_groups),
        "full": plgpu.Barrier(num_arrivals=4, num_barriers=steps),
        "empty": plgpu.Barrier(num_arrivals=1 if plan.alternate else 2, num_barriers=steps),
    }
    if plan.narrow:
        scratch["k_wide_s"] = scratch["v_wide_s"] = matrix((2, block), plan.dtype)
    elif not plan.alternate:
        scratch["dead_zeroed"] = plgpu.Barrier(num_barriers=steps)
    return scratch, [name for name in ("k_wide_s", "v_wide_s", "dead_zeroed") if name not in scratch]


def slot_attention(plan: Plan, refs: Refs) -> None:
    """The kernel: what each warpgroup does."""
    head, row_block, part, thread = (lax.axis_index(name) for name in ("head", "rows", "part", "thread"))
    batch = lax.div(head, jnp.int32(plan.heads))
    block, parts = plan.blocks.keys, plan.blocks.parts
    used_blocks = lax.div(refs.used[head] + jnp.int32(block - 1), jnp.int32(block))
    share = lax.div(used_blocks + jnp.int32(parts - 1), jnp.int32(parts))
    first = part * share
    share = Share(head, batch, row_block, part, first, jnp.clip(used_blocks - first, 0, share))
    pl.when(thread < COMPUTE)(lambda: _compute(plan, refs, share, thread))
    pl.when(thread == COMPUTE)(lambda: _copy(plan, refs, share))


def _compute(plan: Plan, refs: Refs, share: Share, thread: Array) -> None:
    """A compute warpgroup: the online softmax of its rows over the blocks of this part."""
    plgpu.set_max_registers(232, action="increase")
    ops = plan.ops
    own_first, own_last = (refs.bounds[share.batch, share.group(plan, thread), i] for i in range(2))
    first, last = (refs.bounds[share.batch, plan.groups, i] for i in range(2))
    plgpu.barrier_wait(refs.rows_full)
    own = 0 if plan.alternate else thread
    queries = Queries(ops.load(refs.q_position_s.at[own], COLUMN, optimized=False), own_first, own_last, first, last)
    nothing = (
        ops.full((GROUP,), MASKED, COLUMN),
        ops.full((GROUP,), 0.0, COLUMN),
        ops.full((GROUP, plan.head_dim), 0.0, ROWS),
    )
    number = lax.div(share.number + 1 - thread, jnp.int32(2)) if plan.alternate else share.number
    row_max, row_sum, acc = lax.fori_loop(
        0, number, lambda i, carry: _attend_to_block(plan, refs, queries, thread, i, carry), nothing
    )
    refs.row_max_s.at[thread][...] = jnp.where(row_max <= MASKED / 2, MASKED, row_max * plan.head_dim**-0.5)
    refs.row_sum_s.at[thread][...] = row_sum
    refs.acc_s.at[thread][...] = acc
    plgpu.commit_smem()
    to = 2 * share.part + thread if plan.alternate else share.part
    for source, target in ((refs.row_max_s, refs.row_max), (refs.row_sum_s, refs.row_sum)):
        plgpu.copy_smem_to_gmem(source.at[thread], target.at[to, share.head, share.rows(plan, thread, GROUP)])
    rows = share.rows(plan, thread, plan.stored_rows)
    plgpu.copy_smem_to_gmem(refs.acc_s.at[thread, pl.ds(0, plan.stored_rows)], refs.acc.at[to, share.head, rows])
    plgpu.wait_smem_to_gmem(0)


def _attend_to_block(plan: Plan, refs: Refs, queries: Queries, thread: Array, i: Array, carry: Any) -> Any:
    """Wait for the block of round `i`, and attend to it if one of the rows sees one of its slots."""
    ops = plan.ops
    stage = lax.rem(2 * i + thread if plan.alternate else i, jnp.int32(plan.blocks.steps))
    plgpu.barrier_wait(refs.full.at[stage])
    position, expiry = (ops.load(x.at[stage], ROW, optimized=False) for x in (refs.k_position_s, refs.expiry_s))
    oldest, newest, soonest, latest = jnp.min(position), jnp.max(position), jnp.min(expiry), jnp.max(expiry)
    some_dead = (newest > queries.last) | (soonest < queries.first)
    all_visible = (newest <= queries.own_first) & (soonest >= queries.own_last)
    some_visible = (oldest <= queries.own_last) & (latest >= queries.own_first)

    def zero_dead(v):  # a dead slot may hold anything, and 0 * NaN is NaN
        position, expiry = (ops.load(x.at[stage], COLUMN, optimized=False) for x in (refs.k_position_s, refs.expiry_s))
        alive = (position <= queries.last) & (expiry >= queries.first)
        return jnp.where(lax.broadcast_in_dim(alive, v.shape, [0]), v, jnp.zeros_like(v))

    def zero_dead_in_place():
        refs.v_s.at[stage][...] = zero_dead(ops.load(refs.v_s.at[stage], ROWS))
        plgpu.commit_smem()

    if not plan.narrow and plan.alternate:
        pl.when(some_dead & some_visible)(zero_dead_in_place)
    elif not plan.narrow:  # both warpgroups read these values, so the first one zeroes them, even if it sees none

        @pl.when(some_dead & (thread == 0))
        def _():
            zero_dead_in_place()
            plgpu.barrier_arrive(refs.dead_zeroed.at[stage])

        @pl.when(some_dead & (thread == 1))
        def _():
            plgpu.barrier_wait(refs.dead_zeroed.at[stage])

    def keys_and_values():
        k, v = refs.k_s.at[stage], refs.v_s.at[stage]
        if plan.narrow:
            refs.k_wide_s.at[thread][...] = ops.load(k, ROWS).astype(plan.dtype)
            refs.v_wide_s.at[thread][...] = lax.cond(
                some_dead, zero_dead, lambda v: v, ops.load(v, ROWS).astype(plan.dtype)
            )
            plgpu.commit_smem()
            k, v = refs.k_wide_s.at[thread], refs.v_wide_s.at[thread]
        return k, v

    def attend(carry):
        rows = refs.rows_s.at[0 if plan.alternate else thread]
        return _softmax_step(plan, rows, *keys_and_values(), queries.position, position, expiry, all_visible, carry)

    carry = lax.cond(some_visible, attend, lambda carry: carry, carry)
    plgpu.barrier_arrive(refs.empty.at[stage])
    return carry


def _softmax_step(plan: Plan, rows, k, v, q_position, k_position, expiry, all_visible, carry) -> tuple:
    """Add a block of keys and values, in shared memory, to the online softmax `carry` of the rows.

    Maxima in `carry` are those of unscaled scores.
    """
    ops, wide = plan.ops, lambda x, shape, axis: lax.broadcast_in_dim(x, shape, [axis])
    to_exponent = plan.head_dim**-0.5 * math.log2(math.e)  # the hardware has exp2
    row_max, row_sum, acc = carry
    s = ops.dot(rows, k, (GROUP, plan.blocks.keys), transpose_b=True)

    def masked(s):
        row, begin, end = wide(q_position, s.shape, 0), wide(k_position, s.shape, 1), wide(expiry, s.shape, 1)
        return jnp.where((begin <= row) & (row <= end), s, MASKED)

    s = lax.cond(all_visible, lambda s: s, masked, s)
    new_max = jnp.maximum(row_max, s.max(axis=1))
    # A row that has seen nothing yet subtracts 0, so that exp2(MASKED) is 0.
    shift = jnp.where(new_max <= MASKED / 2, 0.0, new_max) * to_exponent
    p = jnp.exp2(s * to_exponent - wide(shift, s.shape, 0))
    rescale = jnp.exp2((row_max - new_max) * to_exponent)
    acc = ops.add_dot(acc * wide(rescale, acc.shape, 0), p.astype(plan.dtype), v)
    return new_max, row_sum * rescale + p.sum(axis=1), acc


def _copy(plan: Plan, refs: Refs, share: Share) -> None:
    """The copying warpgroup: the rows once, then block after block of slots into buffers that are free."""
    plgpu.set_max_registers(40, action="decrease")
    stored, block = plan.stored_rows, plan.blocks.keys
    for i in range(plan.own_groups):
        source = refs.rows.at[share.head, share.rows(plan, i, stored)]
        plgpu.copy_gmem_to_smem(source, refs.rows_s.at[i, pl.ds(0, stored)], refs.rows_full)
        source = refs.q_position.at[share.batch, share.rows(plan, i, GROUP)]
        plgpu.copy_gmem_to_smem(source, refs.q_position_s.at[i], refs.rows_full)

    def copy_block(j, stage):
        slots = pl.ds((share.first + j) * block, block)
        arrays = (
            (refs.k_position, refs.k_position_s),
            (refs.expiry, refs.expiry_s),
            (refs.keys, refs.k_s),
            (refs.values, refs.v_s),
        )
        for source, target in arrays:
            plgpu.copy_gmem_to_smem(source.at[share.head, slots], target.at[stage], refs.full.at[stage])

    copy_blocks(share.number, plan.blocks.steps, [(refs.empty, copy_block)])
