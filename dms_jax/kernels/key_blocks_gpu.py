"""The loop over blocks of keys on a Hopper GPU: which blocks a block of queries needs, and in which order.

The forward pass and the gradient of the queries share it. Two warpgroups compute, each with half of a block of queries,
and a third one copies. All three take the same number of steps, because each of them must arrive at every barrier.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Float, Int

from dms_jax.axes import Array
from dms_jax.core.visibility import MASKED
from dms_jax.kernels.block_sizes import TrainBlocks
from dms_jax.kernels.mosaic_gpu import COMPUTE, ROW, Ops, copy_blocks

LOG2E = math.log2(math.e)  # the hardware has exp2, so the factor of the scores includes log2(e)


def exponent(head_dim: int) -> float:
    """Return the factor that turns a raw score q.k into an exponent of 2."""
    return head_dim**-0.5 * LOG2E


def raw_gate(log_keep: Array, head_dim: int) -> Array:
    """Return the gate in the units of raw scores q.k, which it is added to."""
    return log_keep * head_dim**0.5


def is_live(log_keep: Float[Array, "B K T"], block: int) -> Array:
    """Return bool [B K T/block]: whether a block has a key that is not evicted, and thus counts outside the window."""
    b, heads, length = log_keep.shape
    return log_keep.reshape(b, heads, length // block, block).max(-1) > MASKED / 2


def live_blocks(log_keep: Float[Array, "B K T"], block: int) -> tuple[Int[Array, "B K n"], Int[Array, "B K n"]]:
    """Order the n = T/block blocks: the live ones first, both groups ascending; and count the live ones before each."""
    live = is_live(log_keep, block)
    before = jnp.cumsum(live, -1, dtype=jnp.int32) - live.astype(jnp.int32)
    return jnp.argsort(~live, axis=-1, stable=True).astype(jnp.int32), before


class KeySections(NamedTuple):
    """Ranges of blocks of keys, by the mask and gate that their scores need.

    Blocks in [past, end) contain the diagonal, and blocks in [inside, past) lie within the window of every query.
    Blocks in [outside, inside) straddle the edge of the window, and blocks in [0, outside) lie beyond it, where only
    live blocks count.
    """

    outside: Array
    inside: Array
    past: Array
    end: Array

    @classmethod
    def of_queries(cls, first: Array, rows: int, block: int, window_size: int) -> "KeySections":
        """Return the sections for the queries [first, first + rows)."""
        count = lambda length: lax.div(jnp.maximum(length, 0), jnp.int32(block))
        outside, past = count(first - window_size), count(first)
        inside = jnp.minimum(jnp.maximum(count(first + rows - 1 - window_size + block - 1), outside), past)
        return cls(outside, inside, past, count(first + rows - 1) + 1)

    def fold(self, step: Any, num_live: Array, block: int, rows: int, window_size: int, carry: Any) -> Any:
        """Run step(n, carry, gate, causal) for all blocks, from the diagonal on; `gate` is None, "all" or "outside"."""
        near = "outside" if window_size < rows + block else None
        sections = [
            (self.end - self.past, {"gate": near, "causal": True}),
            (self.end - self.inside, {"gate": None, "causal": False}),
            (self.end - self.outside, {"gate": "outside", "causal": False}),
            (self.end - self.outside + num_live, {"gate": "all", "causal": False}),
        ]
        start = jnp.int32(0)
        for stop, how in sections:
            carry = lax.fori_loop(start, stop, lambda n, carry, how=how: step(n, carry, **how), carry)
            start = stop
        return carry

    def block_of(self, n: Array) -> Array:
        """Return the block of step n, before the steps that follow the list of live blocks."""
        return self.end - 1 - n


class QueryPlan(NamedTuple):
    """Static facts of a call of a kernel that holds a block of queries."""

    ops: Ops
    blocks: TrainBlocks
    window_size: int
    length: int
    head_dim: int
    dtype: Any
    has_segments: bool

    @property
    def rows(self) -> int:
        """Queries per warpgroup."""
        return self.blocks.q // COMPUTE

    def first_and_sections(self) -> tuple[Array, KeySections]:
        """Return the first query of a CTA, and its blocks of keys. CTAs with the most blocks start first."""
        first = (self.length // self.blocks.q - 1 - lax.axis_index("block")) * self.blocks.q
        return first, KeySections.of_queries(first, self.blocks.q, self.blocks.k, self.window_size)

    def segment_scratch(self) -> dict[str, Any]:
        """Return shared memory for the segments of queries and keys, if the call has segments."""
        if not self.has_segments:
            return {}
        queries = plgpu.SMEM((COMPUTE, self.rows), jnp.int32)
        return {"q_seg_s": queries, "k_seg_s": plgpu.SMEM((self.blocks.steps, self.blocks.k), jnp.int32)}


class Tile(NamedTuple):
    """A block of scores [queries, keys]: its place, and what its mask may need."""

    q_first: Array
    k_first: Array
    shape: tuple[int, int]
    window_size: int
    q_segments: Array | None  # [queries], COLUMN


def gated_scores(ops: Ops, s: Array, tile: Tile, keep_s: Any, segments_s: Any, gate: str | None, causal: bool) -> Array:
    """Apply gate and mask to raw scores; `keep_s` and `segments_s` are those of the keys."""
    over_rows = lambda x: lax.broadcast_in_dim(x, tile.shape, [1])
    # With rows on one side of the comparison and columns on the other, few distinct numbers need registers.
    later_than = lambda shift: (
        ops.iota(tile.shape, 0) + (tile.q_first - tile.k_first - shift) >= ops.iota(tile.shape, 1)
    )
    if gate is not None:
        gated = s + over_rows(ops.load(keep_s, ROW))
        s = gated if gate == "all" else jnp.where(later_than(tile.window_size + 1), gated, s)
    if causal:
        s = jnp.where(later_than(0), s, MASKED)
    if tile.q_segments is not None:
        same = lax.broadcast_in_dim(tile.q_segments, tile.shape, [0]) == over_rows(ops.load(segments_s, ROW))
        s = jnp.where(same, s, MASKED)
    return s


def copy_key_blocks(
    sections: KeySections, num_live: Array, live_ref: Any, steps: int, parts: Sequence[tuple[Any, Callable[..., None]]]
) -> None:
    """Copy the blocks of keys that the computing warpgroups need, in their order; `parts` as in `copy_blocks`."""
    near = sections.end - sections.outside
    block_of = lambda n: jnp.where(n < near, sections.block_of(n), live_ref[jnp.maximum(n - near, 0)])
    copy_blocks(near + num_live, steps, parts, block_of)
