"""Stream compaction on Hopper: the new pairs of a chunk go into free slots, in place.

XLA computes the slot of each pair from integers, which are a few percent of the bytes. The kernel then only moves rows.
Its grid is (batch x KV head, tile of the chunk). A CTA fetches its tile of keys and values at once and sends each new
row to its slot, with one copy per row. The kernel is bound by the latency of copies and by the bytes of the chunk. It
does not touch slots that are not written.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Bool

from dms_jax.axes import Array
from dms_jax.core.compact_cache import slots_of
from dms_jax.kernels.block_sizes import PlaceBlocks
from dms_jax.kernels.mosaic_gpu import bind, update_in_place
from dms_jax.kernels.operands import Pairs, fold_heads, unfold_heads

ROW_BYTES = 128  # alignment that copies need in shared memory


def write_pairs(
    slots: Pairs,
    pairs: Pairs,
    keep: Bool[Array, "B K C"],
    new: Bool[Array, "B K T"],
    *,
    blocks: PlaceBlocks,
    interpret: bool = False,
) -> Pairs:
    """Do `core.compact_cache.write_pairs` on the slots of a layer, in place if the caller donates them."""
    h, length = slots.k.shape[3], new.shape[2]
    tile_pairs = min(blocks.pairs, -(-length // 32) * 32)  # a copy on hardware is a multiple of 128 bytes
    padding, min_width = -length % tile_pairs, ROW_BYTES // slots.k.dtype.itemsize

    def tile(x, dtype, fill=0):  # [B K T ...] -> [B*K, T', ...], with rows of keys and values of at least ROW_BYTES
        widths = [(0, 0), (0, 0), (0, padding)] + [(0, max(0, min_width - h))] * (x.ndim - 3)
        return fold_heads(jnp.pad(x.astype(dtype), widths, constant_values=fill))

    tiles = [tile(x, old.dtype) for x, old in zip(pairs, slots, strict=True)]
    slot = tile(slots_of(keep, new), jnp.int32, slots.k.shape[2])
    smem = [plgpu.SMEM((tile_pairs, *x.shape[2:]), x.dtype) for x in (*tiles, slot)]
    names = "k_s", "v_s", "position_s", "expiry_s", "score_s", "slot_s"
    updated = update_in_place(
        bind(send_rows, Plan(tile_pairs, slots.k.shape[2], h), Refs),
        [fold_heads(x) for x in slots],
        [*tiles, slot],
        grid={"head": slot.shape[0], "tile": slot.shape[1] // tile_pairs},
        scratch={**dict(zip(names, smem, strict=True)), "arrived": plgpu.Barrier(num_arrivals=len(names))},
        interpret=interpret,
    )
    return Pairs(*(unfold_heads(x, keep.shape) for x in updated))


class Plan(NamedTuple):
    """Static sizes of a call."""

    pairs: int  # per tile
    capacity: int
    head_dim: int


class Refs(NamedTuple):
    """The slots of the layer [B*K C ...], the pairs of the chunk [B*K T' ...], and a tile of pairs in shared memory."""

    k: Any
    v: Any
    position: Any
    expiry: Any
    score: Any
    new_k: Any
    new_v: Any
    new_position: Any
    new_expiry: Any
    new_score: Any
    slot: Any  # the slot of each pair; `capacity` for a pair that is not new
    k_s: Any
    v_s: Any
    position_s: Any
    expiry_s: Any
    score_s: Any
    slot_s: Any
    arrived: Any


def send_rows(plan: Plan, refs: Refs) -> None:
    """The kernel: send each new pair of a tile to its slot."""
    head, rows = lax.axis_index("head"), pl.ds(lax.axis_index("tile") * plan.pairs, plan.pairs)
    sources = refs.new_k, refs.new_v, refs.new_position, refs.new_expiry, refs.new_score, refs.slot
    targets = refs.k_s, refs.v_s, refs.position_s, refs.expiry_s, refs.score_s, refs.slot_s
    for source, target in zip(sources, targets, strict=True):
        plgpu.copy_gmem_to_smem(source.at[head, rows], target, refs.arrived)
    plgpu.barrier_wait(refs.arrived)

    def one_pair(pair, _):
        slot = refs.slot_s[pair]

        @pl.when(slot < plan.capacity)
        def _():
            plgpu.copy_smem_to_gmem(refs.k_s.at[pair, pl.ds(0, plan.head_dim)], refs.k.at[head, slot])
            plgpu.copy_smem_to_gmem(refs.v_s.at[pair, pl.ds(0, plan.head_dim)], refs.v.at[head, slot])
            refs.position[head, slot] = refs.position_s[pair]
            refs.expiry[head, slot] = refs.expiry_s[pair]
            refs.score[head, slot] = refs.score_s[pair]

    lax.fori_loop(0, plan.pairs, one_pair, None)
    plgpu.wait_smem_to_gmem(0)
