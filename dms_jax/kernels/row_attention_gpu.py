"""Attention of query rows over the blocks of a cache on Hopper: what attention over slots and over pages share.

The grid is (batch x KV head, block of rows, part). Each CTA has two compute warpgroups, and a third one that only
issues copies and keeps `steps` blocks of keys and values in flight. With blocks of 64 rows (decode), both compute
warpgroups have the same rows, alternate between the blocks of keys, and compute separate softmaxes, so the result has
two parts. With blocks of 128 rows, each warpgroup has its own 64 rows, and both read all blocks.

A decode step is bound by the bytes of the slots in use, which are read once for all heads of a group. The tensor cores
multiply 64 rows although a group has only G, which costs nothing, because they wait for memory.

A kernel that uses this module adds its inputs, which slots of a block its rows see (`Visibility`), and its copies of
blocks. `run` starts it, `Share` says which blocks a CTA has, and `attend` is the work of a compute warpgroup.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Float

from dms_jax.axes import Array
from dms_jax.core.slot_attention import SoftmaxPart
from dms_jax.core.visibility import MASKED
from dms_jax.kernels.block_sizes import SlotBlocks
from dms_jax.kernels.mosaic_gpu import COLUMN, COMPUTE, ROWS, Ops, bind, interpreter
from dms_jax.kernels.operands import fold_heads

GROUP = 64  # rows of one warpgroup, as a Hopper matrix instruction takes them
MULTIPROCESSORS = 132  # of an H100 or H200


@dataclass(frozen=True)
class RowPlan:
    """Static facts of a call."""

    ops: Ops
    blocks: SlotBlocks
    heads: int  # KV heads per batch row
    head_dim: int
    padded: int  # rows per head, with padding
    groups: int  # groups of GROUP rows per head
    dtype: Any  # of rows, and of the operands of products
    cache_dtype: Any  # of keys and values

    @classmethod
    def of(
        cls,
        rows: Float[Array, "B K R H"],
        cache_dtype: Any,
        slots: int,
        blocks: SlotBlocks,
        interpret: bool,
        **more: Any,
    ) -> Self:
        """Plan the attention of `rows` over at most `slots` slots of each head; `more` are the fields of a subclass."""
        b, heads, r, h = rows.shape
        alternate = blocks.rows == GROUP
        assert blocks.rows in (GROUP, 2 * GROUP), blocks
        # Warpgroups that alternate count only their own blocks, so each must get the same buffers in every round.
        assert not alternate or blocks.steps % 2 == 0, blocks
        padded = -(-r // 8) * 8 if alternate and r <= GROUP else -(-r // blocks.rows) * blocks.rows
        blocks = blocks._replace(parts=blocks.parts or _enough_parts(b * heads, slots))
        # A float16 holds both 8-bit types exactly, and converting takes one instruction instead of three.
        converted = cache_dtype.itemsize == 1 and rows.dtype == jnp.bfloat16
        dtype = jnp.dtype(jnp.float16) if converted else rows.dtype
        return cls(Ops(interpret), blocks, heads, h, padded, -(-padded // GROUP), dtype, cache_dtype, **more)

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


def _enough_parts(heads: int, slots: int) -> int:
    """Return the smallest number of parts per head that keeps 95% of the multiprocessors busy with one CTA each.

    If no number does, return the one that keeps most of them busy. A part has at least 512 slots.
    """

    def busy(parts: int) -> float:
        ctas = heads * parts
        return ctas / (MULTIPROCESSORS * -(-ctas // MULTIPROCESSORS))

    return max(range(1, max(2, min(17, slots // 512 + 1))), key=lambda parts: (min(busy(parts), 0.95), -parts))


class Share(NamedTuple):
    """The work of a CTA: its head, its rows, and the `number` blocks of slots from block `first` on."""

    head: Any
    row_block: Any
    part: Any
    first: Any
    number: Any

    @classmethod
    def of(cls, plan: RowPlan, used: Any) -> "Share":
        """Return the share of this CTA in the first `used` slots of its head."""
        head, row_block, part = (lax.axis_index(name) for name in ("head", "rows", "part"))
        block, parts = plan.blocks.keys, plan.blocks.parts
        used_blocks = lax.div(used + jnp.int32(block - 1), jnp.int32(block))
        share = lax.div(used_blocks + jnp.int32(parts - 1), jnp.int32(parts))
        first = part * share
        return cls(head, row_block, part, first, jnp.clip(used_blocks - first, 0, share))

    def group(self, plan: RowPlan, thread: Any) -> Any:
        """Return the group of rows of warpgroup `thread`."""
        return self.row_block if plan.alternate else 2 * self.row_block + thread

    def rows(self, plan: RowPlan, thread: Any, size: int) -> Any:
        """Return the slice of the first `size` rows of the group of warpgroup `thread`."""
        return pl.ds(self.group(plan, thread) * GROUP, size)


class Visibility(NamedTuple):
    """Which slots of a block the rows of a warpgroup see."""

    some_visible: Array  # whether one of the rows sees one of the slots
    all_visible: Array  # whether all rows see all slots
    some_dead: Array  # whether a slot is dead: no row sees it, so it may hold anything, even NaN
    visible: Callable[[tuple[int, int]], Array]  # from the shape [rows slots]: which row sees which slot
    alive: Callable[[tuple[int, int]], Array]  # from the shape [slots H]: which slots are not dead


def run(
    plan: RowPlan,
    kernel: Callable[[Any, Any], None],
    refs: Any,
    scratch: dict[str, Any],
    rows: Float[Array, "B K R H"],
    *inputs: Array,
) -> SoftmaxPart:
    """Run `kernel(plan, refs)`, and return softmax parts [P B K R] for `core.slot_attention.merge_parts`.

    P is 2 `plan.blocks.parts` for blocks of 64 rows, and `plan.blocks.parts` for blocks of 128. `refs` is the type of
    the references: `rows`, the other `inputs`, row_max, row_sum and acc, and then shared memory and barriers, which are
    those of `_scratch` and the kernel's own `scratch`.
    """
    b, heads, r, _ = rows.shape
    scratch, flat_heads = _scratch(plan) | scratch, b * heads
    results = 2 * plan.blocks.parts if plan.alternate else plan.blocks.parts
    statistics = jax.ShapeDtypeStruct((results, flat_heads, plan.groups * GROUP), jnp.float32)
    acc = jax.ShapeDtypeStruct((results, flat_heads, plan.padded, plan.head_dim), jnp.float32)
    call = plgpu.kernel(
        bind(kernel, plan, refs, [name for name in ("k_wide_s", "v_wide_s", "dead_zeroed") if name not in scratch]),
        out_type=[statistics, statistics, acc],
        grid=(flat_heads, -(-plan.padded // plan.blocks.rows), plan.blocks.parts),
        grid_names=("head", "rows", "part"),
        num_threads=COMPUTE + 1,
        thread_name="thread",
        scratch_types=scratch,
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpreter() if plan.ops.interpret else None,
    )
    rows = jnp.pad(rows.astype(plan.dtype), ((0, 0), (0, 0), (0, plan.padded - r), (0, 0)))
    split = lambda x: x.reshape(x.shape[0], b, heads, *x.shape[2:])[:, :, :, :r]
    return SoftmaxPart(*map(split, call(fold_heads(rows), *inputs)))


def _scratch(plan: RowPlan) -> dict[str, Any]:
    """Return the shared memory and the barriers that every kernel needs, by name."""
    block, steps = plan.blocks.keys, plan.blocks.steps
    matrix = lambda shape, dtype: plan.ops.matrix((*shape, plan.head_dim), dtype)
    floats = lambda *shape: plgpu.SMEM(shape, jnp.float32)
    scratch = {
        "rows_s": matrix((plan.own_groups, GROUP), plan.dtype),
        "k_s": matrix((steps, block), plan.cache_dtype),
        "v_s": matrix((steps, block), plan.cache_dtype),
        "row_max_s": floats(2, GROUP),
        "row_sum_s": floats(2, GROUP),
        "acc_s": matrix((2, GROUP), jnp.float32),
        "empty": plgpu.Barrier(num_arrivals=1 if plan.alternate else 2, num_barriers=steps),
    }
    if plan.narrow:
        scratch["k_wide_s"] = scratch["v_wide_s"] = matrix((2, block), plan.dtype)
    elif not plan.alternate:
        scratch["dead_zeroed"] = plgpu.Barrier(num_barriers=steps)
    return scratch


def attend(
    plan: RowPlan, refs: Any, share: Share, thread: Array, visibility_of: Callable[[Any, Any], Visibility]
) -> None:
    """Compute the online softmax of the rows of a warpgroup over the blocks of its part, and store the result.

    `visibility_of(block, stage)` is asked when that block of slots is in buffer `stage`.
    """
    ops = plan.ops
    nothing = (
        ops.full((GROUP,), MASKED, COLUMN),
        ops.full((GROUP,), 0.0, COLUMN),
        ops.full((GROUP, plan.head_dim), 0.0, ROWS),
    )

    def one_block(i, carry):
        n = 2 * i + thread if plan.alternate else i
        stage = lax.rem(n, jnp.int32(plan.blocks.steps))
        plgpu.barrier_wait(refs.full.at[stage])
        carry = _attend_to_block(plan, refs, visibility_of(share.first + n, stage), thread, stage, carry)
        plgpu.barrier_arrive(refs.empty.at[stage])
        return carry

    number = lax.div(share.number + 1 - thread, jnp.int32(2)) if plan.alternate else share.number
    row_max, row_sum, acc = lax.fori_loop(0, number, one_block, nothing)
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


def _attend_to_block(plan: RowPlan, refs: Any, seen: Visibility, thread: Array, stage: Array, carry: Any) -> Any:
    """Attend to the block in buffer `stage` if one of the rows sees one of its slots."""
    ops = plan.ops

    def zero_dead(v):  # 0 * NaN is NaN
        return jnp.where(seen.alive(v.shape), v, jnp.zeros_like(v))

    def zero_dead_in_place():
        refs.v_s.at[stage][...] = zero_dead(ops.load(refs.v_s.at[stage], ROWS))
        plgpu.commit_smem()

    if not plan.narrow and plan.alternate:
        pl.when(seen.some_dead & seen.some_visible)(zero_dead_in_place)
    elif not plan.narrow:  # both warpgroups read these values, so the first one zeroes them, even if it sees none

        @pl.when(seen.some_dead & (thread == 0))
        def _():
            zero_dead_in_place()
            plgpu.barrier_arrive(refs.dead_zeroed.at[stage])

        @pl.when(seen.some_dead & (thread == 1))
        def _():
            plgpu.barrier_wait(refs.dead_zeroed.at[stage])

    def keys_and_values():
        k, v = refs.k_s.at[stage], refs.v_s.at[stage]
        if plan.narrow:
            refs.k_wide_s.at[thread][...] = ops.load(k, ROWS).astype(plan.dtype)
            refs.v_wide_s.at[thread][...] = lax.cond(
                seen.some_dead, zero_dead, lambda v: v, ops.load(v, ROWS).astype(plan.dtype)
            )
            plgpu.commit_smem()
            k, v = refs.k_wide_s.at[thread], refs.v_wide_s.at[thread]
        return k, v

    def attend(carry):
        rows = refs.rows_s.at[0 if plan.alternate else thread]
        return _softmax_step(plan, rows, *keys_and_values(), seen, carry)

    return lax.cond(seen.some_visible, attend, lambda carry: carry, carry)


def _softmax_step(plan: RowPlan, rows, k, v, seen: Visibility, carry) -> tuple:
    """Add a block of keys and values, in shared memory, to the online softmax `carry` of the rows.

    Maxima in `carry` are those of unscaled scores.
    """
    ops, wide = plan.ops, lambda x, shape, axis: lax.broadcast_in_dim(x, shape, [axis])
    to_exponent = plan.head_dim**-0.5 * math.log2(math.e)  # the hardware has exp2
    row_max, row_sum, acc = carry
    s = ops.dot(rows, k, (GROUP, plan.blocks.keys), transpose_b=True)

    s = lax.cond(seen.all_visible, lambda s: s, lambda s: jnp.where(seen.visible(s.shape), s, MASKED), s)
    new_max = jnp.maximum(row_max, s.max(axis=1))
    # A row that has seen nothing yet subtracts 0, so that exp2(MASKED) is 0.
    shift = jnp.where(new_max <= MASKED / 2, 0.0, new_max) * to_exponent
    p = jnp.exp2(s * to_exponent - wide(shift, s.shape, 0))
    rescale = jnp.exp2((row_max - new_max) * to_exponent)
    acc = ops.add_dot(acc * wide(rescale, acc.shape, 0), p.astype(plan.dtype), v)
    return new_max, row_sum * rescale + p.sum(axis=1), acc


def copy_rows(plan: RowPlan, refs: Any, share: Share) -> None:
    """Start the copies of the rows of a CTA; each arrives at `refs.rows_full`, `plan.own_groups` in all."""
    for i in range(plan.own_groups):
        source = refs.rows.at[share.head, share.rows(plan, i, plan.stored_rows)]
        plgpu.copy_gmem_to_smem(source, refs.rows_s.at[i, pl.ds(0, plan.stored_rows)], refs.rows_full)
