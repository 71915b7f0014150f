"""Prefill and decode against a compact cache: one jitted function, `extend`, for chunks of any length.

A chunk attends to the slots and to itself under the one rule, then its survivors move into free slots, so a dense cache
never exists. The cache is passed in and returned. Lengths are rounded up to a few sizes, so nothing is compiled again.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from dms_jax.axes import Array
from dms_jax.config_reader import MAX_INT
from dms_jax.core.compact_cache import OVERFLOWS, CompactCache, HostBounds, Overflow, empty_layer
from dms_jax.engine.cache_capacity import bounds, check_context, check_forced, check_room, with_room
from dms_jax.engine.decode_layout import UnrolledDecoder, unrolled
from dms_jax.errors import ConfigError, shown
from dms_jax.models.decoder import Decoder
from dms_jax.policies import CachePolicy, policy_of
from dms_jax.policies.cache_policy import UNBOUNDED
from dms_jax.sharding import mesh_of, target_device

CHUNK = {"cpu": 256}  # tokens per prefill chunk, by backend: scores of a chunk against itself are [B N chunk chunk]
DEFAULT_CHUNK = 1024
SMALLEST_CHUNK = 16


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
    """An empty cache.

    Args:
      capacity: slots per row and KV head, one number or one per layer. A head needs at most as many as tokens will come, and
        about 1/CR of that on average; heads differ, so leave room.
      policy: who leaves the cache. None: the model's own, and none for a plain model. A name of `dms_jax.policies.POLICIES`
        with its budget in pairs, or an object: "tova:256" or `TOVA(256)`. "prompt:tova:256" ranks once, when
        `compress_prompt` is called after the prefill.
      overflow: what happens when a head wants more. "evict", the default of a learned policy: push out the pair with the
        highest evict logit outside the window, the oldest among equals, and count it in `forced_evictions`; "raise", the
        default where nothing leaves or a budget says how much does: a ConfigError; "grow": the next size, compiled anew.
      dense: the same as policy="dense": keep everything, whatever the model has learned.
      dtype: of keys and values; by default that of the model's weights.

    Raises ConfigError.
    """
    config = model.config
    capacities = tuple(capacity) if isinstance(capacity, tuple | list) else (capacity,) * config.num_layers
    if len(capacities) != config.num_layers:
        raise ConfigError(
            f"capacity lists {len(capacities)} layers, this model has {config.num_layers}; give one number, or {config.num_layers}"
        )
    if dense and policy is not None:
        raise ConfigError("give either dense=True or a policy, not both")
    policy = policy_of(config, "dense" if dense else policy)
    limits = policy.slot_bounds()
    overflow = overflow or ("evict" if limits.max is None and limits.min < UNBOUNDED else "raise")
    if overflow not in OVERFLOWS:
        raise ConfigError(f"overflow must be one of {', '.join(OVERFLOWS)}; got {overflow!r}")
    for name, value in [("batch_size", batch_size), *(("capacity", c) for c in capacities)]:
        if not isinstance(value, int | np.integer) or isinstance(value, bool) or not 1 <= value <= MAX_INT:
            raise ConfigError(f"{name} must be a whole number >= 1 and below 2**31, got {shown(value)}")
    dtype = dtype or model.embed.get_value().dtype
    layers = tuple(
        empty_layer(batch_size, config.num_kv_heads, int(c), config.head_dim, dtype, policy.features)
        for c in capacities
    )
    empty = HostBounds(0, (0,) * config.num_layers)
    return CompactCache(layers, jnp.zeros(batch_size, jnp.int32), policy, overflow, empty)


def prefill(
    model: Decoder,
    cache: CompactCache,
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
) -> tuple[Float[Array, "B T V"] | Float[Array, "B V"], CompactCache]:
    """Append tokens to every row: a prompt, or the next turn after decoding. Returns logits [B T V], fp32, and the new cache.

    Args:
      lengths: real tokens of each row, 0 to T; the others are padding, on the `padding` side ("right" or "left").
      mask: True where a token is real, instead of `lengths`; real tokens of a row must be next to each other.
      chunk_size: tokens handled at a time, by default 256 on CPU. Memory grows with its square; logits do not depend on it
        unless pairs are forced out of a full cache or the policy ranks them, which it does after each chunk.
      threshold: a token evicts iff its logit exceeds it; a number that changes without compiling.
      last_only: logits [B V] of each row's last real token only (zeros for a row without any).
      donate: give the old cache's memory to the new one. The old one must then not be used again.
      watch: called after each chunk, once it is done, with the columns of tokens that are; what it raises ends the call.

    Logits of padding are 0, and a row that is all padding keeps its state. Raises ConfigError for tokens outside the
    vocabulary, gaps, rows beyond the model's context, and an overflow that the cache's policy calls an error.
    """
    tokens, first, count = _rows(tokens, lengths, padding, mask, cache.batch_size, model.config.vocab_size)
    if chunk_size is not None and chunk_size < 1:
        raise ConfigError(f"chunk_size must be >= 1, got {chunk_size}")
    length = tokens.shape[1]
    size = chunk_size or CHUNK.get(target_device()[0], DEFAULT_CHUNK)
    check_context(model.config, cache, count)
    check_room(cache, int(count.max()))
    runner, parts = unrolled(model), []
    last = jnp.zeros((cache.batch_size, model.config.vocab_size), jnp.float32)
    for start in range(0, max(int(count.max()), 1), size):
        part = tokens[:, start : start + size]
        part = np.pad(part, ((0, 0), (0, _bucket(part.shape[1], size) - part.shape[1])))
        counts = np.clip(count - start, 0, part.shape[1]).astype(np.int32)
        cache = with_room(cache, int(counts.max()))
        before = bounds(cache)
        step = _extend_donated if donate or start > 0 else _extend  # from the second chunk on, the cache is ours alone
        with mesh_of(runner.embed):
            logits, cache = step(runner, cache, part, counts, jnp.float32(threshold), last if last_only else None)
        last = logits if last_only else last
        parts.append(logits)
        cache = check_forced(cache, before, int(counts.max()))
        if watch is not None:
            jax.block_until_ready(logits)
            watch(min(start + size, int(count.max())))
    if last_only:
        return last, cache
    logits = jnp.concatenate(parts, axis=1) if len(parts) > 1 else parts[0]
    logits = jnp.pad(logits[:, :length], ((0, 0), (0, max(0, length - logits.shape[1])), (0, 0)))
    return (_shift_rows(logits, first) if first.any() else logits), cache


def decode_step(
    model: Decoder,
    cache: CompactCache,
    tokens: Int[Array, "B"],
    *,
    active: Bool[Array, "B"] | None = None,
    threshold: float | Float[Array, ""] = 0.0,
    donate: bool = False,
) -> tuple[Float[Array, "B V"], CompactCache]:
    """Append one token to every row that is `active` (all by default); the others stay as they are and get logits of 0.

    Returns logits [B V], fp32, and the new cache. Tokens that are not yet on the host are not checked: ids outside the
    vocabulary are then clipped. `threshold` and `donate` as in `prefill`. Raises ConfigError.
    """
    if np.shape(tokens) != (cache.batch_size,):
        raise ConfigError(
            f"decode_step wants one token for each of {cache.batch_size} rows, shape ({cache.batch_size},); got {np.shape(tokens)}"
        )
    if not isinstance(tokens, jax.Array):
        tokens = check_ids(np.asarray(tokens), model.config.vocab_size)
    if active is not None and np.shape(active) != (cache.batch_size,):
        raise ConfigError(f"active wants one flag for each of {cache.batch_size} rows; got shape {np.shape(active)}")
    count = np.ones(cache.batch_size, np.int32) if active is None else jnp.asarray(active).astype(jnp.int32)
    check_context(model.config, cache, np.ones(1, np.int32))
    cache = with_room(cache, 1)
    before = bounds(cache)
    step, runner = _extend_donated if donate else _extend, unrolled(model)
    with mesh_of(runner.embed):
        logits, cache = step(runner, cache, jnp.asarray(tokens)[:, None], count, jnp.float32(threshold), None)
    return logits[:, 0], check_forced(cache, before, 1)


def extend_rows(
    model: UnrolledDecoder,
    cache: CompactCache,
    tokens: Int[Array, "B T"],
    count: Int[Array, "B"],
    threshold: Float[Array, ""],
    last: Array | None,
) -> tuple[Array, CompactCache]:
    """The one step of the engine. Logits of all tokens, 0 where there is none, or, given the `last` logits [B V] so far, those
    after the chunk."""
    hidden, cache = model.extend(cache, tokens, count, threshold)
    if last is None:
        real = jnp.arange(tokens.shape[1]) < count[:, None]
        return jnp.where(real[..., None], model.logits(hidden), 0.0), cache
    final = jnp.take_along_axis(hidden, jnp.maximum(count - 1, 0)[:, None, None], axis=1)[:, 0]
    return jnp.where((count > 0)[:, None], model.logits(final), last), cache


_extend = jax.jit(extend_rows)
_extend_donated = jax.jit(extend_rows, donate_argnums=1)


def num_compilations() -> int:
    """Programs compiled so far by `prefill` and `decode_step`: constant once every size in use has been seen."""
    return _extend._cache_size() + _extend_donated._cache_size()  # pyrefly: ignore[missing-attribute]  # not in the stub of jit


@jax.jit
def _shift_rows(logits: Float[Array, "B T V"], first: Int[Array, "B"]) -> Float[Array, "B T V"]:
    """Row b, `first[b]` places to the right; what was padding at its end comes to its start."""
    source = (jnp.arange(logits.shape[1]) - first[:, None]) % logits.shape[1]
    return jnp.take_along_axis(logits, source[..., None], axis=1)


def _bucket(length: int, largest: int) -> int:
    """`length` rounded up to a power of two, so that few sizes are ever compiled."""
    return min(largest, max(SMALLEST_CHUNK, 1 << (length - 1).bit_length()))


def _rows(tokens, lengths, padding, mask, batch, vocab_size) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens [B T] moved to the left, where each row began, and how many are real."""
    tokens = np.asarray(tokens)
    if tokens.ndim != 2 or tokens.shape[0] != batch or tokens.shape[1] < 1:
        raise ConfigError(f"prefill wants tokens of shape [{batch} rows, at least 1]; got {list(tokens.shape)}")
    length = tokens.shape[1]
    if padding not in ("left", "right"):
        raise ConfigError(f"padding must be left or right, got {padding!r}")
    if mask is not None and lengths is not None:
        raise ConfigError("give either lengths or mask, not both")
    if mask is not None:
        mask = np.asarray(mask).astype(bool)
        if mask.shape != tokens.shape:
            raise ConfigError(
                f"mask has shape {list(mask.shape)}, tokens have {list(tokens.shape)}; they must be the same"
            )
        count, first = mask.sum(1), np.argmax(mask, axis=1)
        last = length - 1 - np.argmax(mask[:, ::-1], axis=1)
        if gaps := np.flatnonzero((count > 0) & (last - first + 1 != count)).tolist():
            raise ConfigError(
                f"the mask of row {gaps[0]} has gaps; real tokens must be next to each other: move them together, or call twice"
            )
    else:
        count = np.full(batch, length) if lengths is None else np.asarray(lengths)
        if count.shape != (batch,) or not np.issubdtype(count.dtype, np.integer):
            raise ConfigError(
                f"lengths wants one whole number for each of {batch} rows; got {np.asarray(lengths).tolist()!r}"
            )
        if (bad := np.flatnonzero((count < 0) | (count > length))).size:
            raise ConfigError(f"lengths must be 0 to {length}, the columns of tokens; row {bad[0]} has {count[bad[0]]}")
        first = length - count if padding == "left" else np.zeros(batch, int)
    column = (np.arange(length) + first[:, None]) % length
    real = np.arange(length) < count[:, None]
    moved = np.where(real, np.take_along_axis(tokens, column, axis=1), 0)
    return check_ids(moved, vocab_size), first.astype(np.int32), count.astype(np.int32)


def check_ids(tokens: np.ndarray, vocab_size: int) -> np.ndarray:
    """The same, int32; ConfigError when one is outside the vocabulary."""
    if not np.issubdtype(tokens.dtype, np.integer):
        raise ConfigError(f"tokens must be whole numbers, got dtype {tokens.dtype}")
    if tokens.size and (tokens.min() < 0 or tokens.max() >= vocab_size):
        bad = tokens[(tokens < 0) | (tokens >= vocab_size)].flat[0]
        raise ConfigError(
            f"token id {bad} is outside this model's vocabulary of {vocab_size} (0 to {vocab_size - 1}); another model's tokenizer?"
        )
    return tokens.astype(np.int32)
