"""Attention with the DMS gate on a TPU, value and gradient, in O(T) memory: what `core.chunked_attention` computes, as kernels.

Three kernels walk over blocks of scores (FlashAttention, arXiv:2205.14135): the forward pass and dq hold a block of
queries and meet the keys in turn, dk, dv and the gate's gradient hold a block of keys and meet the queries of all heads
of their group. Per query row only the log-sum-exp is kept, and `delta` = d_out . out is made for the backward pass; both
lie in memory as rows of length T. A kernel turns a row into a column where it needs one, once per block it holds.

A step whose block is not needed computes nothing and names a block that is there already or needed next, so that
nothing is fetched for it: blocks of the future, and blocks outside the window all of whose keys are gone.
"""

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Float, Int

from dms_jax.axes import Array
from dms_jax.core.chunked_attention import name_residuals, softmax_delta
from dms_jax.core.visibility import MASKED
from dms_jax.kernels.block_sizes import TrainBlocks
from dms_jax.kernels.mosaic_tpu import LANES

LOG2_E = math.log2(math.e)  # scores are kept in powers of 2 inside the kernels: exp2 is what the hardware has
INSIDE, OUTSIDE, MIXED = range(
    3
)  # where a block of scores lies: no gate, gate everywhere, or cut by the window or by causality


def attend(
    q: Float[Array, "B K G T H"],
    k: Float[Array, "B K T H"],
    v: Float[Array, "B K T H"],
    log_keep: Float[Array, "B K T"],
    segments: Int[Array, "B T"] | None,
    *,
    window_size: int,
    blocks: TrainBlocks,
    interpret: bool = False,
) -> Float[Array, "B K G T H"]:
    """See `core.chunked_attention.with_heads_folded`. T is a multiple of both block sizes, and on hardware they are of 128."""
    assert q.shape[3] % blocks.q == 0 and q.shape[3] % blocks.k == 0, (q.shape, blocks)
    return _attend(q, k, v, log_keep, segments, window_size, blocks, interpret)


@partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7))
def _attend(q, k, v, log_keep, segments, window_size, blocks, interpret):
    return _forward(q, k, v, log_keep, segments, window_size, blocks, interpret)[0]


class Walk(NamedTuple):
    """Which blocks are needed. All sizes are static; i is a block of queries, j one of keys, and `next_alive` the first
    block from j on that has a key which is not gone."""

    window: int
    q: int
    k: int
    num_q: int
    num_k: int

    def key_block(self, i, j, next_alive):
        """j if queries i need it, else the block they need next, or their last."""
        first_near = lax.div(jnp.maximum(i * self.q - self.window, 0), self.k)
        last = lax.div((i + 1) * self.q - 1, self.k)
        return jnp.minimum(jnp.minimum(next_alive, jnp.maximum(j, first_near)), last)

    def query_block(self, i, j, next_alive):
        """i if it needs keys j, else the first or the last one that does."""
        first = lax.div(j * self.k, self.q)
        last_near = jnp.minimum(lax.div(self.window + (j + 1) * self.k - 1, self.q), self.num_q - 1)
        return jnp.clip(i, first, jnp.where(next_alive == j, self.num_q - 1, last_near))

    def cases(self, i, j, needed):
        """(condition, where the block lies); exactly one holds if the block is needed. Most blocks need no mask."""
        past = (j + 1) * self.k - 1 <= i * self.q
        inside = past & ((i + 1) * self.q - 1 - j * self.k <= self.window)
        outside = i * self.q - (j + 1) * self.k + 1 > self.window  # hence past
        return (needed & inside, INSIDE), (needed & outside, OUTSIDE), (needed & ~inside & ~outside, MIXED)

    def distance(self, i, j, query_axis):
        """q_pos - k_pos over the block."""
        shape = (self.q, self.k) if query_axis == 0 else (self.k, self.q)
        within = lax.broadcasted_iota(jnp.int32, shape, query_axis) - lax.broadcasted_iota(
            jnp.int32, shape, 1 - query_axis
        )
        return within + (i * self.q - j * self.k)


