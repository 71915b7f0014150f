"""Prefill and decoding against a compact cache: one function, `extend_rows`, for chunks of any length.

A chunk attends to the slots and to itself under the rule of `core/visibility.py`. Then the pairs that stay move into
free slots, so a dense cache never exists. Lengths are rounded up to a few sizes, so that few programs are compiled.
Errors are `ConfigError`.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from dms_jax.axes import Array
from dms_jax.config import OVERFLOWS, ModelConfig, Overflow
from dms_jax.config_reader import MAX_INT
from dms_jax.core.cache_base import AnyCache, HostBounds, TokenHistory
from dms_jax.core.compact_cache import CompactCache, empty_layer
from dms_jax.core.paged_cache import PagedCache
from dms_jax.engine.cache_capacity import (
    check_context,
    check_overflow,
    check_slots,
    default_overflow,
    grow_for,
    host_bounds,
)
from dms_jax.engine.decode_layout import UnrolledDecoder, num_layer_compilations, output_logits, unrolled
from dms_jax.engine.page_memory import fitted
from dms_jax.errors import ConfigError, shown
from dms_jax.models.decoder import Decoder
from dms_jax.models.token_ids import check_ids
from dms_jax.platform_defaults import platform_defaults
from dms_jax.policies import CachePolicy, policy_of
from dms_jax.sharding import mesh_of, shard_heads

MIN_CHUNK = 16  # tokens; shorter chunks are padded to it


def select_policy(config: ModelConfig, policy: CachePolicy | str | None, dense: bool) -> CachePolicy:
    """Resolve the arguments `policy` and `dense` of `init_cache`."""
    if dense and policy is not None:
        raise ConfigError("dense and policy exclude each other; give either dense=True or a policy")
    return policy_of(config, "dense" if dense else policy)


def init_cache(
    model: Decoder,
    batch_size: int,
    capacity: int | tuple[int, ...] | list[int],
    *,
    policy: CachePolicy | str | None = None,
    overflow: Overflow | None = None,
    dense: bool = False,
    dtype: jnp.dtype | None = None,
) -> CompactCache:
    """Make an empty cache.

    Args:
      capacity: slots per row and KV head, one number or one per layer. A head needs at most one slot per token, and on
        average about 1/CR of that; heads differ, so leave a margin. Under "dms_budget:N" it needs no more than its
        budget, N.
      policy: decides which pairs leave the cache: an object such as `TOVA(256)`, or a name of
        `dms_jax.policies.POLICIES` with its budget in pairs, such as "tova:256". "prompt:tova:256" ranks the pairs
        once, when `compress_prompt` is called after the prefill. None means the model's own policy, and keeps
        everything for a model without an evict head.
      overflow: what happens when a head needs more slots than it has. "evict" pushes out the pair with the highest
        evict logit outside the window, the oldest among equals, and counts it in `forced_evictions`; it is the default
        of a learned policy. "raise" raises ConfigError; it is the default of policies that evict nothing or have a
        budget. "grow" makes larger buffers and compiles again.
      dense: keep everything, whatever the model has learned; equivalent to policy="dense".
      dtype: the dtype of keys and values; by default the dtype of the model's weights.
    """
    config = model.config
    capacities = tuple(capacity) if isinstance(capacity, tuple | list) else (capacity,) * config.num_layers
    if len(capacities) != config.num_layers:
        raise ConfigError(
            f"capacity must be one number or one per layer ({config.num_layers}), got {len(capacities)} numbers"
        )
    policy = select_policy(config, policy, dense)
    overflow = overflow or default_overflow(policy)
    if overflow not in OVERFLOWS:
        raise ConfigError(f"overflow must be one of {', '.join(OVERFLOWS)}, got {overflow!r}")
    for name, value in [("batch_size", batch_size), *(("capacity", c) for c in capacities)]:
        if not isinstance(value, int | np.integer) or isinstance(value, bool) or not 1 <= value <= MAX_INT:
            raise ConfigError(f"{name} must be a whole number >= 1 and below 2**31, got {shown(value)}")
    dtype = dtype or model.embed.get_value().dtype
    state = policy.head_state(config)
    with mesh_of(model.embed.get_value()):
        layers = tuple(
            shard_heads(
                empty_layer(batch_size, config.num_kv_heads, int(c), config.head_dim, dtype, policy.features, state)
            )
            for c in capacities
        )
        seen = shard_heads(jnp.zeros(batch_size, jnp.int32))
    table, largest = policy.budget_table(config.num_layers, config.num_kv_heads), None
    if table is not None:
        rows = jnp.asarray(np.repeat(table[:, None], batch_size, axis=1))
        layers = tuple(replace(layer, budget=rows[index]) for index, layer in enumerate(layers))
        largest = tuple(table.max(axis=1).tolist())
    cache = CompactCache(layers, seen, policy.in_cache(), overflow)
    empty = HostBounds(0, (0,) * config.num_layers, largest)
    return cache.with_bounds(empty).with_history(TokenHistory.empty(int(batch_size)))


def prefill(
    model: Decoder,
    cache: AnyCache,
    tokens: Int[Array, "B T"],
    lengths: Int[Array, "B"] | None = None,
    chunk_size: int | None = None,
    *,
    padding: str = "right",
    mask: Bool[Array, "B T"] | None = None,
    threshold: float | Float[Array, ""] = 0.0,
    last_only: bool = False,
    donate: bool = False,
    watch: Callable[[int], object] | None = None,
) -> tuple[Float[Array, "B T V"] | Float[Array, "B V"], AnyCache]:
    """Append tokens to every row: a prompt, or the next turn. Return logits [B T V], fp32, and the new cache.

    Args:
      lengths: number of real tokens in each row, 0 to T; the rest of the row is padding, on the side `padding` ("right"
        or "left").
      mask: True where a token is real, instead of `lengths`; the real tokens of a row must be next to each other.
      chunk_size: tokens per chunk; the default comes from `platform_defaults`. Memory grows with its square. Logits do
        not depend on it unless pairs are forced out of a full cache, or the policy ranks pairs, after each chunk.
      threshold: a token evicts iff its logit exceeds it; a new value compiles nothing.
      last_only: return only the logits [B V] of each row's last real token (zeros for a row without real tokens).
      donate: give the old cache's memory to the new one. The old cache must not be used afterwards.
      watch: called after each chunk, once the device has finished it, with the number of columns done. If it raises,
        the call ends with that exception.

    Logits of padding are 0, and a row that is all padding keeps its state. Raises ConfigError for token ids outside the
    vocabulary, gaps in the mask, rows beyond the model's context, and too many pairs for a cache with overflow "raise".
    """
    if chunk_size is not None and chunk_size < 1:
        raise ConfigError(f"chunk_size must be >= 1, got {chunk_size}")
    if isinstance(threshold, float) and math.isnan(threshold):
        raise ConfigError("threshold must be a number, got nan")
    tokens, first, count = _left_aligned(tokens, lengths, padding, mask, cache.batch_size)
    for row, (ids, number) in enumerate(zip(tokens, count, strict=True)):
        check_ids(ids[:number], model.config.vocab_size, f"row {row}")
    real = np.arange(tokens.shape[1]) < count[:, None]
    tokens = np.where(real, tokens, 0).astype(np.int32)
    check_context(model.config, cache, count)
    check_slots(cache, count, count, chunk_size)
    history = cache.history
    logits, cache = prefill_rows(
        model, cache, tokens, count, chunk_size, threshold, last_only=last_only, donate=donate, watch=watch
    )
    if history is not None:
        cache = cache.with_history(history.extended([ids[:number] for ids, number in zip(tokens, count, strict=True)]))
    if last_only:
        return logits, cache
    length = tokens.shape[1]
    logits = jnp.pad(logits[:, :length], ((0, 0), (0, max(0, length - logits.shape[1])), (0, 0)))
    return (_shift_rows(logits, first) if first.any() else logits), cache


def prefill_rows(
    model: Decoder,
    cache: AnyCache,
    tokens: Int[np.ndarray, "B T"],
    count: Int[np.ndarray, "B"],
    chunk_size: int | None,
    threshold: float | Float[Array, ""],
    *,
    last_only: bool,
    donate: bool,
    watch: Callable[[int], object] | None,
    ahead: int | None = None,
) -> tuple[Float[Array, "B T V"] | Float[Array, "B V"], AnyCache]:
    """Do the work of `prefill` for a caller that has checked ids and sizes.

    The first `count` tokens of each row are real. The T of the logits is the number of columns that were computed:
    `count.max()`, with the last chunk rounded up. `ahead` is the number of tokens that may follow, as far as the caller
    knows; None is all that a cache in pages was made for.
    """
    runner, size, total = unrolled(model), chunk_size or platform_defaults().prefill_chunk, int(count.max())
    is_first = host_bounds(cache).seen == 0
    last, parts = jnp.zeros((cache.batch_size, model.config.vocab_size), jnp.float32), []
    for start in range(0, max(total, 1), size):
        part = tokens[:, start : start + size]
        part = np.pad(part, ((0, 0), (0, _bucket(part.shape[1], size) - part.shape[1])))
        counts = np.clip(count - start, 0, part.shape[1]).astype(np.int32)
        own = donate or start > 0  # from the second chunk on, the cache was made here, so nobody else uses it
        cache = grow_for(model.config, cache, int(counts.max()), total - start + (ahead or 0), own)
        before = host_bounds(cache)
        chunk = part, counts, jnp.float32(threshold), last if last_only else None
        logits, cache = _extend(runner, cache, *chunk, donate=own)
        last = logits if last_only else last
        parts.append(logits)
        cache = check_overflow(cache, before, int(counts.max()))
        if watch is not None:
            jax.block_until_ready(logits)
            watch(min(start + size, total))
    if is_first and isinstance(cache, PagedCache):
        more = cache.max_length - total if ahead is None else ahead
        cache = cast(Any, fitted(model.config, cache, more, donate=True))
    return last if last_only else jnp.concatenate(parts, axis=1) if len(parts) > 1 else parts[0], cache


def decode_step(
    model: Decoder,
    cache: AnyCache,
    tokens: Int[Array, "B"],
    *,
    active: Bool[Array, "B"] | None = None,
    threshold: float | Float[Array, ""] = 0.0,
    donate: bool = False,
) -> tuple[Float[Array, "B V"], AnyCache]:
    """Append one token to every row that is `active` (all by default); the others stay as they are and get logits of 0.

    Return logits [B V], fp32, and the new cache. `threshold` and `donate` are as in `prefill`. Raises ConfigError for
    wrong shapes, rows beyond the model's context and token ids outside the vocabulary. Ids in a `jax.Array` are not
    checked, because reading them would wait for the device; there, ids outside the vocabulary are clipped. The new
    cache has no `history`, so that a step costs nothing on the host.
    """
    if np.shape(tokens) != (cache.batch_size,):
        raise ConfigError(f"tokens must be one for each row, shape ({cache.batch_size},), got shape {np.shape(tokens)}")
    if not isinstance(tokens, jax.Array):
        tokens = check_ids(np.asarray(tokens), model.config.vocab_size)
    if active is not None and np.shape(active) != (cache.batch_size,):
        raise ConfigError(
            f"active must be one flag for each row, shape ({cache.batch_size},), got shape {np.shape(active)}"
        )
    count = np.ones(cache.batch_size, np.int32) if active is None else jnp.asarray(active).astype(jnp.int32)
    check_context(model.config, cache, np.ones(1, np.int32))
    cache = grow_for(model.config, cache, 1, donate=donate)
    before = host_bounds(cache)
    chunk = jnp.asarray(tokens)[:, None], count, jnp.float32(threshold), None
    logits, cache = _extend(unrolled(model), cache, *chunk, donate=donate)
    return logits[:, 0], check_overflow(cache, before, 1)


def extend_rows(
    model: UnrolledDecoder,
    cache: AnyCache,
    tokens: Int[Array, "B T"],
    count: Int[Array, "B"],
    threshold: Float[Array, ""],
    last: Array | None,
) -> tuple[Array, AnyCache]:
    """Append the first `count` tokens of each row: the step of every prefill and decode loop.

    Return the logits of all tokens [B T V], 0 for padding, if `last` is None. Otherwise, `last` [B V] holds the logits
    of each row's last token so far; return them after this chunk. A row without tokens in the chunk keeps its logits.
    Unless it runs inside of a jitted function, the new cache takes over the memory of the old one.
    """
    hidden, cache = model.extend(cache, tokens, count, threshold)
    return _read_logits(hidden, model.head, count, last), cache


@jax.jit
def _read_logits(hidden: Array, head: Array, count: Array, last: Array | None) -> Array:
    """Return the logits as `extend_rows` says."""
    if last is None:
        real = jnp.arange(hidden.shape[1])[None] < count[:, None]
        return jnp.where(real[..., None], output_logits(hidden, head), 0.0)
    final = jnp.take_along_axis(hidden, jnp.maximum(count - 1, 0)[:, None, None], axis=1)[:, 0]
    return jnp.where((count > 0)[:, None], output_logits(final, head), last)


# The cache is always donated. A cache that the caller keeps is copied first, which the program would do as well if it
# were not donated, so that one program serves both.
_whole = jax.jit(extend_rows, donate_argnums=1)
copied = jax.jit(lambda cache: jax.tree.map(jnp.copy, cache))


def _extend(model: UnrolledDecoder, cache: AnyCache, *chunk: Any, donate: bool) -> tuple[Array, AnyCache]:
    """Run `extend_rows` in the way that compiles fastest at full speed: layer by layer, or as one program."""
    with mesh_of(model.embed):
        own = cache if donate else copied(cache)
        return (extend_rows if model.runs_by_layer else _whole)(model, own, *chunk)


def num_compilations() -> int:
    """Count the programs that `prefill` and `decode_step` have compiled so far: a few for each size."""
    programs = _whole, _read_logits
    return num_layer_compilations() + sum(p._cache_size() for p in programs)  # pyrefly: ignore[missing-attribute]


@jax.jit
def _shift_rows(logits: Float[Array, "B T V"], first: Int[Array, "B"]) -> Float[Array, "B T V"]:
    """Move row b right by `first[b]` columns; the padding at its end wraps around to its start."""
    source = (jnp.arange(logits.shape[1])[None] - first[:, None]) % logits.shape[1]
    return jnp.take_along_axis(logits, source[..., None], axis=1)


def _bucket(length: int, max_length: int) -> int:
    """Round `length` up to a power of two, at most `max_length`, so that few sizes are compiled."""
    return min(max_length, max(MIN_CHUNK, 1 << (length - 1).bit_length()))


def _left_aligned(tokens, lengths, padding, mask, batch) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return rows [B T] with their real tokens moved to the left, each row's first real column, and its real length."""
    tokens = np.asarray(tokens)
    if tokens.ndim != 2 or tokens.shape[0] != batch or tokens.shape[1] < 1:
        raise ConfigError(f"tokens must have the shape [{batch} rows, at least 1], got {list(tokens.shape)}")
    length = tokens.shape[1]
    if padding not in ("left", "right"):
        raise ConfigError(f"padding must be left or right, got {padding!r}")
    if mask is not None and lengths is not None:
        raise ConfigError("lengths and mask exclude each other; give either lengths or mask")
    if mask is not None:
        mask = np.asarray(mask).astype(bool)
        if mask.shape != tokens.shape:
            raise ConfigError(f"mask must have the shape of tokens, {list(tokens.shape)}, got {list(mask.shape)}")
        count, first = mask.sum(1), np.argmax(mask, axis=1)
        last = length - 1 - np.argmax(mask[:, ::-1], axis=1)
        if gaps := np.flatnonzero((count > 0) & (last - first + 1 != count)).tolist():
            raise ConfigError(
                f"the real tokens of each row must be next to each other, but the mask of row {gaps[0]} has gaps; "
                "move them together, or call prefill twice"
            )
    else:
        count = np.full(batch, length) if lengths is None else np.asarray(lengths)
        if count.shape != (batch,) or not np.issubdtype(count.dtype, np.integer):
            raise ConfigError(
                f"lengths must be one whole number for each of {batch} rows, got {np.asarray(lengths).tolist()!r}"
            )
        if (bad := np.flatnonzero((count < 0) | (count > length))).size:
            raise ConfigError(
                f"lengths must be 0 to {length}, the columns of tokens, got {count[bad[0]]} for row {bad[0]}"
            )
        first = length - count if padding == "left" else np.zeros(batch, int)
    column = (np.arange(length) + first[:, None]) % length
    return np.take_along_axis(tokens, column, axis=1), first.astype(np.int32), count.astype(np.int32)
