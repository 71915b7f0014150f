"""Stream compaction on Hopper: the pairs of a chunk that stay go where slots are free, in place.

XLA computes the slot of each pair, from integers that are a few percent of the bytes. The kernel then only moves rows: grid
(batch x KV head, tile of the chunk), a CTA fetches its tile of keys and values at once and sends each row that comes to its
slot, one copy a row. Bound by the latency of copies and by the bytes of the chunk; slots that are not written are not touched.
"""

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Bool, Float, Int

from dms_jax.axes import Array
from dms_jax.core.compact_cache import slots_of
from dms_jax.kernels.block_sizes import PlaceBlocks
from dms_jax.kernels.mosaic_gpu import update_in_place

ROW_BYTES = 128  # copies want their end in shared memory aligned to this


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
) -> tuple[Array, ...]:
    """`core.compact_cache.write_pairs` on the five arrays of a layer; in place where the caller donates them."""
    b, heads, capacity, h = k.shape
    pairs = min(blocks.pairs, -(-comes.shape[2] // 32) * 32)  # a copy on hardware is a multiple of 128 bytes
    pad, least = -comes.shape[2] % pairs, ROW_BYTES // k.dtype.itemsize

    def tile(x, dtype, fill=0):  # [B K T ...] -> [B K, T', ...], rows of keys and values at least ROW_BYTES long
        widths = [(0, 0), (0, 0), (0, pad)] + [(0, max(0, least - h))] * (x.ndim - 3)
        x = jnp.pad(x.astype(dtype), widths, constant_values=fill)
        return x.reshape(b * heads, *x.shape[2:])

    new = (
        tile(new_k, k.dtype),
        tile(new_v, v.dtype),
        tile(new_position, jnp.int32),
        tile(new_expiry, jnp.int32),
        tile(new_score, jnp.float32),
    )
    slot = tile(slots_of(stays, comes), jnp.int32, capacity)
    flat = [x.reshape(b * heads, *x.shape[2:]) for x in (k, v, position, expiry, score)]
    moved = _send(flat, new, slot, pairs, interpret)
    return tuple(x.reshape(b, heads, *x.shape[1:]) for x in moved)


def _send(layer, new, slot, pairs, interpret):
    flat_heads, capacity, h = layer[0].shape

    def send_rows(
        k_ref,
        v_ref,
        position_ref,
        expiry_ref,
        score_ref,
        new_k_ref,
        new_v_ref,
        new_position_ref,
        new_expiry_ref,
        new_score_ref,
        slot_ref,
        *,
        k_s,
        v_s,
        position_s,
        expiry_s,
        score_s,
        slot_s,
        arrived,
    ):
        head, of_tile = lax.axis_index("head"), pl.ds(lax.axis_index("tile") * pairs, pairs)
        sources = new_k_ref, new_v_ref, new_position_ref, new_expiry_ref, new_score_ref, slot_ref
        for source, target in zip(sources, (k_s, v_s, position_s, expiry_s, score_s, slot_s), strict=True):
            plgpu.copy_gmem_to_smem(source.at[head, of_tile], target, arrived)
        plgpu.barrier_wait(arrived)

        def one_pair(pair, _):
            slot = slot_s[pair]

            @pl.when(slot < capacity)
            def _():
                plgpu.copy_smem_to_gmem(k_s.at[pair, pl.ds(0, h)], k_ref.at[head, slot])
                plgpu.copy_smem_to_gmem(v_s.at[pair, pl.ds(0, h)], v_ref.at[head, slot])
                position_ref[head, slot] = position_s[pair]
                expiry_ref[head, slot] = expiry_s[pair]
                score_ref[head, slot] = score_s[pair]

        lax.fori_loop(0, pairs, one_pair, None)
        plgpu.wait_smem_to_gmem(0)

    smem = [plgpu.SMEM((pairs, *x.shape[2:]), x.dtype) for x in (*new, slot)]
    names = "k_s", "v_s", "position_s", "expiry_s", "score_s", "slot_s"
    return update_in_place(
        send_rows,
        layer,
        [*new, slot],
        grid={"head": flat_heads, "tile": slot.shape[1] // pairs},
        scratch={**dict(zip(names, smem, strict=True)), "arrived": plgpu.Barrier(num_arrivals=len(names))},
        interpret=interpret,
    )
