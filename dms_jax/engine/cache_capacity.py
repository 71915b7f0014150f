"""What the host knows about a cache, and what it does when a head wants more than it has.

The host keeps upper bounds (each token adds at most one pair per head) and reads the device only when a bound reaches the
capacity, so no policy waits for the device at each token.
"""

from dataclasses import replace

import numpy as np

from dms_jax.config import ModelConfig
from dms_jax.core.compact_cache import CompactCache, HostBounds, grown
from dms_jax.errors import ConfigError
from dms_jax.sharding import target_device

SIZE_STEP = {"tpu": 128}  # by platform: capacities offered and grown to are multiples of it, which the kernels want
DEFAULT_SIZE_STEP = 64


def round_up(number: int) -> int:
    step = SIZE_STEP.get(target_device()[0], DEFAULT_SIZE_STEP)
    return -(-number // step) * step


def bounds(cache: CompactCache, exact: bool = False) -> HostBounds:
    """Upper bounds of tokens seen and of live pairs per layer; `exact` reads the device."""
    if cache.bounds is not None and not exact:
        return cache.bounds
    return HostBounds(int(np.max(cache.seen)), tuple(np.asarray(cache.live_counts).max(axis=(1, 2)).tolist()))


def advanced(cache: CompactCache, before: HostBounds, count: int) -> CompactCache:
    """The cache with what is known of it after `count` more tokens."""
    most = cache.policy.slot_bounds().max
    live = tuple(
        min(capacity, n + count, most or capacity) for capacity, n in zip(cache.capacities, before.live, strict=True)
    )
    return replace(cache, bounds=HostBounds(before.seen + count, live))


def context_limit(config: ModelConfig) -> tuple[int, str]:
    """The most tokens a row may hold, and what says so."""
    limits = [(config.max_position_embeddings, "max_position_embeddings")]
    if config.sliding_window is not None:
        limits.append((config.sliding_window, "own sliding_window"))
    return min(limits)


def check_context(config: ModelConfig, cache: CompactCache, count: np.ndarray) -> None:
    """Refuse rows that would grow beyond what the model can tell apart."""
    limit, name = context_limit(config)
    if bounds(cache).seen + count.max() <= limit:
        return
    total = np.asarray(cache.seen) + count
    if total.max() > limit:
        raise ConfigError(
            f"row {total.argmax()} would have {total.max()} tokens, beyond this model's {name} of {limit}; shorten it by {total.max() - limit}"
        )


def check_room(cache: CompactCache, count: int) -> None:
    """Refuse a capacity that cannot work: the newest pairs, which no policy gives up, must fit."""
    limits = cache.policy.slot_bounds()
    needed = min(count, limits.min)
    for layer, capacity in enumerate(cache.capacities):
        if capacity < needed and cache.overflow != "grow":
            raise ConfigError(
                f"capacity {capacity} of layer {layer} cannot hold {needed} tokens of {limits.reason}; use capacity >= {round_up(needed)}"
            )


def with_room(cache: CompactCache, count: int) -> CompactCache:
    """Under "grow": the cache in larger buffers where `count` more tokens might not fit."""
    if cache.overflow != "grow" or not _may_overflow(cache, bounds(cache), count):
        return cache
    exact = bounds(cache, exact=True)
    most = cache.policy.slot_bounds().max
    layers = []
    for layer, n in zip(cache.layers, exact.live, strict=True):
        needed = min(n + count, most or n + count)
        layers.append(layer if needed <= layer.capacity else grown(layer, next_size(layer.capacity, needed)))
    return replace(cache, layers=tuple(layers), bounds=exact)


def next_size(capacity: int, needed: int) -> int:
    """The next size bucket: half as much again at least, so that growing to n compiles about log(n) programs."""
    return round_up(max(needed, capacity + capacity // 2))


def check_forced(cache: CompactCache, before: HostBounds, count: int) -> CompactCache:
    """After `count` tokens: the cache with what is known of it; under "raise", an error if a pair was pushed out."""
    if cache.overflow != "raise" or not _may_overflow(cache, before, count):
        return advanced(cache, before, count)
    forced = np.asarray(cache.forced_evictions)
    if not forced.any():
        return replace(cache, bounds=bounds(cache, exact=True))
    layer, row, head = (int(i) for i in np.unravel_index(forced.argmax(), forced.shape))
    capacity, more = cache.capacities[layer], int(forced.max())
    raise ConfigError(
        f"cache overflow at layer {layer}, row {row}, KV head {head}: {capacity + more} live pairs wanted, capacity {capacity}. "
        f"Use capacity >= {round_up(capacity + more)}, or overflow='evict' or 'grow'"
    )


def _may_overflow(cache: CompactCache, known: HostBounds, count: int) -> bool:
    most = cache.policy.slot_bounds().max
    return any(
        min(n + count, most or n + count) > capacity for n, capacity in zip(known.live, cache.capacities, strict=True)
    )