def _walk(q, window_size, blocks):
    t = q.shape[3]
    return Walk(min(window_size, t), blocks.q, blocks.k, t // blocks.q, t // blocks.k)


def _next_alive(log_keep, walk):
    """`next_alive` of every block of every head, flat [B * K * num_k]: it lies in scalar memory, where rows would be padded."""
    alive = log_keep.reshape(*log_keep.shape[:2], walk.num_k, walk.k).max(-1) > MASKED / 2
    block = lax.broadcasted_iota(jnp.int32, alive.shape, 2)
    return lax.cummin(jnp.where(alive, block, walk.num_k), axis=2, reverse=True).reshape(-1)


def _lookup(next_alive_ref, b, h, j, heads, walk):
    return next_alive_ref[(b * heads + h) * walk.num_k + j]


def _dot(a, b, contract):
    """fp32 product over axis 1 of `a` and axis `contract` of `b`; fp32 operands are multiplied as such, not as bf16."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else lax.Precision.DEFAULT
    return lax.dot_general(
        a, b, (((1,), (contract,)), ((), ())), precision=precision, preferred_element_type=jnp.float32
    )


def _column(row):
    """[1, n] -> [n, LANES]: a column is held with its values repeated over all lanes."""
    return jnp.broadcast_to(row, (LANES, row.shape[1])).T


def _row(column):
    """[n, LANES] -> [1, n]"""
    return column.T[:1]


def _spread(column, width):
    """[n, LANES] -> [n, width]"""
    return column[:, :width] if width <= LANES else jnp.concatenate([column] * (width // LANES), axis=1)


def _masked_scores(s, keep, same_segment, place, distance, window):
    """Scores of a block after gate and mask, in powers of 2. `keep` broadcasts against `s`, and so does `distance`, which only MIXED blocks have."""
    if place == OUTSIDE:
        s = s + keep
    if place == MIXED:
        s = jnp.where(distance < 0, MASKED, s + jnp.where(distance > window, keep, 0.0))
    return s if same_segment is None else jnp.where(same_segment, s, MASKED)


# Grid (B, K, G, num_q, num_k): the keys are the sequential axis and fill the scratch. Bound by the MXU and by exp.
def _forward_kernel(
    next_alive_ref,  # [B * K * num_k] in scalar memory
    q_ref,  # [q, H]
    k_ref,  # [k, H]
    v_ref,  # [k, H]
    keep_ref,  # [1, k]
    q_segment_ref,  # [1, q] or None
    k_segment_ref,  # [1, k] or None
    out_ref,  # [q, H]
    log_total_ref,  # [1, q]
    high_ref,  # scratch [q, LANES]: highest score so far
    total_ref,  # scratch [q, LANES]: sum of 2 ** (score - high)
    acc_ref,  # scratch [q, H]
    segment_ref,  # scratch [q, LANES] or None
    *,
    walk: Walk,
    scale: float,
):
    b, h, i, j = (pl.program_id(axis) for axis in (0, 1, 3, 4))

    @pl.when(j == 0)
    def _start():
        high_ref[...] = jnp.full_like(high_ref, MASKED)
        total_ref[...] = jnp.zeros_like(total_ref)
        acc_ref[...] = jnp.zeros_like(acc_ref)
        if segment_ref is not None:
            segment_ref[...] = _column(q_segment_ref[...])

    def meet(place):
        same_segment = None if segment_ref is None else _spread(segment_ref[...], walk.k) == k_segment_ref[...]
        distance = walk.distance(i, j, 0) if place == MIXED else None
        s = _masked_scores(
            _dot(q_ref[...], k_ref[...], 1) * (scale * LOG2_E),
            keep_ref[...] * LOG2_E,
            same_segment,
            place,
            distance,
            walk.window,
        )
        # A row that has met only MASKED scores holds finite rubbish, which the first real score, of its own pair at the latest,
        # multiplies by 2 ** (MASKED - score) = 0.
        high = high_ref[...]
        new_high = jnp.maximum(high, s.max(1, keepdims=True))
        p = jnp.exp2(s - _spread(new_high, walk.k))
        shrink = jnp.exp2(high - new_high)
        high_ref[...] = new_high
        total_ref[...] = total_ref[...] * shrink + p.sum(1, keepdims=True)
        acc_ref[...] = acc_ref[...] * _spread(shrink, acc_ref.shape[1]) + _dot(p.astype(v_ref.dtype), v_ref[...], 0)

    needed = walk.key_block(i, j, _lookup(next_alive_ref, b, h, j, pl.num_programs(1), walk)) == j
    for condition, place in walk.cases(i, j, needed):
        pl.when(condition)(partial(meet, place))

    @pl.when(j == walk.num_k - 1)
    def _finish():
        out_ref[...] = (acc_ref[...] / _spread(total_ref[...], acc_ref.shape[1])).astype(out_ref.dtype)
        log_total_ref[...] = _row(high_ref[...] / LOG2_E + jnp.log(total_ref[...]))


# Grid (B, K, G, num_q, num_k), as the forward kernel.
def _dq_kernel(
    next_alive_ref,  # [B * K * num_k] in scalar memory
    q_ref,  # [q, H]
    k_ref,  # [k, H]
    v_ref,  # [k, H]
    keep_ref,  # [1, k]
    q_segment_ref,  # [1, q] or None
    k_segment_ref,  # [1, k] or None
    d_out_ref,  # [q, H]
    log_total_ref,  # [1, q]
    delta_ref,  # [1, q]
    dq_ref,  # [q, H]
    acc_ref,  # scratch [q, H]
    log_total_column_ref,  # scratch [q, LANES]
    delta_column_ref,  # scratch [q, LANES]
    segment_ref,  # scratch [q, LANES] or None
    *,
    walk: Walk,
    scale: float,
):
    b, h, i, j = (pl.program_id(axis) for axis in (0, 1, 3, 4))

    @pl.when(j == 0)
    def _start():
        acc_ref[...] = jnp.zeros_like(acc_ref)
        log_total_column_ref[...] = _column(log_total_ref[...] * LOG2_E)
        delta_column_ref[...] = _column(delta_ref[...])
        if segment_ref is not None:
            segment_ref[...] = _column(q_segment_ref[...])

    def meet(place):
        same_segment = None if segment_ref is None else _spread(segment_ref[...], walk.k) == k_segment_ref[...]
        distance = walk.distance(i, j, 0) if place == MIXED else None
        s = _masked_scores(
            _dot(q_ref[...], k_ref[...], 1) * (scale * LOG2_E),
            keep_ref[...] * LOG2_E,
            same_segment,
            place,
            distance,
            walk.window,
        )
        p = jnp.exp2(s - _spread(log_total_column_ref[...], walk.k))
        ds = p * (_dot(d_out_ref[...], v_ref[...], 1) - _spread(delta_column_ref[...], walk.k))
        acc_ref[...] += _dot(ds.astype(k_ref.dtype), k_ref[...], 0)

    needed = walk.key_block(i, j, _lookup(next_alive_ref, b, h, j, pl.num_programs(1), walk)) == j
    for condition, place in walk.cases(i, j, needed):
        pl.when(condition)(partial(meet, place))

    @pl.when(j == walk.num_k - 1)
    def _finish():
        dq_ref[...] = (acc_ref[...] * scale).astype(dq_ref.dtype)


# Grid (B, K, num_k, G, num_q): heads of the group and queries are sequential. Scores are transposed, [k, q]: what belongs to
# queries is then a row as it lies in memory, and no product has to transpose a block of scores.
def _dkv_kernel(
    next_alive_ref,  # [B * K * num_k] in scalar memory
    q_ref,  # [q, H]
    k_ref,  # [k, H]
    v_ref,  # [k, H]
    keep_ref,  # [1, k]
    q_segment_ref,  # [1, q] or None
    k_segment_ref,  # [1, k] or None
    d_out_ref,  # [q, H]
    log_total_ref,  # [1, q]
    delta_ref,  # [1, q]
    dk_ref,  # [k, H]
    dv_ref,  # [k, H]
    dkeep_ref,  # [1, k]
    dk_acc_ref,  # scratch [k, H]
    dv_acc_ref,  # scratch [k, H]
    dkeep_acc_ref,  # scratch [k, LANES]: its lanes are summed at the end
    keep_column_ref,  # scratch [k, LANES]
    segment_ref,  # scratch [k, LANES] or None
    *,
    walk: Walk,
    scale: float,
):
    b, h, j, g, i = (pl.program_id(axis) for axis in range(5))

    @pl.when((g == 0) & (i == 0))
    def _start():
        for ref in (dk_acc_ref, dv_acc_ref, dkeep_acc_ref):
            ref[...] = jnp.zeros_like(ref)
        keep_column_ref[...] = _column(keep_ref[...] * LOG2_E)
        if segment_ref is not None:
            segment_ref[...] = _column(k_segment_ref[...])

    def meet(place):
        same_segment = None if segment_ref is None else _spread(segment_ref[...], walk.q) == q_segment_ref[...]
        distance = walk.distance(i, j, 1) if place == MIXED else None
        keep = None if place == INSIDE else _spread(keep_column_ref[...], walk.q)
        s = _masked_scores(
            _dot(k_ref[...], q_ref[...], 1) * (scale * LOG2_E), keep, same_segment, place, distance, walk.window
        )
        p = jnp.exp2(s - log_total_ref[...] * LOG2_E)
        ds = p * (_dot(v_ref[...], d_out_ref[...], 1) - delta_ref[...])
        dv_acc_ref[...] += _dot(p.astype(d_out_ref.dtype), d_out_ref[...], 0)
        dk_acc_ref[...] += _dot(ds.astype(q_ref.dtype), q_ref[...], 0)
        if place != INSIDE:
            gated = ds if distance is None else jnp.where(distance > walk.window, ds, 0.0)
            lanes = dkeep_acc_ref.shape[1]
            dkeep_acc_ref[...] += sum(gated[:, start : start + lanes] for start in range(0, walk.q, lanes))

    needed = walk.query_block(i, j, _lookup(next_alive_ref, b, h, j, pl.num_programs(1), walk)) == i
    for condition, place in walk.cases(i, j, needed):
        pl.when(condition)(partial(meet, place))

    @pl.when((g == pl.num_programs(3) - 1) & (i == walk.num_q - 1))
    def _finish():
        dk_ref[...] = (dk_acc_ref[...] * scale).astype(dk_ref.dtype)
        dv_ref[...] = dv_acc_ref[...].astype(dv_ref.dtype)
        dkeep_ref[...] = dkeep_acc_ref[...].T.sum(0, keepdims=True)


def _specs(walk, heads, h, indices):
    """Blocks of an array by queries [.. T H], by keys, of a row by queries [.. 1 T], by keys, and of segments by either.
    `indices` are (b, head, g, i, j) from the grid's indices and the table of `next_alive`."""

    def spec(shape, choose):
        return pl.BlockSpec(shape, lambda *grid_and_table: choose(*indices(*grid_and_table)))

    return (
        spec((None, None, None, walk.q, h), lambda b, head, g, i, j: (b, head, g, i, 0)),
        spec((None, None, walk.k, h), lambda b, head, g, i, j: (b, head, j, 0)),
        spec((None, None, None, 1, walk.q), lambda b, head, g, i, j: (b, head, g, 0, i)),
        spec((None, None, 1, walk.k), lambda b, head, g, i, j: (b, head, 0, j)),
        spec((None, 1, walk.q), lambda b, head, g, i, j: (b, 0, i)),
        spec((None, 1, walk.k), lambda b, head, g, i, j: (b, 0, j)),
    )


def _by_queries(walk, q):
    """Grid, semantics and specs of the kernels that hold a block of queries."""
    b, heads, group, _, h = q.shape
    needed_keys = lambda b, head, i, j, table: walk.key_block(i, j, _lookup(table, b, head, j, heads, walk))
    specs = _specs(walk, heads, h, lambda b, head, g, i, j, table: (b, head, g, i, needed_keys(b, head, i, j, table)))
    return (b, heads, group, walk.num_q, walk.num_k), ("parallel",) * 4 + ("arbitrary",), specs


def _by_keys(walk, q):
    """Grid, semantics and specs of the kernel that holds a block of keys."""
    b, heads, group, _, h = q.shape
    needing = lambda b, head, i, j, table: walk.query_block(i, j, _lookup(table, b, head, j, heads, walk))
    specs = _specs(walk, heads, h, lambda b, head, j, g, i, table: (b, head, g, needing(b, head, i, j, table), j))
    return (b, heads, walk.num_k, group, walk.num_q), ("parallel",) * 3 + ("arbitrary",) * 2, specs


def _call(kernel, walk, head_dim, grid, semantics, in_specs, out_specs, out_shapes, scratch, interpret, *args):
    """A pallas_call over `grid` with the table of needed blocks in scalar memory; `out_shapes` are (shape, dtype)."""
    return pl.pallas_call(
        partial(kernel, walk=walk, scale=head_dim**-0.5),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1, grid=grid, in_specs=in_specs, out_specs=out_specs, scratch_shapes=scratch
        ),
        out_shape=[jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in out_shapes],
        compiler_params=pltpu.CompilerParams(dimension_semantics=semantics),
        interpret=interpret,
        name=kernel.__name__.strip("_"),
    )(*args)


