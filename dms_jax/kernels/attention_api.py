"""The kernels as the model calls them: one function each, the same result from every implementation.

Layouts, sharding and merging are here; what runs where is `dispatch`. Under a mesh each device runs the kernel on its own rows and
KV heads: no kernel communicates.
"""

import functools
import importlib
import inspect
import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from dms_jax.axes import Array, typed
from dms_jax.core import chunked_attention, compact_cache, slot_attention
from dms_jax.core.compact_cache import Expiries, LayerCache
from dms_jax.core.rotary import apply_rope
from dms_jax.core.slot_attention import (
    CacheOps,
    Chunk,
    SoftmaxPart,
    fold_queries,
    merge_parts,
    slots_in_use,
    unfold_queries,
)
from dms_jax.core.visibility import expiry_of
from dms_jax.kernels.block_sizes import Blocks, TrainBlocks
from dms_jax.kernels.dispatch import AUTO, GPU, XLA, Facts, choose
from dms_jax.kernels.head_split import collect, deal_out
from dms_jax.sharding import spec

SLOTS = "batch kv_heads ."  # one number for each slot or pair
VECTORS = "batch kv_heads . ."  # keys, values, rows of queries
LAYER = [VECTORS, VECTORS, SLOTS, SLOTS, SLOTS]  # `_arrays`


@typed
def gated_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    log_keep: Float[Array, "B K T"],
    *,
    window_size: int,
    segment_ids: Int[Array, "B T"] | None = None,
    implementation: str = AUTO,
    interpret: bool = False,
    blocks: Blocks | None = None,
) -> Float[Array, "B T N H"]:
    """Causal grouped-query attention under eviction gates, differentiable in q, k, v and `log_keep`: `core.chunked_attention`.

    `interpret` runs a Pallas kernel on a CPU, slowly; `blocks` stand for the tuned ones. Raises ConfigError when the named implementation cannot run.
    """
    name, blocks = choose("train_attention", Facts(q.shape[-1], q.dtype), implementation, interpret, blocks)
    if name == XLA:
        multiple = chunked_attention.block_size(q.shape[1])
        attend = partial(chunked_attention.attend_in_blocks, window_size=window_size, block=multiple)
    else:
        assert isinstance(blocks, TrainBlocks)
        blocks = blocks.fit(q.shape[1])
        attend = partial(
            _kernel("train_attention", "attend", name), window_size=window_size, blocks=blocks, interpret=interpret
        )
        multiple = math.lcm(blocks.q, blocks.k)
    n, kv_heads = q.shape[2], k.shape[2]
    q, k, v, log_keep = deal_out(q, k, v, log_keep)
    rows = "batch heads . . ."
    run = _per_device(
        attend, (q.shape[0], k.shape[2]), [rows, "batch heads . .", "batch heads . .", "batch heads .", "batch ."], rows
    )
    return collect(chunked_attention.with_heads_folded(run, multiple, q, k, v, log_keep, segment_ids), n, kv_heads)


def extend_layer(
    layer: LayerCache,
    q: Float[Array, "B T N H"],
    k: Float[Array, "B K T H"],
    v: Float[Array, "B K T H"],
    expiries: Expiries,
    chunk: Chunk,
    policy: Any,
    ops: CacheOps,
) -> tuple[Float[Array, "B T N H"], LayerCache]:
    """Run `core.slot_attention.extend_layer`, under a mesh on each device's own rows and heads.

    A policy that ranks pairs or reads a subset may compare heads, so it runs on all of them and XLA splits the work.
    """
    if policy.ranks_pairs or policy.reads_subset:
        return slot_attention.extend_layer(layer, q, k, v, expiries, chunk, policy, ops)

    def own(layer, q, k, v, expiries, position, count):
        part = chunk._replace(position=position, count=count)
        return slot_attention.extend_layer(layer, q, k, v, expiries, part, policy, ops)

    cache_form, expiries_form = cast(Any, LayerCache), cast(Any, Expiries)  # of axes instead of arrays
    cache = cache_form(*LAYER, "batch kv_heads", None if layer.statistic is None else VECTORS)
    last = None if expiries.last_expiry is None else "batch kv_heads"
    run = _per_device(
        own,
        k.shape[:2],
        [cache, "batch . kv_heads .", VECTORS, VECTORS, expiries_form(SLOTS, SLOTS, last, last), "batch .", "batch"],
        ("batch . kv_heads .", cache),
    )
    return run(layer, q, k, v, expiries, chunk.position, chunk.count)


