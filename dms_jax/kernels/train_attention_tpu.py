"""Attention with the DMS gate on a TPU, value and gradient, in O(T) memory: the kernels for `core.chunked_attention`.

There are three kernels over blocks of scores (FlashAttention, arXiv:2205.14135). The forward pass and dq hold a block
of queries and loop over blocks of keys. The third kernel computes dk, dv and the gate's gradient; it holds a block of
keys and loops over the queries of all heads of the group. For each query row, the backward pass needs only the
log-sum-exp of the scores and delta = rowsum(dO * O). Both are stored as rows of length T; a kernel that holds queries
turns them into columns, once per block that it holds.

Grid steps of blocks that are not needed, in the future or outside the window with only evicted keys, compute nothing.
The index map of such a step names a block that is in VMEM already or will be needed next, so it fetches nothing.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

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

LOG2_E = math.log2(math.e)  # inside the kernels, scores are exponents of 2, because the hardware has exp2
# The place of a block of scores: inside the window (no gate), outside it (the gate applies everywhere), or across an
# edge of the window or the diagonal.
INSIDE, OUTSIDE, MIXED = range(3)


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
    """Compute attention in the layout of `core.chunked_attention.with_heads_folded`.

    T must be a multiple of both block sizes, which must be multiples of 128 on hardware.
    """
    assert q.shape[3] % blocks.q == 0 and q.shape[3] % blocks.k == 0, (q.shape, blocks)
    return _attend(q, k, v, log_keep, segments, window_size, blocks, interpret)


@partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7))
def _attend(q, k, v, log_keep, segments, window_size, blocks, interpret):
    return _forward(q, k, v, log_keep, segments, window_size, blocks, interpret)[0]


class BlockPlan(NamedTuple):
    """The blocks of scores that are needed, and their places.

    All fields are static. In the methods, `i` is a block of queries, `j` is a block of keys, and `next_alive` is the
    first block from `j` on with a key that is not evicted.
    """

    window: int
    q: int  # queries per block
    k: int  # keys per block
    num_q: int
    num_k: int

    def key_block(self, i, j, next_alive):
        """Return `j` if queries `i` need it, else the next block that they need, or their last one."""
        first_near = lax.div(jnp.maximum(i * self.q - self.window, 0), self.k)
        last = lax.div((i + 1) * self.q - 1, self.k)
        return jnp.minimum(jnp.minimum(next_alive, jnp.maximum(j, first_near)), last)

    def query_block(self, i, j, next_alive):
        """Return `i` if it needs keys `j`, else the first or the last block that does."""
        first = lax.div(j * self.k, self.q)
        last_near = jnp.minimum(lax.div(self.window + (j + 1) * self.k - 1, self.q), self.num_q - 1)
        return jnp.clip(i, first, jnp.where(next_alive == j, self.num_q - 1, last_near))

    def cases(self, i, j, needed):
        """Return a condition for each place. If the block is `needed`, exactly one holds. Most blocks need no mask."""
        past = (j + 1) * self.k - 1 <= i * self.q
        inside = past & ((i + 1) * self.q - 1 - j * self.k <= self.window)
        outside = i * self.q - (j + 1) * self.k + 1 > self.window  # this implies `past`
        return (needed & inside, INSIDE), (needed & outside, OUTSIDE), (needed & ~inside & ~outside, MIXED)

    def distance(self, i, j, query_axis):
        """Return q_pos - k_pos for each score of the block."""
        shape = (self.q, self.k) if query_axis == 0 else (self.k, self.q)
        query = lax.broadcasted_iota(jnp.int32, shape, query_axis)
        return query - lax.broadcasted_iota(jnp.int32, shape, 1 - query_axis) + (i * self.q - j * self.k)


class Inputs(NamedTuple):
    """The inputs of the kernels: arrays outside a kernel, blocks inside it, and block specs in `Layout.inputs`."""

    next_alive: Any  # [B * K * num_k], in scalar memory
    q: Any  # [q, H]
    k: Any  # [k, H]
    v: Any  # [k, H]
    keep: Any  # [1, k]
    q_segment: Any  # [1, q], or None
    k_segment: Any  # [1, k], or None
    d_out: Any = None  # [q, H]; this and the next two are None in the forward pass
    logsumexp: Any = None  # [1, q]
    delta: Any = None  # [1, q]

    @classmethod
    def of_arrays(cls, plan, q, k, v, log_keep, segments, d_out=None, row_numbers=(None, None)):
        """Make the inputs. Rows of numbers get a second-to-last axis of length 1, so they can be cut into blocks."""
        row = None if segments is None else segments[:, None]
        logsumexp, delta = (None if x is None else x[..., None, :] for x in row_numbers)
        alive = _next_alive(log_keep, plan)
        return cls(alive, q, k, v, log_keep[:, :, None], row, row, d_out, logsumexp, delta)


def _plan(q, window_size, blocks):
    t = q.shape[3]
    return BlockPlan(min(window_size, t), blocks.q, blocks.k, t // blocks.q, t // blocks.k)


def _next_alive(log_keep, plan):
    """Return `next_alive` of every block of every head, flat, because scalar memory would pad its rows."""
    alive = log_keep.reshape(*log_keep.shape[:2], plan.num_k, plan.k).max(-1) > MASKED / 2
    block = lax.broadcasted_iota(jnp.int32, alive.shape, 2)
    return lax.cummin(jnp.where(alive, block, plan.num_k), axis=2, reverse=True).reshape(-1)


def _lookup(next_alive_ref, b, h, j, heads, plan):
    return next_alive_ref[(b * heads + h) * plan.num_k + j]


def _dot(a, b, contract):
    """Return the fp32 product over axis 1 of `a` and axis `contract` of `b`. fp32 operands are not rounded to bf16."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else lax.Precision.DEFAULT
    return lax.dot_general(
        a, b, (((1,), (contract,)), ((), ())), precision=precision, preferred_element_type=jnp.float32
    )


