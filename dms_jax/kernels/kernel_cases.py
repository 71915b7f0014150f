"""Inputs, reference and cost of each kernel, for `self_check`, `benchmarks.kernels` and `benchmarks.autotune`; and in
`SUITES` the shapes.

A new kernel needs a function that makes a `Case`, and an entry of `SUITES`.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dms_jax.core import chunked_attention, compact_cache, slot_attention
from dms_jax.core.compact_cache import LayerCache
from dms_jax.core.reference_attention import reference_attention
from dms_jax.core.rotary import rope_cos_sin
from dms_jax.core.visibility import expiry_of
from dms_jax.kernels import attention_api, decode_update_xla
from dms_jax.kernels.filled_layer import HeadCounts, filled_layer, held_pairs
from dms_jax.kernels.kernel_case import Case, with_implementation
from dms_jax.kernels.operands import Token
from dms_jax.kernels.page_case import page_case

# Implementations of `jax.nn.dot_product_attention`, which has no gate and no lengths per head: the cost of a dense
# model.
DENSE = {"dense_xla": "xla", "dense_cudnn": "cudnn"}
TOLERANCE = 2e-2  # of `error` for bf16
BF16, FP8 = jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float8_e4m3fn)


def train_case(
    batch: int, length: int, heads: int, kv_heads: int, head_dim: int, window: int, dtype: jnp.dtype
) -> Case:
    """Make a case of training attention with all gradients, under a gate that evicts about half the pairs."""
    keys = jax.random.split(jax.random.key(0), 5)
    q, k, v = (
        jax.random.normal(key, (batch, length, n, head_dim), dtype)
        for key, n in zip(keys, (heads, kv_heads, kv_heads), strict=False)
    )
    log_keep = jax.nn.log_sigmoid(20 * jax.random.normal(keys[3], (batch, kv_heads, length)))
    d_out = jax.random.normal(keys[4], q.shape, dtype)

    def with_gradients(attention):
        def run(q, k, v, log_keep, d_out):
            out, pull = jax.vjp(lambda *x: attention(*x, window_size=window), q, k, v, log_keep)
            return out, *pull(d_out.astype(out.dtype))

        return run

    def dense(how):
        if how == "xla" and length > 4096:  # XLA would hold all scores at once
            return None

        def run(q, k, v, log_keep, d_out):
            out, pull = jax.vjp(
                lambda *x: jax.nn.dot_product_attention(*x, is_causal=True, implementation=how), q, k, v
            )
            return out, *pull(d_out), log_keep

        return run

    def feed(inputs, out):
        small = lambda x, step: x + (1e-6 * step).astype(x.dtype)
        return {index: small(inputs[index], out[index + 1]) for index in range(4)}

    oracle = reference_attention if length <= 2048 else chunked_attention.gated_attention
    size = jnp.dtype(dtype).itemsize
    return Case(
        "train_attention",
        {
            "batch": batch,
            "length": length,
            "heads": heads,
            "kv_heads": kv_heads,
            "head_dim": head_dim,
            "window": window,
        },
        dtype,
        dtype,
        (q, k, v, log_keep, d_out),
        lambda *how: with_gradients(with_implementation(attention_api.gated_attention, *how)),
        with_gradients(oracle),
        feed,
        # The forward pass reads q, k, v and writes out; the backward pass reads these and d_out, and writes dq, dk, dv.
        min_bytes=size * (5 * q.size + 3 * (k.size + v.size)),
        # Causal: half of 4 T^2 H in the forward pass, and 2.5 times that in the backward pass.
        flops=3.5 * 2 * batch * heads * length**2 * head_dim,
        dense=dense,
    )


def dense_decode(live: int, how: Any):
    """Return dense attention over the first `live` slots of every head, as JAX's implementation `how` computes it."""

    def run(q, layer, position, k, v, expiry):
        keys, values = (x[:, :, :live].astype(q.dtype).swapaxes(1, 2) for x in (layer.k, layer.v))
        return (jax.nn.dot_product_attention(q, keys, values, implementation=how),)

    return run


