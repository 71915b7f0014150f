"""The kernels as the model calls them: one function each, with the same result from every implementation.

These functions adapt layouts, split the work over devices and merge partial results; `dispatch` decides which
implementation runs. Under a mesh each device runs the kernel on its own rows and KV heads, so no kernel communicates.
"""

import functools
import inspect
import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from dms_jax.axes import Array, typed
from dms_jax.core import chunked_attention, compact_cache, paged_attention, slot_attention
from dms_jax.core.compact_cache import Expiries, LayerCache
from dms_jax.core.paged_attention import PageOps
from dms_jax.core.paged_cache import PagedLayer, axes_of, with_own_arena
from dms_jax.core.slot_attention import (
    CacheOps,
    Chunk,
    SoftmaxPart,
    fold_queries,
    merge_parts,
    slots_in_use,
    unfold_queries,
)
from dms_jax.errors import ConfigError
from dms_jax.kernels import decode_update_xla
from dms_jax.kernels.block_sizes import Blocks, TrainBlocks
from dms_jax.kernels.dispatch import KernelQuery, select_implementation
from dms_jax.kernels.head_split import gather_heads, scatter_heads
from dms_jax.kernels.kernel_table import AUTO, KERNELS, XLA, load
from dms_jax.kernels.operands import Pairs, Token
from dms_jax.sharding import per_device

# Axes of arrays as `per_device` reads them.
HEADS = "batch kv_heads"  # one number per row and KV head
SLOTS = "batch kv_heads ."  # one number per slot or pair
VECTORS = "batch kv_heads . ."  # keys, values, rows of queries
PAIRS = cast(Any, Pairs)(VECTORS, VECTORS, SLOTS, SLOTS, SLOTS)
TOKEN = cast(Any, Token)(SLOTS, SLOTS, SLOTS, "batch .", "batch .", HEADS)


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
    """Compute causal grouped-query attention under eviction gates, as `core.chunked_attention` defines it.

    It is differentiable in q, k, v and `log_keep`. As in the other functions of this module, `interpret` runs a Pallas
    kernel on a CPU, slowly, `blocks` replaces the tuned block sizes, and a named implementation that cannot run raises
    ConfigError.
    """
    query = KernelQuery(q.shape[-1], q.dtype)
    name, blocks = select_implementation("train_attention", query, implementation, interpret, blocks)
    if name == XLA:
        multiple = chunked_attention.block_size(q.shape[1])
        attend = partial(chunked_attention.attend_in_blocks, window_size=window_size, block=multiple)
    else:
        assert isinstance(blocks, TrainBlocks)
        blocks = blocks.fit(q.shape[1])
        kernel = _kernel("train_attention", name)
        attend = partial(kernel, window_size=window_size, blocks=blocks, interpret=interpret)
        multiple = math.lcm(blocks.q, blocks.k)
    n, kv_heads = q.shape[2], k.shape[2]
    q, k, v, log_keep = scatter_heads(q, k, v, log_keep)
    rows, keys = "batch heads . . .", "batch heads . ."
    run = per_device(attend, (q.shape[0], k.shape[2]), [rows, keys, keys, "batch heads .", "batch ."], rows)
    return gather_heads(chunked_attention.with_heads_folded(run, multiple, q, k, v, log_keep, segment_ids), n, kv_heads)


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

    # These records hold the axes of each array in place of the array.
    cache_axes = cast(Any, LayerCache)
    statistic, budget = None if layer.statistic is None else VECTORS, None if layer.budget is None else HEADS
    cache = cache_axes(*PAIRS, HEADS, statistic, budget=budget)
    run = per_device(
        own,
        k.shape[:2],
        [cache, "batch . kv_heads .", VECTORS, VECTORS, _expiry_axes(expiries), "batch .", "batch"],
        ("batch . kv_heads .", cache),
    )
    return run(layer, q, k, v, expiries, chunk.position, chunk.count)