def _segment_column(segments, size):
    return None if segments is None else pltpu.VMEM((size, LANES), jnp.int32)


def _inputs(q, k, v, log_keep, segments, walk, specs):
    """What all kernels read, and how: a row needs a second-to-last axis of length 1, to be cut into blocks along the last."""
    by_q, by_k, _, keep_row, q_segments, k_segments = specs
    row = None if segments is None else segments[:, None]
    segment_specs = [None, None] if segments is None else [q_segments, k_segments]
    return [by_q, by_k, by_k, keep_row, *segment_specs], (
        _next_alive(log_keep, walk),
        q,
        k,
        v,
        log_keep[:, :, None],
        row,
        row,
    )


def _forward(q, k, v, log_keep, segments, window_size, blocks, interpret):
    b, heads, group, t, h = q.shape
    walk = _walk(q, window_size, blocks)
    grid, semantics, specs = _by_queries(walk, q)
    in_specs, args = _inputs(q, k, v, log_keep, segments, walk, specs)
    column, acc = pltpu.VMEM((walk.q, LANES), jnp.float32), pltpu.VMEM((walk.q, h), jnp.float32)
    scratch = [column, column, acc, _segment_column(segments, walk.q)]
    out_shapes = [(q.shape, q.dtype), ((b, heads, group, 1, t), jnp.float32)]
    out, log_total = _call(
        _forward_kernel, walk, h, grid, semantics, in_specs, [specs[0], specs[2]], out_shapes, scratch, interpret, *args
    )
    return out, log_total.reshape(b, heads, group, t)