def slot_case(
    batch: int,
    queries: int,
    capacity: int,
    live: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    dtype: jnp.dtype,
    cache_dtype: jnp.dtype | None = None,
    head_counts: HeadCounts | None = None,
) -> Case:
    """Make a case of `queries` (1 is a decode step) over `live` of `capacity` slots on average. Without `head_counts`,
    which also choose the capacity, the counts of heads are up to a quarter larger or smaller if the slots allow."""
    cache_dtype = cache_dtype or dtype
    numbers = np.random.default_rng(0)
    held, capacity = held_pairs(numbers, batch, kv_heads, capacity, live, head_counts)
    layer, seen = filled_layer(numbers, held, capacity, head_dim, cache_dtype)
    keys = jax.random.split(jax.random.key(0), 3)
    q = jax.random.normal(keys[0], (batch, queries, heads, head_dim), dtype)
    k, v = (jax.random.normal(key, (batch, kv_heads, queries, head_dim), dtype).astype(cache_dtype) for key in keys[1:])
    position = seen[:, None] + jnp.arange(queries)[None]
    marked = jnp.asarray(numbers.random((batch, kv_heads, queries)) < 0.5)
    expiry = expiry_of(marked, position[:, None], queries // 4)
    chunk = lambda k, v, expiry: None if queries == 1 else (k, v, expiry)
    counts = int(jnp.sum(layer.expiry >= seen[:, None, None]))

    def attend_with(attention):
        return lambda q, layer, position, k, v, expiry: (attention(q, layer, position, chunk(k, v, expiry)),)

    size, cached = jnp.dtype(dtype).itemsize, jnp.dtype(cache_dtype).itemsize
    pairs = heads // kv_heads * queries * counts + batch * heads * queries * (queries + 1) // 2 * (queries > 1)
    return Case(
        "decode_attention" if queries == 1 else "chunk_attention",
        {
            "batch": batch,
            "queries": queries,
            "capacity": capacity,
            "live": live,
            "heads": heads,
            "kv_heads": kv_heads,
            "head_dim": head_dim,
        },
        dtype,
        cache_dtype,
        (q, layer, position, k, v, expiry),
        lambda *how: attend_with(with_implementation(attention_api.attend_to_slots, *how)),
        attend_with(slot_attention.slot_attention),
        lambda inputs, out: {0: inputs[0] + (1e-6 * out[0]).astype(dtype)},
        min_bytes=counts * (2 * head_dim * cached + 8) + 2 * size * q.size + (k.size + v.size) * cached * (queries > 1),
        flops=4 * head_dim * pairs,
        dense=lambda how: dense_decode(live, how) if queries == 1 else None,
    )


def compaction_case(
    batch: int,
    pairs: int,
    capacity: int,
    kv_heads: int,
    head_dim: int,
    dtype: jnp.dtype,
    cache_dtype: jnp.dtype | None = None,
) -> Case:
    """Make a case that writes the surviving half of a chunk into a cache with a third of its slots free, anywhere."""
    cache_dtype = cache_dtype or dtype
    numbers = np.random.default_rng(0)
    layer, _ = filled_layer(numbers, np.full((batch, kv_heads), capacity), capacity, head_dim, cache_dtype)
    new_k, new_v = (
        jax.random.normal(key, (batch, kv_heads, pairs, head_dim), dtype) for key in jax.random.split(jax.random.key(0))
    )
    shape = (batch, kv_heads, pairs)
    position, score = (
        jnp.asarray(numbers.integers(0, 1 << 20, shape), jnp.int32),
        jnp.asarray(numbers.normal(size=shape), jnp.float32),
    )
    stays = numbers.random((batch, kv_heads, capacity)) > max(0.34, 1.1 * pairs / 2 / capacity)
    comes = numbers.random(shape) < 0.5
    comes &= np.cumsum(comes, -1) <= (~stays).sum(-1, keepdims=True)
    fields = (position, position + 100, score, jnp.asarray(stays), jnp.asarray(comes))

    def write_with(write_pairs):
        return lambda layer, *new: (write_pairs(layer, *new),)

    return Case(
        "compaction",
        {"batch": batch, "pairs": pairs, "capacity": capacity, "kv_heads": kv_heads, "head_dim": head_dim},
        dtype,
        cache_dtype,
        (layer, new_k, new_v, *fields),
        lambda *how: write_with(with_implementation(attention_api.write_pairs, *how)),
        write_with(compact_cache.write_pairs),
        lambda inputs, out: {0: out[0]},
        min_bytes=int(comes.sum())
        * (2 * head_dim * (jnp.dtype(dtype).itemsize + jnp.dtype(cache_dtype).itemsize) + 2 * 12),
        flops=0.0,
    )


def update_case(
    batch: int,
    capacity: int,
    live: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    dtype: jnp.dtype,
    cache_dtype: jnp.dtype | None = None,
    head_counts: HeadCounts | None = None,
) -> Case:
    """Make a case of one token per row, in a cache whose first free slot follows the live ones. `head_counts` are as in
    `slot_case`."""
    cache_dtype = cache_dtype or dtype
    numbers = np.random.default_rng(0)
    held, capacity = held_pairs(numbers, batch, kv_heads, capacity, live, head_counts)
    layer, seen = filled_layer(numbers, held, capacity, head_dim, cache_dtype)
    keys = jax.random.split(jax.random.key(0), 3)
    q, k, v = (
        jax.random.normal(key, (batch, n, head_dim), dtype)
        for key, n in zip(keys, (heads, kv_heads, kv_heads), strict=True)
    )
    cos, sin = rope_cos_sin(seen, 1e4 ** -jnp.linspace(0, 1, head_dim // 2))
    logit = jnp.asarray(numbers.normal(size=(batch, kv_heads)), jnp.float32)
    fixed = {"window_size": 64, "decision_shift": 1}

    def reference(q, k, v, cos, sin, logit, *cache):
        return decode_update_xla.decode_update(Token(q, k, v, cos, sin, logit), *cache, **fixed)

    inputs = (q, k, v, cos, sin, logit, layer, seen, jnp.ones(batch, jnp.int32), jnp.float32(0))
    return Case(
        "decode_update",
        {
            "batch": batch,
            "capacity": capacity,
            "live": live,
            "heads": heads,
            "kv_heads": kv_heads,
            "head_dim": head_dim,
        },
        dtype,
        cache_dtype,
        inputs,
        lambda *how: with_implementation(partial(attention_api.decode_update, **fixed), *how),
        reference,
        lambda inputs, out: {0: inputs[0] + (1e-6 * out[0]).astype(dtype), 6: out[1]},
        # Position and expiry of all slots are read; one row of keys and one of values is written.
        min_bytes=batch * kv_heads * (8 * capacity + 2 * head_dim * jnp.dtype(cache_dtype).itemsize)
        + 2 * q.size * jnp.dtype(dtype).itemsize,
        flops=0.0,
    )


def error(case: Case, outputs: tuple, wanted: tuple) -> float:
    """Return the largest error of any row (last axis) of any output, relative to the norm of that row.

    If the typical norm in the array is larger, the error is relative to that norm, because a gradient that should be 0
    consists of rounding errors. If integers are not equal, the error is infinite.
    """
    worst = 0.0
    for ours, theirs in zip(jax.tree.leaves(outputs), jax.tree.leaves(wanted), strict=True):
        if jnp.issubdtype(theirs.dtype, jnp.integer):
            if not np.array_equal(ours, theirs):
                return math.inf
            continue
        ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
        norm = np.linalg.norm(theirs, axis=-1)
        typical = np.sqrt(np.mean(norm**2)) or 1.0
        found = float((np.linalg.norm(ours - theirs, axis=-1) / np.maximum(norm, typical)).max())
        worst = max(worst, found if math.isfinite(found) else math.inf)
    return worst


def in_fp32(inputs: Any) -> Any:
    """Convert inputs to fp32. A cache keeps its dtype, because the reference must round what it writes as the kernel
    does."""
    wider = lambda x: (
        x.astype(jnp.float32) if not isinstance(x, LayerCache) and jnp.issubdtype(x.dtype, jnp.floating) else x
    )
    return jax.tree.map(wider, inputs, is_leaf=lambda x: isinstance(x, LayerCache))


CaseMaker = Callable[..., Case]  # called with dtype=; cases are made late, so that one at a time is in memory


class Suite(NamedTuple):
    """The cases of one kernel."""

    cpu: Sequence[CaseMaker]  # tiny, because interpret mode takes seconds per block
    quick: Sequence[CaseMaker]
    full: Sequence[CaseMaker]
    tuned: Callable[[int, jnp.dtype], CaseMaker]  # (head size, cache dtype) -> the case for autotuning
    cache_dtypes: tuple[jnp.dtype, ...] = (BF16, FP8)  # the cache dtypes for autotuning
    takes_counts: bool = False  # the cases take `head_counts`


def full_decode_cases(case: Callable[..., Case]) -> Iterator[CaseMaker]:
    shapes = [(8, 4096, 128), (8, 32768, 128), (32, 4096, 128), (32, 4096, 64), (32, 4096, 128, FP8), (1, 32768, 128)]
    for batch, live, head_dim, *cached in shapes:
        capacity = live * 5 // 4 // 64 * 64
        yield partial(case, batch, 1, capacity, live, 32, 8, head_dim, cache_dtype=cached[0] if cached else None)


SUITES = {
    "train_attention": Suite(
        cpu=[partial(train_case, 1, 128, 2, 1, 64, 40), partial(train_case, 2, 256, 4, 2, 128, 60)],
        quick=[partial(train_case, 1, 4096, 16, 4, 128, 256)],
        full=[
            partial(train_case, 2, 8192, 32, 8, 128, 256),
            partial(train_case, 1, 32768, 32, 8, 128, 256),
            partial(train_case, 2, 8192, 32, 8, 64, 256),
        ],
        tuned=lambda head_dim, _: partial(train_case, 1, 8192, 16, 4, head_dim, 256),
        cache_dtypes=(BF16,),
    ),
    "decode_attention": Suite(
        cpu=[
            partial(slot_case, 1, 1, 256, 150, 4, 2, 64),
            partial(slot_case, 2, 1, 512, 300, 8, 2, 128, cache_dtype=FP8),
        ],
        quick=[partial(slot_case, 8, 1, 8192, 4096, 32, 8, 128)],
        full=[*full_decode_cases(slot_case)],
        tuned=lambda head_dim, cached: partial(slot_case, 16, 1, 8192, 6000, 32, 8, head_dim, cache_dtype=cached),
        takes_counts=True,
    ),
    "chunk_attention": Suite(
        cpu=[partial(slot_case, 1, 64, 128, 100, 2, 1, 64)],
        quick=[partial(slot_case, 1, 1024, 4096, 3000, 32, 8, 128)],
        full=[partial(slot_case, 4, 1024, 8192, 6000, 32, 8, 128)],
        tuned=lambda head_dim, cached: partial(slot_case, 2, 1024, 8192, 6000, 32, 8, head_dim, cache_dtype=cached),
        takes_counts=True,
    ),
    "page_attention": Suite(
        cpu=[
            partial(page_case, 1, 1, 512, 200, 4, 2, 64),
            partial(page_case, 2, 16, 512, 200, 8, 2, 128, cache_dtype=FP8),
        ],
        quick=[partial(page_case, 8, 1, 16384, 4096, 32, 8, 128)],
        full=[*full_decode_cases(page_case), partial(page_case, 4, 1024, 24576, 6000, 32, 8, 128)],
        tuned=lambda head_dim, cached: partial(page_case, 16, 1, 24576, 6000, 32, 8, head_dim, cache_dtype=cached),
        takes_counts=True,
    ),
    "compaction": Suite(
        cpu=[partial(compaction_case, 1, 64, 128, 2, 64), partial(compaction_case, 2, 128, 512, 2, 128)],
        quick=[partial(compaction_case, 8, 1024, 8192, 8, 128)],
        full=[partial(compaction_case, batch, 1024, 8192, 8, 128) for batch in (8, 64)],
        tuned=lambda head_dim, cached: partial(compaction_case, 8, 1024, 8192, 8, head_dim, cache_dtype=cached),
    ),
    "decode_update": Suite(
        cpu=[partial(update_case, 2, 128, 60, 4, 2, 64)],
        quick=[partial(update_case, 32, 4096, 3000, 32, 8, 128)],
        full=[partial(update_case, batch, 8192, 4096, 32, 8, 128) for batch in (8, 64)],
        tuned=lambda head_dim, cached: partial(update_case, 32, 8192, 6000, 32, 8, head_dim, cache_dtype=cached),
        takes_counts=True,
    ),
}