@typed
def attend_to_slots(
    q: Float[Array, "B T N H"],
    slots: LayerCache,
    position: Int[Array, "B T"],
    chunk: tuple[Float[Array, "B K T H"], Float[Array, "B K T H"], Int[Array, "B K T"]] | None,
    read: Bool[Array, "B K T C"] | None = None,
    implementation: str = AUTO,
    interpret: bool = False,
    blocks: Blocks | None = None,
) -> Float[Array, "B T N H"]:
    """Attention of a chunk over the slots of a cache and over itself, a chunk of one being a decode step: `core.slot_attention`."""
    why = None if read is None else "cannot leave out slots that a policy does not want to read"
    kernel = "decode_attention" if q.shape[1] == 1 else "chunk_attention"
    name, blocks = choose(
        kernel, Facts(q.shape[-1], q.dtype, slots.k.dtype, slots.capacity, why), implementation, interpret, blocks
    )
    if name == XLA:
        return slot_attention.slot_attention(q, slots, position, chunk, read=read)
    attend_slots = _kernel("slot_attention", "attend_slots", name)
    rows = fold_queries(q, slots.k.shape[1])
    row_position = jnp.tile(position, (1, rows.shape[2] // q.shape[1]))
    run = _per_device(
        partial(attend_slots, blocks=blocks, interpret=interpret),
        rows.shape[:2],
        [VECTORS, "batch .", VECTORS, VECTORS, SLOTS, SLOTS, "batch kv_heads"],
        cast(Any, SoftmaxPart)(f". {SLOTS}", f". {SLOTS}", f". {VECTORS}"),
    )
    parts = [run(rows, row_position, slots.k, slots.v, slots.position, slots.expiry, slots_in_use(slots, position))]
    if chunk is not None:
        k, v, expiry = chunk
        k_position = jnp.broadcast_to(position[:, None], expiry.shape)
        parts.append(
            run(rows, row_position, k, v, k_position, expiry, jnp.full(expiry.shape[:2], k.shape[2], jnp.int32))
        )
    merged = merge_parts(jax.tree.map(lambda *x: jnp.concatenate(x), *parts))
    return unfold_queries(merged.normalized().astype(q.dtype), q.shape[1])


@typed
def write_pairs(
    layer: LayerCache,
    k: Float[Array, "B K T H"],
    v: Float[Array, "B K T H"],
    position: Int[Array, "B K T"],
    expiry: Int[Array, "B K T"],
    score: Float[Array, "B K T"],
    stays: Bool[Array, "B K C"],
    comes: Bool[Array, "B K T"],
    implementation: str = AUTO,
    interpret: bool = False,
    blocks: Blocks | None = None,
) -> LayerCache:
    """The pairs of a chunk that come, into the lowest free slots: `core.compact_cache.write_pairs`."""
    name, blocks = choose(
        "compaction", Facts(k.shape[-1], k.dtype, layer.k.dtype, layer.capacity), implementation, interpret, blocks
    )
    if name == XLA or k.shape[2] == 1:  # one pair is no stream
        return compact_cache.write_pairs(layer, k, v, position, expiry, score, stays, comes)
    kernel = _kernel("compaction", "write_pairs", name)
    run = _per_device(
        partial(kernel, blocks=blocks, interpret=interpret), k.shape[:2], [*LAYER, *LAYER, SLOTS, SLOTS], tuple(LAYER)
    )
    new = run(*_arrays(layer), k.astype(layer.k.dtype), v.astype(layer.v.dtype), position, expiry, score, stays, comes)
    return _with_arrays(layer, new)


@typed
def decode_update(
    q: Float[Array, "B N H"],
    k: Float[Array, "B K H"],
    v: Float[Array, "B K H"],
    cos: Float[Array, "B half"],
    sin: Float[Array, "B half"],
    logit: Float[Array, "B K"],
    layer: LayerCache,
    seen: Int[Array, "B"],
    count: Int[Array, "B"],
    threshold: float | Float[Array, ""],
    *,
    window_size: int,
    decision_shift: int | None,
    implementation: str = AUTO,
    interpret: bool = False,
    blocks: Blocks | None = None,
) -> tuple[Float[Array, "B N H"], LayerCache]:
    """One token a row, before RoPE: the rotated queries, and the cache with the token's pair in the lowest free slot.

    `logit` is the token's own decision score: above `threshold` it evicts pair seen - 1 (`decision_shift` 1) or its own (0); None:
    nothing is ever marked. Rows of `count` 0 stay as they are.
    """
    name, _ = choose(
        "decode_update", Facts(q.shape[-1], q.dtype, layer.k.dtype, layer.capacity), implementation, interpret, blocks
    )
    threshold = jnp.asarray(threshold, jnp.float32)
    if name == XLA:
        return decode_update_xla(q, k, v, cos, sin, logit, layer, seen, count, threshold, window_size, decision_shift)
    kernel = _kernel("decode_update", "decode_update", name)
    run = _per_device(  # the query heads of a group are with their key head
        partial(kernel, window_size=window_size, decision_shift=decision_shift, interpret=interpret),
        k.shape[:2],
        [SLOTS, SLOTS, SLOTS, "batch .", "batch .", "batch kv_heads", *LAYER, "batch", "batch", ""],
        (SLOTS, *LAYER, "batch kv_heads"),
    )
    q, *new, forced = run(q, k, v, cos, sin, logit, *_arrays(layer), seen, count, threshold)
    layer = _with_arrays(layer, new)
    return q, replace(layer, forced_evictions=layer.forced_evictions + forced)


def decode_update_xla(q, k, v, cos, sin, logit, layer, seen, count, threshold, window_size, decision_shift):
    """The same of the parts that `core` has: what the kernel is tested against and timed next to."""
    turn = lambda x: apply_rope(x, cos[:, None], sin[:, None])
    marked, score = (logit > threshold)[..., None], logit[..., None]
    position, nothing = seen[:, None, None], jnp.zeros_like(score)
    unmarked = expiry_of(jnp.zeros_like(marked), position, window_size)
    if decision_shift == 0:
        expiries = Expiries(expiry_of(marked, position, window_size), score, None, None)
    elif decision_shift == 1:
        expiries = Expiries(unmarked, nothing, expiry_of(marked, position - 1, window_size)[..., 0], logit)
    else:
        expiries = Expiries(unmarked, nothing, None, None)
    settled = compact_cache.apply_pending(layer, expiries, seen, count)
    return turn(q), compact_cache.append(
        settled, turn(k)[:, :, None], v[:, :, None], expiries, seen, count, window_size
    )


@functools.cache
def _kernel(file: str, function: str, implementation: str) -> Any:
    """A kernel for one accelerator, whose file needs not load where another one runs. Jitted: the layers of a model that decodes are
    unrolled, and what they all call is lowered and compiled once (minutes, for 36 layers)."""
    found = getattr(
        importlib.import_module(f"dms_jax.kernels.{file}_{'gpu' if implementation == GPU else 'tpu'}"), function
    )
    fixed = [
        name
        for name, parameter in inspect.signature(found).parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY
    ]
    return jax.jit(found, static_argnames=fixed)


def _arrays(layer: LayerCache) -> tuple[Array, ...]:
    return layer.k, layer.v, layer.position, layer.expiry, layer.score


def _with_arrays(layer: LayerCache, new) -> LayerCache:
    return replace(layer, **dict(zip(("k", "v", "position", "expiry", "score"), new, strict=True)))


def _per_device(f: Callable, sizes: tuple[int, ...], axes_in: list, axes_out: Any) -> Callable:
    """`f` on each device's rows and KV heads, of which there are `sizes`, where a mesh is set. An axis that its mesh axis does not divide
    is not split.

    Axes are words, "." for one that is never split, "heads" for KV heads over model and context together; those of the results in the
    form in which `f` returns them.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if (
        mesh.empty or math.prod(mesh.axis_sizes) == 1 or mesh.manual_axes
    ):  # manual: each device runs this for itself already
        return f
    size_of = {".": 0, "batch": sizes[0], "kv_heads": sizes[1], "heads": sizes[1]}

    def of(axes: str):
        names = axes.split()
        return spec(
            tuple(None if name == "." else name for name in names), tuple(size_of[name] for name in names), mesh
        )

    def run(*args):
        specs = tuple(None if x is None else jax.tree.map(of, axes) for axes, x in zip(axes_in, args, strict=True))
        return jax.shard_map(f, in_specs=specs, out_specs=jax.tree.map(of, axes_out), check_vma=False)(*args)

    return run