def _column(row):
    """Turn a row [1, n] into a column [n, LANES], whose values are repeated over all lanes."""
    return jnp.broadcast_to(row, (LANES, row.shape[1])).T


def _row(column):
    """Turn a column [n, LANES] into a row [1, n]."""
    return column.T[:1]


def _spread(column, width):
    """Repeat a column [n, LANES] over `width` lanes, [n, width]."""
    return column[:, :width] if width <= LANES else jnp.concatenate([column] * (width // LANES), axis=1)


def _block_scores(plan, i, j, place, query_axis, held, other, keep, held_segment, other_segment):
    """Return the gated and masked scores [n m] of `held` [n H] and `other` [m H], and q_pos - k_pos of a MIXED block.

    Scores are exponents of 2, and the gate `keep` broadcasts against them. Segments are references to column and row.
    """
    same_segment = None
    if held_segment is not None:
        same_segment = _spread(held_segment[...], other.shape[0]) == other_segment[...]
    distance: Any = plan.distance(i, j, query_axis) if place == MIXED else None
    s = _dot(held[...], other[...], 1) * (held.shape[1] ** -0.5 * LOG2_E)
    if place == OUTSIDE:
        s = s + keep
    if place == MIXED:
        s = jnp.where(distance < 0, MASKED, s + jnp.where(distance > plan.window, keep, 0.0))
    return s if same_segment is None else jnp.where(same_segment, s, MASKED), distance


def _if_needed(plan, i, j, needed, compute):
    """Run `compute(place)` if the block is needed."""
    for condition, place in plan.cases(i, j, needed):
        pl.when(condition)(partial(compute, place))


def _for_needed_keys(plan, x, compute):
    """Run `compute(i, j, place)` in a grid (B, K, G, num_q, num_k), if queries `i` need keys `j`."""
    b, h, i, j = (pl.program_id(axis) for axis in (0, 1, 3, 4))
    needed = plan.key_block(i, j, _lookup(x.next_alive, b, h, j, pl.num_programs(1), plan)) == j
    _if_needed(plan, i, j, needed, partial(compute, i, j))


# The grid is (B, K, G, num_q, num_k). Its loop over keys is sequential and accumulates in scratch memory. The kernel is
# bound by the MXU and by exp2.
def _forward_kernel(plan: BlockPlan, *refs):
    x, (out_ref, logsumexp_ref, max_ref, sum_ref, acc_ref, segment_ref) = Inputs(*refs[:10]), refs[10:]

    @pl.when(pl.program_id(4) == 0)
    def _start():
        max_ref[...] = jnp.full_like(max_ref, MASKED)  # [q, LANES]: the highest score so far
        sum_ref[...] = jnp.zeros_like(sum_ref)  # [q, LANES]: the sum of 2 ** (score - max)
        acc_ref[...] = jnp.zeros_like(acc_ref)  # [q, H]
        if segment_ref is not None:
            segment_ref[...] = _column(x.q_segment[...])

    def compute(i, j, place):
        s, _ = _block_scores(plan, i, j, place, 0, x.q, x.k, x.keep[...] * LOG2_E, segment_ref, x.k_segment)
        # A row that has met only MASKED scores holds finite garbage. Its first real score (that of its own key, at the
        # latest) multiplies the garbage by 2 ** (MASKED - score) = 0.
        old_max = max_ref[...]
        new_max = jnp.maximum(old_max, s.max(1, keepdims=True))
        p = jnp.exp2(s - _spread(new_max, plan.k))
        rescale = jnp.exp2(old_max - new_max)
        max_ref[...] = new_max
        sum_ref[...] = sum_ref[...] * rescale + p.sum(1, keepdims=True)
        acc_ref[...] = acc_ref[...] * _spread(rescale, acc_ref.shape[1]) + _dot(p.astype(x.v.dtype), x.v[...], 0)

    _for_needed_keys(plan, x, compute)

    @pl.when(pl.program_id(4) == plan.num_k - 1)
    def _finish():
        out_ref[...] = (acc_ref[...] / _spread(sum_ref[...], acc_ref.shape[1])).astype(out_ref.dtype)
        logsumexp_ref[...] = _row(max_ref[...] / LOG2_E + jnp.log(sum_ref[...]))


# The grid is that of the forward kernel.
def _dq_kernel(plan: BlockPlan, *refs):
    x, (dq_ref, acc_ref, logsumexp_ref, delta_ref, segment_ref) = Inputs(*refs[:10]), refs[10:]

    @pl.when(pl.program_id(4) == 0)
    def _start():
        acc_ref[...] = jnp.zeros_like(acc_ref)  # [q, H]
        logsumexp_ref[...] = _column(x.logsumexp[...] * LOG2_E)  # [q, LANES]
        delta_ref[...] = _column(x.delta[...])  # [q, LANES]
        if segment_ref is not None:
            segment_ref[...] = _column(x.q_segment[...])

    def compute(i, j, place):
        s, _ = _block_scores(plan, i, j, place, 0, x.q, x.k, x.keep[...] * LOG2_E, segment_ref, x.k_segment)
        p = jnp.exp2(s - _spread(logsumexp_ref[...], plan.k))
        ds = p * (_dot(x.d_out[...], x.v[...], 1) - _spread(delta_ref[...], plan.k))
        acc_ref[...] += _dot(ds.astype(x.k.dtype), x.k[...], 0)

    _for_needed_keys(plan, x, compute)

    @pl.when(pl.program_id(4) == plan.num_k - 1)
    def _finish():
        dq_ref[...] = (acc_ref[...] * x.q.shape[1] ** -0.5).astype(dq_ref.dtype)


# The grid is (B, K, num_k, G, num_q). Its loops over the heads of the group and over queries are sequential. Scores are
# transposed, [k, q], so the numbers of queries are rows, as in memory, and no product has to transpose a block of
# scores.
def _dkv_kernel(plan: BlockPlan, *refs):
    x = Inputs(*refs[:10])
    dk_ref, dv_ref, dkeep_ref, dk_acc_ref, dv_acc_ref, dkeep_acc_ref, keep_ref, segment_ref = refs[10:]
    b, h, j, g, i = (pl.program_id(axis) for axis in range(5))

    @pl.when((g == 0) & (i == 0))
    def _start():
        # [k, H], [k, H], and [k, LANES], whose lanes are summed at the end.
        for ref in (dk_acc_ref, dv_acc_ref, dkeep_acc_ref):
            ref[...] = jnp.zeros_like(ref)
        keep_ref[...] = _column(x.keep[...] * LOG2_E)  # [k, LANES]
        if segment_ref is not None:
            segment_ref[...] = _column(x.k_segment[...])

    def compute(place):
        keep = None if place == INSIDE else _spread(keep_ref[...], plan.q)
        s, distance = _block_scores(plan, i, j, place, 1, x.k, x.q, keep, segment_ref, x.q_segment)
        p = jnp.exp2(s - x.logsumexp[...] * LOG2_E)
        ds = p * (_dot(x.v[...], x.d_out[...], 1) - x.delta[...])
        dv_acc_ref[...] += _dot(p.astype(x.d_out.dtype), x.d_out[...], 0)
        dk_acc_ref[...] += _dot(ds.astype(x.q.dtype), x.q[...], 0)
        if place != INSIDE:
            gated = ds if distance is None else jnp.where(distance > plan.window, ds, 0.0)
            lanes = dkeep_acc_ref.shape[1]
            dkeep_acc_ref[...] += sum(gated[:, start : start + lanes] for start in range(0, plan.q, lanes))

    needed = plan.query_block(i, j, _lookup(x.next_alive, b, h, j, pl.num_programs(1), plan)) == i
    _if_needed(plan, i, j, needed, compute)

    @pl.when((g == pl.num_programs(3) - 1) & (i == plan.num_q - 1))
    def _finish():
        dk_ref[...] = (dk_acc_ref[...] * x.k.shape[1] ** -0.5).astype(dk_ref.dtype)
        dv_ref[...] = dv_acc_ref[...].astype(dv_ref.dtype)
        dkeep_ref[...] = dkeep_acc_ref[...].T.sum(0, keepdims=True)


class Layout(NamedTuple):
    """The grid of a kernel, and how its inputs and outputs are cut into blocks."""

    grid: tuple[int, ...]
    semantics: tuple[str, ...]
    inputs: Inputs


def _layout(plan, q, grid, sequential: int, indices: Callable) -> Layout:
    """Make a layout. `indices` maps the grid's indices and the table of `next_alive` to (b, head, g, i, j)."""
    h = q.shape[4]

    def spec(shape, choose):
        return pl.BlockSpec(shape, lambda *grid_and_table: choose(*indices(*grid_and_table)))

    queries = spec((None, None, None, plan.q, h), lambda b, head, g, i, j: (b, head, g, i, 0))
    keys = spec((None, None, plan.k, h), lambda b, head, g, i, j: (b, head, j, 0))
    query_row = spec((None, None, None, 1, plan.q), lambda b, head, g, i, j: (b, head, g, 0, i))
    key_row = spec((None, None, 1, plan.k), lambda b, head, g, i, j: (b, head, 0, j))
    q_segment = spec((None, 1, plan.q), lambda b, head, g, i, j: (b, 0, i))
    k_segment = spec((None, 1, plan.k), lambda b, head, g, i, j: (b, 0, j))
    semantics = ("parallel",) * (5 - sequential) + ("arbitrary",) * sequential
    inputs = Inputs(None, queries, keys, keys, key_row, q_segment, k_segment, queries, query_row, query_row)
    return Layout(grid, semantics, inputs)


def _holding_queries(plan, q) -> Layout:
    """Return the layout of the kernels that hold a block of queries."""
    b, heads, group = q.shape[:3]
    needed_keys = lambda b, head, i, j, table: plan.key_block(i, j, _lookup(table, b, head, j, heads, plan))
    indices = lambda b, head, g, i, j, table: (b, head, g, i, needed_keys(b, head, i, j, table))
    return _layout(plan, q, (b, heads, group, plan.num_q, plan.num_k), 1, indices)


def _holding_keys(plan, q) -> Layout:
    """Return the layout of the kernel that holds a block of keys."""
    b, heads, group = q.shape[:3]
    needing = lambda b, head, i, j, table: plan.query_block(i, j, _lookup(table, b, head, j, heads, plan))
    indices = lambda b, head, j, g, i, table: (b, head, g, needing(b, head, i, j, table), j)
    return _layout(plan, q, (b, heads, plan.num_k, group, plan.num_q), 2, indices)


def _call(kernel, plan, layout, inputs: Inputs, outputs, scratch, interpret):
    """Run `kernel`. `outputs` are pairs of a spec and a shape; `scratch` ends with the column of segments."""
    in_specs = [None if x is None else spec for x, spec in zip(inputs, layout.inputs, strict=True)][1:]
    out_specs, out_shape = zip(*outputs, strict=True)
    return pl.pallas_call(
        partial(kernel, plan),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=layout.grid,
            in_specs=in_specs,
            out_specs=[*out_specs],
            scratch_shapes=scratch,
        ),
        out_shape=[*out_shape],
        compiler_params=pltpu.CompilerParams(dimension_semantics=layout.semantics),
        interpret=interpret,
        name=kernel.__name__.strip("_"),
    )(*inputs)


def _segment_column(size, segments):
    return None if segments is None else pltpu.VMEM((size, LANES), jnp.int32)


def _forward(q, k, v, log_keep, segments, window_size, blocks, interpret):
    plan = _plan(q, window_size, blocks)
    layout = _holding_queries(plan, q)
    inputs = Inputs.of_arrays(plan, q, k, v, log_keep, segments)
    column, acc = pltpu.VMEM((plan.q, LANES), jnp.float32), pltpu.VMEM((plan.q, q.shape[4]), jnp.float32)
    scratch = [column, column, acc, _segment_column(plan.q, segments)]
    rows = jax.ShapeDtypeStruct((*q.shape[:3], 1, q.shape[3]), jnp.float32)
    outputs = [(layout.inputs.q, jax.ShapeDtypeStruct(q.shape, q.dtype)), (layout.inputs.logsumexp, rows)]
    out, logsumexp = _call(_forward_kernel, plan, layout, inputs, outputs, scratch, interpret)
    return out, logsumexp.reshape(q.shape[:4])


def _attend_fwd(q, k, v, log_keep, segments, window_size, blocks, interpret):
    out, logsumexp = name_residuals(*_forward(q, k, v, log_keep, segments, window_size, blocks, interpret))
    return out, (q, k, v, log_keep, segments, out, logsumexp)


def _attend_bwd(window_size, blocks, interpret, saved, d_out):
    q, k, v, log_keep, segments, out, logsumexp = saved
    plan, h = _plan(q, window_size, blocks), q.shape[4]
    inputs = Inputs.of_arrays(plan, q, k, v, log_keep, segments, d_out, (logsumexp, softmax_delta(d_out, out)))
    like = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype)
    floats = lambda *shape: pltpu.VMEM(shape, jnp.float32)

    layout = _holding_queries(plan, q)
    scratch = [floats(plan.q, h), floats(plan.q, LANES), floats(plan.q, LANES), _segment_column(plan.q, segments)]
    (dq,) = _call(_dq_kernel, plan, layout, inputs, [(layout.inputs.q, like(q))], scratch, interpret)

    layout = _holding_keys(plan, q)
    scratch = [floats(plan.k, h), floats(plan.k, h), floats(plan.k, min(LANES, plan.q)), floats(plan.k, LANES)]
    scratch += [_segment_column(plan.k, segments)]
    outputs = [(layout.inputs.k, like(k)), (layout.inputs.v, like(v)), (layout.inputs.keep, like(inputs.keep))]
    dk, dv, dkeep = _call(_dkv_kernel, plan, layout, inputs, outputs, scratch, interpret)
    return dq, dk, dv, dkeep[:, :, 0], None


_attend.defvjp(_attend_fwd, _attend_bwd)
