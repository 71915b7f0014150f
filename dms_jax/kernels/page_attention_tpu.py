"""Attention of query rows over the pages of their KV heads on a TPU, for decode and for survivors behind a chunk.

The grid is (cores, B K / cores, blocks of rows). A program reads those pages of its head that hold a pair, a block of
some pages at a time: one block is copied from the arena while the one before it is multiplied, and during its last
block a program begins to copy the first block of the next program. So a head costs what its own pairs cost, however
long others are. Decode is bound by HBM, long chunks by the MXU.
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

MAX_TABLE = 2**16  # entries of the table in one call: 256 KiB, because scalar memory has 1 MiB on all chips


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
    """Do the work of `core.paged_attention.attend_pages`; the result is one part [1 B K R].

    `blocks.keys` is the number of pairs of a block, which has at least one page. A table that is too large for scalar
    memory is divided by heads, so that several calls follow each other.
    """
    b, heads, num_rows, h = rows.shape
    page_size, columns = k_pages.shape[1], table.shape[2]
    block_r = min(blocks.rows, num_rows)
    rows = fold_heads(jnp.pad(rows, ((0, 0), (0, 0), (0, -num_rows % block_r), (0, 0))))
    lanes, ring_pages = slots_in_lanes(h), ring_slots // page_size
    if lanes:
        k_pages, v_pages = k_pages.swapaxes(1, 2), v_pages.swapaxes(1, 2)
    arenas = [in_hbm(x, interpret) for x in (k_pages, v_pages)]
    plan = Plan(columns, page_size, ring_pages, min(columns, max(1, blocks.keys // page_size)), lanes)
    per_call = max(1, MAX_TABLE // columns // CORES * CORES)
    by_head = fold_heads(table), in_ring.reshape(-1), survivors.reshape(-1), rows
    calls = [
        _call(plan, block_r, interpret, *(x[start : start + per_call] for x in by_head), *arenas)
        for start in range(0, b * heads, per_call)
    ]
    acc, statistics = (jnp.concatenate(x) if len(x) > 1 else x[0] for x in zip(*calls, strict=True))
    part = lambda x: x[:, :num_rows].reshape(1, b, heads, num_rows, *x.shape[2:])
    return SoftmaxPart(part(statistics[:, 0]), part(statistics[:, 1]), part(acc))


class Plan(NamedTuple):
    """Static facts of a call."""

    columns: int  # of the table
    page_size: int
    ring_pages: int  # columns of the table that are those of the ring
    pages: int  # of a block
    lanes: bool  # `slots_in_lanes`: pages are [H, pairs]


class Refs(NamedTuple):
    """Scalars, blocks of a program in VMEM, arenas in HBM, and scratch memory."""

    table: Any  # [heads * columns]
    in_ring: Any  # [heads]
    survivors: Any  # [heads]
    rows: Any  # [rows, H]
    k_pages: Any  # [N, pairs, H]
    v_pages: Any
    acc: Any  # [rows, H]
    statistics: Any  # [2, rows]: max and sum
    max: Any  # [rows, 128]: online softmax
    sum: Any
    keys: Any  # [2, pairs of a block, H]; places without a pair may hold anything, even NaN
    values: Any
    ready: Any  # for each of the two buffers
    buffer: Any  # [1]: which buffer the first block of the program is in


def _call(plan: Plan, block_r: int, interpret: bool, table, in_ring, survivors, rows, k_pages, v_pages) -> Any:
    """Return the accumulators [heads, R, H] and the statistics [heads, 2, R] of some heads."""
    heads, num_rows, h = rows.shape
    cores = CORES if heads % CORES == 0 else 1
    pairs = plan.pages * plan.page_size
    own_rows = lambda core, head, i, *_: (core * (heads // cores) + head, i, 0)
    buffers = pltpu.VMEM((2, h, pairs) if plan.lanes else (2, pairs, h), k_pages.dtype)
    return pl.pallas_call(
        partial(_kernel, plan),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(cores, heads // cores, num_rows // block_r),
            in_specs=[pl.BlockSpec((None, block_r, h), own_rows), *[pl.BlockSpec(memory_space=pltpu.HBM)] * 2],
            out_specs=[
                pl.BlockSpec((None, block_r, h), own_rows),
                pl.BlockSpec((None, 2, block_r), lambda *at: (own_rows(*at)[0], 0, at[2])),
            ],
            scratch_shapes=[
                *[pltpu.VMEM((block_r, LANES), jnp.float32)] * 2,
                *[buffers] * 2,
                pltpu.SemaphoreType.DMA((2,)),
                pltpu.SMEM((1,), jnp.int32),
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct(rows.shape, jnp.float32),
            jax.ShapeDtypeStruct((heads, 2, num_rows), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary"), vmem_limit_bytes=VMEM_LIMIT
        ),
        interpret=interpret,
        name="attend_pages",
    )(table.reshape(-1), in_ring, survivors, rows, k_pages, v_pages)


def _kernel(plan: Plan, *arrays) -> None:
    refs = Refs(*arrays)
    core, local, i = (pl.program_id(axis) for axis in range(3))
    heads_per_core, row_blocks = pl.num_programs(1), pl.num_programs(2)
    head, size = core * heads_per_core + local, plan.page_size
    block_s = plan.pages * size
    pages_of = lambda pairs: lax.div(pairs + size - 1, size)

    def copied(head, block, buffer, do):
        """Apply `do` to the copies of a block: the pages of the ring that hold a pair, and behind them the others."""
        in_ring = pages_of(refs.in_ring[head])
        used = in_ring + pages_of(refs.survivors[head])

        def copy_page(index, place):
            column = jnp.where(index < in_ring, index, index - in_ring + plan.ring_pages)
            page, pairs = refs.table[head * plan.columns + column], pl.ds(place * size, size)
            for arena, pages in ((refs.k_pages, refs.keys), (refs.v_pages, refs.values)):
                target = pages.at[buffer, :, pairs] if plan.lanes else pages.at[buffer, pairs]
                do(pltpu.make_async_copy(arena.at[page], target, refs.ready.at[buffer]))

        for place in range(plan.pages):
            index = block * plan.pages + place
            pl.when(index < used)(partial(copy_page, index, place))

    softmax = OnlineSoftmax(refs.acc, refs.max, refs.sum)
    softmax.clear()
    in_ring, survivors = refs.in_ring[head], refs.survivors[head]
    ring_end = pages_of(in_ring) * size  # of the pairs as they lie in the blocks
    end = ring_end + survivors
    num_blocks = lax.div(end + block_s - 1, block_s)

    @pl.when((local == 0) & (i == 0))
    def _():
        refs.buffer[0] = 0
        copied(head, 0, 0, lambda copy: copy.start())

    first_buffer = refs.buffer[0]
    next_local = jnp.where(i + 1 < row_blocks, local, local + 1)
    next_head = core * heads_per_core + jnp.minimum(next_local, heads_per_core - 1)

    def copy_next(block, buffer):
        """Begin to copy the block `block` of this program, or if it has none, the first block of the next program."""
        here = block < num_blocks

        @pl.when(here | (next_local < heads_per_core))
        def _():
            copied(jnp.where(here, head, next_head), jnp.where(here, block, 0), buffer, lambda copy: copy.start())

    @pl.when(num_blocks == 0)
    def _():
        copy_next(0, first_buffer)

    def attend_block(j, _):
        buffer, start = lax.rem(first_buffer + j, 2), j * block_s
        copy_next(j + 1, 1 - buffer)
        copied(head, j, buffer, lambda copy: copy.wait())
        attend = lambda visible: softmax.add(
            refs.rows[...], refs.keys[buffer], refs.values[buffer], visible, plan.lanes
        )
        # The last page of the ring, and the last page of survivors, need not be full.
        no_gap = (start + block_s <= in_ring) | (start >= ring_end) | (in_ring == ring_end)
        is_full = no_gap & (start + block_s <= end)

        @pl.when(is_full)
        def _():
            attend(None)

        @pl.when(jnp.logical_not(is_full))
        def _():
            pair = start + lax.broadcasted_iota(jnp.int32, (1, block_s), 1)
            attend(((pair < in_ring) | (pair >= ring_end)) & (pair < end))

    lax.fori_loop(0, num_blocks, attend_block, None)
    refs.buffer[0] = lax.rem(first_buffer + num_blocks, 2)
    softmax.write(refs.statistics)