def _attend_fwd(q, k, v, log_keep, segments, window_size, blocks, interpret):
    out, log_total = name_residuals(*_forward(q, k, v, log_keep, segments, window_size, blocks, interpret))
    return out, (q, k, v, log_keep, segments, out, log_total)


def _attend_bwd(window_size, blocks, interpret, saved, d_out):
    q, k, v, log_keep, segments, out, log_total = saved
    h = q.shape[-1]
    delta = softmax_delta(d_out, out)
    rows = d_out, log_total[..., None, :], delta[..., None, :]
    walk = _walk(q, window_size, blocks)

    grid, semantics, specs = _by_queries(walk, q)
    in_specs, args = _inputs(q, k, v, log_keep, segments, walk, specs)
    column = pltpu.VMEM((walk.q, LANES), jnp.float32)
    scratch = [pltpu.VMEM((walk.q, h), jnp.float32), column, column, _segment_column(segments, walk.q)]
    in_specs += [specs[0], specs[2], specs[2]]
    (dq,) = _call(
        _dq_kernel,
        walk,
        h,
        grid,
        semantics,
        in_specs,
        [specs[0]],
        [(q.shape, q.dtype)],
        scratch,
        interpret,
        *args,
        *rows,
    )

    grid, semantics, specs = _by_keys(walk, q)
    in_specs, args = _inputs(q, k, v, log_keep, segments, walk, specs)
    acc, lanes = pltpu.VMEM((walk.k, h), jnp.float32), min(LANES, walk.q)
    scratch = [
        acc,
        acc,
        pltpu.VMEM((walk.k, lanes), jnp.float32),
        pltpu.VMEM((walk.k, LANES), jnp.float32),
        _segment_column(segments, walk.k),
    ]
    in_specs += [specs[0], specs[2], specs[2]]
    out_specs = [specs[1], specs[1], specs[3]]
    out_shapes = [(k.shape, k.dtype), (v.shape, v.dtype), (args[4].shape, jnp.float32)]
    dk, dv, dkeep = _call(
        _dkv_kernel, walk, h, grid, semantics, in_specs, out_specs, out_shapes, scratch, interpret, *args, *rows
    )
    return dq, dk, dv, dkeep[:, :, 0], None


_attend.defvjp(_attend_fwd, _attend_bwd)