def extend_pages(
    layer: PagedLayer,
    q: Float[Array, "B T N H"],
    k: Float[Array, "B K T H"],
    v: Float[Array, "B K T H"],
    expiries: Expiries,
    chunk: Chunk,
    ops: PageOps,
) -> tuple[Float[Array, "B T N H"], PagedLayer]:
    """Run `core.paged_attention.extend_pages`, under a mesh on each device's own rows, heads and pages."""
    mesh, arenas = jax.sharding.get_abstract_mesh(), layer.arena.free_count.shape[0]
    if arenas != max(1, mesh.size if not mesh.empty else 1):
        raise ConfigError(
            f"a cache in pages must be used on the devices that it was made on, got a cache for {arenas} devices on "
            f"{mesh.size}; make the cache from the same model"
        )

    def own(arena, heads, q, k, v, expiries, position, count):
        part = chunk._replace(position=position, count=count)
        out, arena, heads = paged_attention.extend_pages(arena, heads, q, k, v, expiries, part, ops)
        return arena, heads, out

    heads = layer.own()
    arena_axes, head_axes = axes_of(layer.arena, heads, layers="")
    queries = "batch . kv_heads ."
    run = per_device(
        with_own_arena(own),
        k.shape[:2],
        [arena_axes, head_axes, queries, VECTORS, VECTORS, _expiry_axes(expiries), "batch .", "batch"],
        (arena_axes, head_axes, queries),
    )
    arena, heads, out = run(layer.arena, heads, q, k, v, expiries, chunk.position, chunk.count)
    return out, layer.updated(arena, heads)


