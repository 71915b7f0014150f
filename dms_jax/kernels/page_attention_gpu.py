"""Attention of query rows over the pages of a paged cache on Hopper: decode steps, and survivors behind a chunk.

`row_attention_gpu` has the grid and the softmax. Here is what pages add: the copying warpgroup looks up each page in
the table, and copies it to its place in a block. Positions and expiries do not exist, because every row sees every slot
that holds a pair: which slots do follows from two numbers per head.
"""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Float, Int

from dms_jax.axes import Array
from dms_jax.core.paged_cache import holds_pair
from dms_jax.core.slot_attention import SoftmaxPart
from dms_jax.kernels.block_sizes import SlotBlocks
from dms_jax.kernels.mosaic_gpu import COMPUTE, copy_blocks
from dms_jax.kernels.operands import fold_heads
from dms_jax.kernels.row_attention_gpu import RowPlan, Share, Visibility, attend, copy_rows, run


def attend_pages(
    rows: Float[Array, "B K R H"],
    k_pages: Float[Array, "N S H"],
    v_pages: Float[Array, "N S H"],
    table: Int[Array, "B K P"],
    in_ring: Int[Array, "B K"],
    survivors: Int[Array, "B K"],
    *,
    ring_slots: int,
    blocks: SlotBlocks,
    interpret: bool = False,
) -> SoftmaxPart:
    """Return softmax parts [P B K R] of each row over the pairs of its head, for `core.slot_attention.merge_parts`.

    Logical slot c of a head is place c % S of page `table[..., c // S]`. Those in [0, in_ring) and in
    [ring_slots, ring_slots + survivors) hold a pair, which every row sees; `ring_slots` is a multiple of S. Blocks
    beyond a head's last pair are not read, and the contents of other slots have no effect. The number of parts is as in
    `slot_attention_gpu.attend_slots`.
    """
    page_size, columns = k_pages.shape[1], table.shape[2]
    assert ring_slots % page_size == 0, (ring_slots, page_size)
    plan = PagePlan.of(
        rows, k_pages.dtype, columns * page_size, blocks, interpret, ring_slots=ring_slots, page_size=page_size
    )
    of_heads = (fold_heads(x) for x in (table, in_ring, survivors))
    return run(plan, page_attention, Refs, _barriers(plan), rows, k_pages, v_pages, *of_heads)


@dataclass(frozen=True)
class PagePlan(RowPlan):
    """Static facts of a call."""

    ring_slots: int
    page_size: int

    @property
    def piece(self) -> int:
        """Slots of a copy: a page, or a part of one if blocks are smaller."""
        return math.gcd(self.blocks.keys, self.page_size)


class Refs(NamedTuple):
    """Inputs and results in global memory; names that end in _s are shared memory, and the rest are barriers."""

    rows: Any  # [B*K padded H]
    k_pages: Any  # [N S H]
    v_pages: Any  # [N S H]
    table: Any  # [B*K P]
    in_ring: Any  # [B*K]
    survivors: Any  # [B*K]
    row_max: Any  # as in `slot_attention_gpu.Refs`, like everything below
    row_sum: Any
    acc: Any
    rows_s: Any
    k_s: Any
    v_s: Any
    row_max_s: Any
    row_sum_s: Any
    acc_s: Any
    rows_full: Any
    full: Any
    empty: Any
    k_wide_s: Any
    v_wide_s: Any
    dead_zeroed: Any


class Pairs(NamedTuple):
    """Which logical slots of a head hold a pair."""

    in_ring: Any
    ring_slots: int
    survivors: Any

    @property
    def used(self) -> Any:
        """Return 1 + the last slot that holds a pair; 0 if none does."""
        return jnp.where(self.survivors > 0, self.ring_slots + self.survivors, self.in_ring)

    def visibility(self, plan: PagePlan, first: Any) -> Visibility:
        """Return what every row sees of the block of slots from `first` on."""
        end, last = first + plan.blocks.keys, self.ring_slots + self.survivors
        held = lambda shape, axis: holds_pair(first + plan.ops.iota(shape, axis), *self)
        some_dead = (end > last) | (jnp.maximum(first, self.in_ring) < jnp.minimum(end, self.ring_slots))
        return Visibility(
            some_visible=(first < self.in_ring) | ((first < last) & (end > self.ring_slots)),
            all_visible=~some_dead,
            some_dead=some_dead,
            visible=lambda shape: held(shape, 1),
            alive=lambda shape: held(shape, 0),
        )


def _barriers(plan: PagePlan) -> dict[str, Any]:
    """Return the barriers at which copies arrive, by name."""
    copies = 2 * plan.blocks.keys // plan.piece
    return {
        "rows_full": plgpu.Barrier(num_arrivals=plan.own_groups),
        "full": plgpu.Barrier(num_arrivals=copies, num_barriers=plan.blocks.steps),
    }


def page_attention(plan: PagePlan, refs: Refs) -> None:
    """The kernel: what each warpgroup does."""
    head, thread = lax.axis_index("head"), lax.axis_index("thread")
    pairs = Pairs(refs.in_ring[head], plan.ring_slots, refs.survivors[head])
    share = Share.of(plan, pairs.used)

    @pl.when(thread < COMPUTE)
    def _():
        plgpu.set_max_registers(232, action="increase")
        plgpu.barrier_wait(refs.rows_full)
        attend(plan, refs, share, thread, lambda block, _: pairs.visibility(plan, block * plan.blocks.keys))

    pl.when(thread == COMPUTE)(lambda: _copy(plan, refs, share))


def _copy(plan: PagePlan, refs: Refs, share: Share) -> None:
    """The copying warpgroup: the rows once, then block after block of pages into buffers that are free."""
    plgpu.set_max_registers(40, action="decrease")
    copy_rows(plan, refs, share)
    last_column = refs.table.shape[1] - 1

    def places(n):
        """Return page and first place of the pieces of a block; a block may be longer than the rest of the table."""
        starts = [(share.first + n) * plan.blocks.keys + start for start in range(0, plan.blocks.keys, plan.piece)]
        columns = [jnp.minimum(lax.div(start, jnp.int32(plan.page_size)), last_column) for start in starts]
        offsets = [lax.rem(start, jnp.int32(plan.page_size)) for start in starts]
        return [(refs.table[share.head, column], offset) for column, offset in zip(columns, offsets, strict=True)]

    def copy_block(places, stage):
        for i, (page, offset) in enumerate(places):
            target = stage, pl.ds(i * plan.piece, plan.piece)
            for pages, buffers in ((refs.k_pages, refs.k_s), (refs.v_pages, refs.v_s)):
                source = pages.at[page, pl.ds(offset, plan.piece)]
                plgpu.copy_gmem_to_smem(source, buffers.at[target], refs.full.at[stage])

    copy_blocks(share.number, plan.blocks.steps, [(refs.empty, copy_block)], places)
