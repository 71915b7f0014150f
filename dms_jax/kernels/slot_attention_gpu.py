"""Attention of query rows over the slots of a compact cache on Hopper: decode and chunk prefill in one kernel.

Grid (batch x KV head, block of rows, part). Each CTA has two compute warpgroups and one that only issues copies, which keeps
`steps` blocks of keys and values in flight. With 64 rows (decode) the two compute warpgroups see the same rows and take the
blocks of keys in turn, each with a softmax of its own, hence two parts of the result; with 128 each has its own 64 rows and
both see all blocks. A decode step is bounded by the bytes of the slots in use, read once for all heads of a group; the tensor
cores pay for 64 rows where there are G, which they have to spare.
"""

import math
from typing import Any

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
from dms_jax.kernels.mosaic_gpu import COLUMN, ROW, ROWS, Ops, interpreter

GROUP = 64  # rows of one warpgroup: what a Hopper matrix instruction takes
MULTIPROCESSORS = 132  # of an H100 or H200
NOBODY = -1  # position of padding rows: before any pair


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
    """Softmax parts [P B K R] of each row over the slots with `k_position <= q_position <= expiry`, to be merged; P is
    2 `blocks.parts` for blocks of 64 rows, `blocks.parts` for blocks of 128.

    Only slots below `used` are read, up to a block. The query positions of a batch row have no holes, so a slot that none of
    them sees lies before or after all of them; whatever such a slot holds has no effect.
    """
    b, heads, r, _ = rows.shape
    alternate = blocks.rows == GROUP
    assert blocks.rows in (GROUP, 2 * GROUP), blocks
    # Warpgroups in turn: each must meet the same buffers at each round, since it counts only the rounds that it waits for.
    assert not alternate or blocks.steps % 2 == 0, blocks
    padded = -(-r // 8) * 8 if alternate and r <= GROUP else -(-r // blocks.rows) * blocks.rows
    groups = -(-padded // GROUP)
    keys, values, k_position, expiry, block = _divisible(keys, values, k_position, expiry, blocks.keys)
    blocks = blocks._replace(keys=block, parts=blocks.parts or _enough_parts(b * heads, keys.shape[2]))
    q_position = jnp.pad(q_position, ((0, 0), (0, groups * GROUP - r)), constant_values=NOBODY)
    if keys.dtype.itemsize == 1 and rows.dtype == jnp.bfloat16:
        rows = rows.astype(jnp.float16)  # holds both 8-bit types exactly, one instruction away; bfloat16 is three
    flat = lambda x: x.reshape(b * heads, *x.shape[2:])
    high, total, acc = _parts(
        flat(jnp.pad(rows, ((0, 0), (0, 0), (0, padded - r), (0, 0)))),
        q_position,
        _bounds(q_position),
        flat(keys),
        flat(values),
        flat(k_position),
        flat(expiry),
        flat(used),
        heads=heads,
        blocks=blocks,
        interpret=interpret,
    )
    split = lambda x: x.reshape(x.shape[0], b, heads, *x.shape[2:])[:, :, :, :r]
    return SoftmaxPart(split(high), split(total), split(acc))


def _enough_parts(heads: int, slots: int) -> int:
    """The fewest parts of at least 512 slots whose CTAs, one at a time on each multiprocessor, leave at most a twentieth of them idle;
    if none do, those that leave the fewest."""

    def busy(parts: int) -> float:
        ctas = heads * parts
        return ctas / (MULTIPROCESSORS * -(-ctas // MULTIPROCESSORS))

    return max(range(1, max(2, min(17, slots // 512 + 1))), key=lambda parts: (min(busy(parts), 0.95), -parts))


def _divisible(keys, values, k_position, expiry, block):
    """A block size that divides the number of slots; for a number that is no multiple of 64, more slots, empty ones."""
    slots = keys.shape[2]
    block = block if slots % block == 0 else min(block, GROUP)
    pad = lambda x, fill: jnp.pad(
        x, [(0, -slots % block if axis == 2 else 0) for axis in range(x.ndim)], constant_values=fill
    )
    if slots % block:
        keys, values, k_position, expiry = pad(keys, 0), pad(values, 0), pad(k_position, NEVER), pad(expiry, NOBODY)
    return keys, values, k_position, expiry, block


def _bounds(q_position: Int[Array, "B R"]) -> Int[Array, "B groups+1 2"]:
    """First and last query position of each group of rows, and at the end of all of a batch row."""
    groups = q_position.reshape(q_position.shape[0], -1, GROUP)
    groups = jnp.stack([jnp.where(groups == NOBODY, NEVER, groups).min(-1), groups.max(-1)], axis=-1)
    everybody = jnp.stack([groups[..., 0].min(-1), groups[..., 1].max(-1)], axis=-1)
    return jnp.concatenate([groups, everybody[:, None]], axis=1).astype(jnp.int32)


def _parts(rows, q_position, bounds, keys, values, k_position, expiry, used, *, heads, blocks, interpret):
    ops, dtype, narrow = Ops(interpret), rows.dtype, keys.dtype != rows.dtype
    flat_heads, padded, h = rows.shape
    alternate, block, steps = blocks.rows == GROUP, blocks.keys, blocks.steps
    groups, piece, own_groups = q_position.shape[1] // GROUP, min(GROUP, padded), blocks.rows // GROUP
    to_exponent = h**-0.5 * math.log2(math.e)  # scores are kept as products; exp2 is what the hardware has
    wide = lambda x, shape, axis: lax.broadcast_in_dim(x, shape, [axis])

    def kernel(
        rows_ref,
        q_position_ref,
        bounds_ref,
        keys_ref,
        values_ref,
        k_position_ref,
        expiry_ref,
        used_ref,
        high_ref,
        total_ref,
        acc_ref,
        *,
        rows_s,
        q_position_s,
        k_s,
        v_s,
        k_position_s,
        expiry_s,
        high_s,
        total_s,
        acc_s,
        rows_full,
        full,
        empty,
        k_wide_s: Any = None,
        v_wide_s: Any = None,
        buried: Any = None,
    ):
        head, row_block, part, thread = (lax.axis_index(name) for name in ("head", "rows", "part", "thread"))
        batch = lax.div(head, jnp.int32(heads))
        in_use = lax.div(used_ref[head] + jnp.int32(block - 1), jnp.int32(block))  # blocks
        share = lax.div(in_use + jnp.int32(blocks.parts - 1), jnp.int32(blocks.parts))
        first = part * share
        number = jnp.clip(in_use - first, 0, share)
        group_of = lambda thread: row_block if alternate else 2 * row_block + thread
        of_group = lambda thread, size: pl.ds(group_of(thread) * GROUP, size)

        @pl.when(thread < 2)
        def _compute():
            plgpu.set_max_registers(232, action="increase")
            own = 0 if alternate else thread
            low_q, high_q = bounds_ref[batch, group_of(thread), 0], bounds_ref[batch, group_of(thread), 1]
            first_q, last_q = bounds_ref[batch, groups, 0], bounds_ref[batch, groups, 1]
            plgpu.barrier_wait(rows_full)
            q_pos = ops.load(q_position_s.at[own], COLUMN, optimized=False)

            def one_block(i, carry):
                stage = lax.rem(2 * i + thread if alternate else i, jnp.int32(steps))
                plgpu.barrier_wait(full.at[stage])
                k_pos, k_expiry = (ops.load(x.at[stage], ROW, optimized=False) for x in (k_position_s, expiry_s))
                oldest, newest, soonest, latest = jnp.min(k_pos), jnp.max(k_pos), jnp.min(k_expiry), jnp.max(k_expiry)
                some_dead = (newest > last_q) | (soonest < first_q)
                all_visible = (newest <= low_q) & (soonest >= high_q)
                some_visible = (oldest <= high_q) & (latest >= low_q)

                def bury(v):  # a dead slot may hold anything, and 0 * NaN is NaN
                    k_pos, k_expiry = (ops.load(x.at[stage], COLUMN, optimized=False) for x in (k_position_s, expiry_s))
                    alive = (k_pos <= last_q) & (k_expiry >= first_q)
                    return jnp.where(wide(alive, v.shape, 0), v, jnp.zeros_like(v))

                def bury_in_place():
                    v_s.at[stage][...] = bury(ops.load(v_s.at[stage], ROWS))
                    plgpu.commit_smem()

                if not narrow and alternate:
                    pl.when(some_dead & some_visible)(bury_in_place)
                elif not narrow:  # both warpgroups read these values: one of them writes, whether it sees them or not

                    @pl.when(some_dead & (thread == 0))
                    def _():
                        bury_in_place()
                        plgpu.barrier_arrive(buried.at[stage])

                    @pl.when(some_dead & (thread == 1))
                    def _():
                        plgpu.barrier_wait(buried.at[stage])

                def attend(carry):
                    high, total, acc = carry
                    k, v = k_s.at[stage], v_s.at[stage]
                    if narrow:
                        k_wide_s.at[thread][...] = ops.load(k, ROWS).astype(dtype)
                        v_wide_s.at[thread][...] = lax.cond(
                            some_dead, bury, lambda v: v, ops.load(v, ROWS).astype(dtype)
                        )
                        plgpu.commit_smem()
                        k, v = k_wide_s.at[thread], v_wide_s.at[thread]
                    s = ops.dot(rows_s.at[own], k, (GROUP, block), transpose_b=True)

                    def masked(s):
                        row, begin, end = wide(q_pos, s.shape, 0), wide(k_pos, s.shape, 1), wide(k_expiry, s.shape, 1)
                        return jnp.where((begin <= row) & (row <= end), s, MASKED)

                    s = lax.cond(all_visible, lambda s: s, masked, s)
                    new_high = jnp.maximum(high, s.max(axis=1))
                    # A row that has seen nothing yet subtracts 0, so that exp2(MASKED) is 0.
                    shift = jnp.where(new_high <= MASKED / 2, 0.0, new_high) * to_exponent
                    p = jnp.exp2(s * to_exponent - wide(shift, s.shape, 0))
                    shrink = jnp.exp2((high - new_high) * to_exponent)
                    acc = ops.add_dot(acc * wide(shrink, acc.shape, 0), p.astype(dtype), v)
                    return new_high, total * shrink + p.sum(axis=1), acc

                carry = lax.cond(some_visible, attend, lambda carry: carry, carry)
                plgpu.barrier_arrive(empty.at[stage])
                return carry

            nothing = (
                ops.full((GROUP,), MASKED, COLUMN),
                ops.full((GROUP,), 0.0, COLUMN),
                ops.full((GROUP, h), 0.0, ROWS),
            )
            mine = lax.div(number + 1 - thread, jnp.int32(2)) if alternate else number
            high, total, acc = lax.fori_loop(0, mine, one_block, nothing)
            high_s.at[thread][...] = jnp.where(high <= MASKED / 2, MASKED, high * h**-0.5)
            total_s.at[thread][...] = total
            acc_s.at[thread][...] = acc
            plgpu.commit_smem()
            to = 2 * part + thread if alternate else part
            plgpu.copy_smem_to_gmem(high_s.at[thread], high_ref.at[to, head, of_group(thread, GROUP)])
            plgpu.copy_smem_to_gmem(total_s.at[thread], total_ref.at[to, head, of_group(thread, GROUP)])
            plgpu.copy_smem_to_gmem(acc_s.at[thread, pl.ds(0, piece)], acc_ref.at[to, head, of_group(thread, piece)])
            plgpu.wait_smem_to_gmem(0)

        @pl.when(thread == 2)
        def _copy():
            plgpu.set_max_registers(40, action="decrease")
            for i in range(own_groups):
                plgpu.copy_gmem_to_smem(rows_ref.at[head, of_group(i, piece)], rows_s.at[i, pl.ds(0, piece)], rows_full)
                plgpu.copy_gmem_to_smem(q_position_ref.at[batch, of_group(i, GROUP)], q_position_s.at[i], rows_full)

            def one_block(j, _):
                stage, slots = lax.rem(j, jnp.int32(steps)), pl.ds((first + j) * block, block)
                pl.when(j >= steps)(lambda: plgpu.barrier_wait(empty.at[stage]))
                arrays = (k_position_ref, k_position_s), (expiry_ref, expiry_s), (keys_ref, k_s), (values_ref, v_s)
                for source, target in arrays:
                    plgpu.copy_gmem_to_smem(source.at[head, slots], target.at[stage], full.at[stage])
                return _

            lax.fori_loop(0, number, one_block, None)
            drain = lambda j, _: plgpu.barrier_wait(empty.at[lax.rem(j, jnp.int32(steps))])
            lax.fori_loop(jnp.maximum(number - steps, 0), number, drain, None)

    matrix = lambda shape, dtype: ops.matrix((*shape, h), dtype)
    ints, floats = lambda *shape: plgpu.SMEM(shape, jnp.int32), lambda *shape: plgpu.SMEM(shape, jnp.float32)
    scratch = {
        "rows_s": matrix((own_groups, GROUP), dtype),
        "q_position_s": ints(own_groups, GROUP),
        "k_s": matrix((steps, block), keys.dtype),
        "v_s": matrix((steps, block), values.dtype),
        "k_position_s": ints(steps, block),
        "expiry_s": ints(steps, block),
        "high_s": floats(2, GROUP),
        "total_s": floats(2, GROUP),
        "acc_s": matrix((2, GROUP), jnp.float32),
        "rows_full": plgpu.Barrier(num_arrivals=2 * own_groups),
        "full": plgpu.Barrier(num_arrivals=4, num_barriers=steps),
        "empty": plgpu.Barrier(num_arrivals=1 if alternate else 2, num_barriers=steps),
    }
    if narrow:
        scratch["k_wide_s"] = scratch["v_wide_s"] = matrix((2, block), dtype)
    elif not alternate:
        scratch["buried"] = plgpu.Barrier(num_barriers=steps)
    results = 2 * blocks.parts if alternate else blocks.parts
    statistics = jax.ShapeDtypeStruct((results, flat_heads, groups * GROUP), jnp.float32)
    return plgpu.kernel(
        kernel,
        out_type=[statistics, statistics, jax.ShapeDtypeStruct((results, flat_heads, padded, h), jnp.float32)],
        grid=(flat_heads, -(-padded // blocks.rows), blocks.parts),
        grid_names=("head", "rows", "part"),
        num_threads=3,
        thread_name="thread",
        scratch_types=scratch,
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpreter() if interpret else None,
    )(rows, q_position, bounds, keys, values, k_position, expiry, used)