def _expiry_axes(expiries: Expiries) -> Any:
    """Return the axes of each array of the decisions about a chunk, in place of the array."""
    last = None if expiries.last_expiry is None else HEADS
    return cast(Any, Expiries)(SLOTS, SLOTS, last, last)


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
    """Attend from a chunk to the slots of a cache and to the chunk itself, as `core.slot_attention` defines it.

    A decode step is a chunk of one token, whose pair is already in its slot, so `chunk` is None.
    """
    xla_only_because = None if read is None else "cannot skip the slots that a policy does not read"
    query = KernelQuery(q.shape[-1], q.dtype, slots.k.dtype, slots.capacity, xla_only_because=xla_only_because)
    kernel = "decode_attention" if q.shape[1] == 1 else "chunk_attention"
    name, blocks = select_implementation(kernel, query, implementation, interpret, blocks)
    if name == XLA:
        return slot_attention.slot_attention(q, slots, position, chunk, read=read)
    attend_slots = _kernel(kernel, name)
    rows = fold_queries(q, slots.k.shape[1])
    row_position = jnp.tile(position, (1, rows.shape[2] // q.shape[1]))
    run = per_device(
        partial(attend_slots, blocks=blocks, interpret=interpret),
        rows.shape[:2],
        [VECTORS, "batch .", VECTORS, VECTORS, SLOTS, SLOTS, HEADS],
        cast(Any, SoftmaxPart)(f". {SLOTS}", f". {SLOTS}", f". {VECTORS}"),
    )
    parts = [
        run(rows, row_position, slots.k, slots.v, slots.position, slots.expiry, slots_in_use(slots.expiry, position))
    ]
    if chunk is not None:
        k, v, expiry = chunk
        k_position = jnp.broadcast_to(position[:, None], expiry.shape)
        parts.append(
            run(rows, row_position, k, v, k_position, expiry, jnp.full(expiry.shape[:2], k.shape[2], jnp.int32))
        )
    merged = merge_parts(jax.tree.map(lambda *x: jnp.concatenate(x), *parts))
    return unfold_queries(merged.normalized().astype(q.dtype), q.shape[1])


@typed
def attend_to_pages(
    rows: Float[Array, "B K R H"],
    k_pages: Float[Array, "N S H"],
    v_pages: Float[Array, "N S H"],
    table: Int[Array, "B K P"],
    in_ring: Int[Array, "B K"],
    survivors: Int[Array, "B K"],
    *,
    ring_slots: int,
    implementation: str = AUTO,
    interpret: bool = False,
    blocks: Blocks | None = None,
) -> SoftmaxPart:
    """Attend from folded queries to the pairs in the pages of their heads: `core.paged_attention.attend_pages`.

    The arena is that of one device, so under a mesh the caller runs on each device's own rows and heads.
    """
    query = KernelQuery(rows.shape[-1], rows.dtype, k_pages.dtype, page_size=k_pages.shape[1])
    name, sizes = select_implementation("page_attention", query, implementation, interpret, blocks)
    args = rows, k_pages, v_pages, table, in_ring, survivors
    if name == XLA:
        return paged_attention.attend_pages(*args, ring_slots=ring_slots)
    if rows.shape[2] > paged_attention.FEW_ROWS:  # a chunk, whose blocks have as many rows as those of its other part
        sizes = select_implementation("chunk_attention", query, name, interpret, blocks).blocks
    kernel = _kernel("page_attention", name)
    return merge_parts(kernel(*args, ring_slots=ring_slots, blocks=sizes, interpret=interpret))


def attend_to_pairs(
    rows: Float[Array, "B K R H"],
    position: Int[Array, "B T"],
    pairs: Sequence[tuple[Array, Array, Array, Array]],
    implementation: str = AUTO,
    interpret: bool = False,
    blocks: Blocks | None = None,
) -> SoftmaxPart:
    """Attend from the folded queries of a chunk to pairs in no page: `core.paged_attention.attend_pairs`.

    The caller runs on each device's own rows and heads, as in `attend_to_pages`.
    """
    query = KernelQuery(rows.shape[-1], rows.dtype)
    name, blocks = select_implementation("chunk_attention", query, implementation, interpret, blocks)
    if name == XLA:
        return paged_attention.attend_pairs(rows, position, pairs)
    # One array for all; it holds each pair of a cache of fewer bits exactly.
    keys, values, k_position, expiry = (
        jnp.concatenate([x.astype(some[0].dtype) for x in some], axis=2) for some in zip(*pairs, strict=True)
    )
    kernel = partial(_kernel("chunk_attention", name), blocks=blocks, interpret=interpret)
    row_position = jnp.tile(position, (1, rows.shape[2] // position.shape[1]))
    return merge_parts(kernel(rows, row_position, keys, values, k_position, expiry, slots_in_use(expiry, position)))


@typed
def write_pairs(
    layer: LayerCache,
    k: Float[Array, "B K T H"],
    v: Float[Array, "B K T H"],
    position: Int[Array, "B K T"],
    expiry: Int[Array, "B K T"],
    score: Float[Array, "B K T"],
    keep: Bool[Array, "B K C"],
    new: Bool[Array, "B K T"],
    implementation: str = AUTO,
    interpret: bool = False,
    blocks: Blocks | None = None,
) -> LayerCache:
    """Write the pairs in `new` into the lowest slots that are not in `keep`: `core.compact_cache.write_pairs`."""
    query = KernelQuery(k.shape[-1], k.dtype, layer.k.dtype, layer.capacity)
    name, blocks = select_implementation("compaction", query, implementation, interpret, blocks)
    if name == XLA or k.shape[2] == 1:  # a single pair is not worth a kernel
        return compact_cache.write_pairs(layer, k, v, position, expiry, score, keep, new)
    kernel = partial(_kernel("compaction", name), blocks=blocks, interpret=interpret)
    run = per_device(kernel, k.shape[:2], [PAIRS, PAIRS, SLOTS, SLOTS], PAIRS)
    pairs = Pairs(k.astype(layer.k.dtype), v.astype(layer.v.dtype), position, expiry, score)
    return run(Pairs.of_layer(layer), pairs, keep, new).put_into(layer)


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
    """Update the cache in a decode step: rotate, decide about eviction, and write one pair per row and KV head.

    The pair goes into the lowest free slot. `q`, `k` and `v` are before RoPE, and `logit` is the decision score of the
    new token. If it exceeds `threshold`, the token marks pair seen - 1 (`decision_shift` 1) or its own pair
    (`decision_shift` 0) for eviction. If `decision_shift` is None, no pair is ever marked. A row of `count` 0 has no
    new token, and its cache is unchanged.

    Return the rotated queries and the updated cache.
    """
    query = KernelQuery(q.shape[-1], q.dtype, layer.k.dtype, layer.capacity)
    name, _ = select_implementation("decode_update", query, implementation, interpret, blocks)
    token, threshold = Token(q, k, v, cos, sin, logit), jnp.asarray(threshold, jnp.float32)
    fixed = {"window_size": window_size, "decision_shift": decision_shift}
    if name == XLA:
        return decode_update_xla.decode_update(token, layer, seen, count, threshold, **fixed)
    run = per_device(  # the query heads of a group are on the device of their key head
        partial(_kernel("decode_update", name), **fixed, interpret=interpret),
        k.shape[:2],
        [TOKEN, PAIRS, "batch", "batch", ""],
        (SLOTS, PAIRS, HEADS),
    )
    q, slots, forced = run(token, Pairs.of_layer(layer), seen, count, threshold)
    layer = slots.put_into(layer)
    return q, replace(layer, forced_evictions=layer.forced_evictions + forced)


def _kernel(kernel: str, implementation: str) -> Any:
    """Return the jitted function that `KERNELS` names."""
    return _jitted(KERNELS[kernel].written_for(implementation).function)


@functools.cache
def _jitted(function: str) -> Any:
    """Return the function named "module:function", jitted with its keyword arguments static.

    A model unrolls its layers to decode. Because all layers call the same jitted function, it is lowered and compiled
    only once, which saves minutes for 36 layers.
    """
    found = load(function)
    parameters = inspect.signature(found).parameters.values()
    fixed = [parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY]
    return jax.jit(found, static_argnames=fixed)
