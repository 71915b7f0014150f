"""The loop over blocks of keys on a Hopper GPU: which blocks a block of queries needs, in which order, and how they are copied.

The forward pass and the gradient of the queries share it. Two warpgroups compute, each with half of a block of queries, and a third one
copies. All three take the same number of steps, because each of them must arrive at every barrier.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Float, Int

from dms_jax.axes import Array
from dms_jax.core.visibility import MASKED
from dms_jax.kernels.block_sizes import TrainBlocks
from dms_jax.kernels.mosaic_gpu import ROW, Ops

COMPUTE = 2  # warpgroups that compute
LOG2E = math.log2(math.e)  # the hardware has exp2, so the factor of the scores includes log2(e)


def exponent(head_dim: int) -> float:
    """The factor from a raw score q.k to an exponent of 2."""
    return head_dim**-0.5 * LOG2E


def raw_gate(log_keep: Array, head_dim: int) -> Array:
    """The number that the gate adds to a raw score."""
    return log_keep * head_dim**0.5


def is_live(log_keep: Float[Array, "B K T"], block: int) -> Array:
    """bool [B K T/block]: whether any key of a block is not evicted, and thus counts outside the window."""
    b, heads, length = log_keep.shape
    return log_keep.reshape(b, heads, length // block, block).max(-1) > MASKED / 2


def live_blocks(log_keep: Float[Array, "B K T"], block: int) -> tuple[Int[Array, "B K n"], Int[Array, "B K n"]]:
    """The live blocks in ascending order, followed by the others; and the number of live blocks before each block."""
    live = is_live(log_keep, block)
    before = jnp.cumsum(live, -1, dtype=jnp.int32) - live
    return jnp.argsort(~live, axis=-1, stable=True).astype(jnp.int32), before.astype(jnp.int32)


class KeySections(NamedTuple):
    """Blocks of keys by what their scores need, from the latest on. [past, end) hold the diagonal, [inside, past) lie within the window of
    every query, [outside, inside) straddle its edge, and [0, outside) lie beyond it, where only live blocks count."""

    outside: Array
    inside: Array
    past: Array
    end: Array

    @classmethod
    def of_queries(cls, first: Array, rows: int, block: int, window_size: int) -> "KeySections":
        """The sections for the queries [first, first + rows)."""
        count = lambda length: lax.div(jnp.maximum(length, 0), jnp.int32(block))
        outside, past = count(first - window_size), count(first)
        inside = jnp.minimum(jnp.maximum(count(first + rows - 1 - window_size + block - 1), outside), past)
        return cls(outside, inside, past, count(first + rows - 1) + 1)

    def fold(self, step: Any, num_live: Array, block: int, rows: int, window_size: int, carry: Any) -> Any:
        """Run step(n, carry, gate, causal) for all blocks, the diagonal first; `gate` is None, "all" or "outside"."""
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
        """The block of step n, for steps before those that follow the list of live blocks."""
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
        """The first query of a CTA, and its blocks of keys. The longest rows start first."""
        first = (self.length // self.blocks.q - 1 - lax.axis_index("block")) * self.blocks.q
        return first, KeySections.of_queries(first, self.blocks.q, self.blocks.k, self.window_size)

    def segment_scratch(self) -> dict[str, Any]:
        """Shared memory for the segments of queries and keys, if there are any."""
        if not self.has_segments:
            return {}
        queries = plgpu.SMEM((COMPUTE, self.rows), jnp.int32)
        return {"q_seg_s": queries, "k_seg_s": plgpu.SMEM((self.blocks.steps, self.blocks.k), jnp.int32)}


class Tile(NamedTuple):
    """A block of scores [queries, keys]: where it lies, and what its mask may need."""

    q_first: Array
    k_first: Array
    shape: tuple[int, int]
    window_size: int
    q_segments: Array | None  # [queries], COLUMN


def gated_scores(ops: Ops, s: Array, tile: Tile, keep_s: Any, segments_s: Any, gate: str | None, causal: bool) -> Array:
    """Apply gate and mask to raw scores; `keep_s` and `segments_s` belong to the keys."""
    over_rows = lambda x: lax.broadcast_in_dim(x, tile.shape, [1])
    # The comparison keeps the thread's two rows on one side and its columns on the other, so few distinct numbers need registers.
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
    """The loop of the copying warpgroup. Each of `parts` is a barrier for buffers that are free again, and copy(block, slot)."""
    near = sections.end - sections.outside
    total = near + num_live

    def copy(n, _):
        slot = lax.rem(n, jnp.int32(steps))
        j = jnp.where(n < near, sections.block_of(n), live_ref[jnp.maximum(n - near, 0)])
        for free, copy_part in parts:

            @pl.when(n >= steps)
            def _():
                plgpu.barrier_wait(free.at[slot])  # noqa: B023

            copy_part(j, slot)

    def drain(n, _):
        for free, _ in parts:
            plgpu.barrier_wait(free.at[lax.rem(n, jnp.int32(steps))])

    lax.fori_loop(0, total, copy, None)
    lax.fori_loop(jnp.maximum(total - steps, 0), total, drain, None)
