"""How many slots a cache gets, and what happens when a head needs more of them.

The host keeps upper bounds of the pairs in a cache, because each token adds at most one pair per head. It reads the
device only when such a bound reaches the capacity, so decoding never waits for the device after each token.
Errors are `ConfigError`.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax.numpy as jnp
import numpy as np

from dms_jax.config import ModelConfig, Overflow
from dms_jax.core.cache_base import Cache, HostBounds
from dms_jax.core.compact_cache import CompactCache, grown
from dms_jax.core.page_counts import round_to_few
from dms_jax.core.paged_cache import PagedCache
from dms_jax.engine.generation_config import GenerationConfig
from dms_jax.engine.page_memory import check_starved, room_for
from dms_jax.errors import ConfigError
from dms_jax.kernels.dispatch import KernelQuery, is_available, select_implementation
from dms_jax.kernels.kernel_table import AUTO, XLA
from dms_jax.platform_defaults import platform_defaults
from dms_jax.policies import CachePolicy, policy_name
from dms_jax.policies.cache_policy import UNBOUNDED


def round_up(number: int) -> int:
    """Round a number of slots up to the multiple that this platform's kernels require."""
    multiple = platform_defaults().capacity_multiple
    return -(-number // multiple) * multiple


def size_class(number: int) -> int:
    """Round a number of slots up to one of few sizes, so that prompts of other lengths need no other programs.

    Sizes are the multiples of 128 up to 1024, and four for each further power of two, at most a quarter too large.
    """
    return round_up(round_to_few(number, 4, 128))


def layer_capacities(largest: Sequence[int]) -> tuple[int, ...]:
    """Return the smallest capacity of each layer whose fullest head holds at most so many pairs."""
    return tuple(round_up(pairs) for pairs in largest)


def default_overflow(policy: CachePolicy) -> Overflow:
    """Choose "evict" for a learned policy, and "raise" for one that evicts nothing or has a budget."""
    slots = policy.slot_bounds()
    return "evict" if slots.max is None and slots.min < UNBOUNDED else "raise"


def uses_pages(model: ModelConfig, dtype: jnp.dtype, config: GenerationConfig, policy: CachePolicy) -> bool:
    """Return whether `generate` makes a cache in pages for keys and values of `dtype`.

    It does so by default if the policy is one that pages can hold, and either this is a CPU or the implementation that
    runs here, or that the model names, has a kernel that reads pages; unless something is asked for that only slots
    have: a capacity or forced eviction.
    """
    defaults, implementation = platform_defaults(), model.implementation
    query = KernelQuery(model.head_dim, dtype, page_size=defaults.page_size)
    if config.cache is None:
        if config.capacity is not None or config.overflow == "evict" or not policy.in_pages:
            return False
        reads_well = defaults.pages and implementation in (AUTO, XLA)
        return reads_well or is_available("page_attention", query, implementation)
    if config.cache == "slots":
        return False
    if not policy.in_pages:
        raise ConfigError(f"policy {policy_name(policy)} chooses among the pairs of a cache; use slots, not pages")
    if config.capacity is not None or config.overflow == "evict":
        raise ConfigError("capacity and overflow 'evict' need slots, not pages; leave them out, or use cache 'slots'")
    select_implementation("page_attention", query, implementation)
    return True


def plan_capacity(
    capacity: int | tuple[int, ...] | None,
    prompt_lengths: Sequence[int] | np.ndarray,
    new_tokens: int,
    policy: CachePolicy,
    overflow: Overflow | None = None,
    more_to_come: bool = False,
) -> tuple[int | tuple[int, ...], Overflow]:
    """Decide the slots per row and KV head of a new cache, and what happens when a head needs more.

    Args:
      capacity: the caller's choice, which is returned unchanged. None chooses enough for the longest prompt and its new
        tokens, or less if the policy bounds the pairs or the cache may grow.
      overflow: the caller's choice. None means `default_overflow`.
      more_to_come: turns of unknown length will follow. By default, the cache then holds all tokens of the first turn
        and may grow later.
    """
    overflow = overflow or ("grow" if more_to_come and capacity is None else default_overflow(policy))
    if capacity is not None:
        return capacity, overflow
    slots, bounds = size_class(int(max(prompt_lengths)) + new_tokens), policy.slot_bounds()
    if bounds.max is not None or (overflow == "grow" and not more_to_come):
        if bounds.max_of_layer is not None:
            return tuple(min(slots, enough) for enough in layer_capacities(bounds.max_of_layer)), overflow
        slots = min(slots, round_up(bounds.max or 2 * bounds.min))
    return slots, overflow


def host_bounds(cache: Cache) -> HostBounds:
    """Return upper bounds of the tokens seen and of the live pairs per layer, from the device if they are unknown."""
    return cache.read_bounds() if cache.bounds is None else cache.bounds


def _max_slots(cache: CompactCache, known: HostBounds) -> tuple[int | None, ...]:
    """Return how many pairs a head of each layer can ever hold; None if that depends on the tokens."""
    return known.budgets or (cache.policy.slot_bounds().max,) * len(cache.layers)


def check_context(config: ModelConfig, cache: Cache, count: np.ndarray) -> None:
    """Refuse `count` [B] more tokens if they would take a row beyond the model's context."""
    limit, name = config.context_limit()
    if host_bounds(cache).seen + count.max() <= limit:
        return
    total = np.asarray(cache.seen) + count
    if total.max() > limit:
        raise ConfigError(
            f"row {total.argmax()} must have at most {limit} tokens, this model's {name}, got {total.max()}; "
            f"shorten it by {total.max() - limit}"
        )


def check_slots(cache: Cache, count: np.ndarray, prompts: np.ndarray, chunk_size: int | None) -> None:
    """Refuse slots that cannot hold the newest pairs of `count` [B] more tokens, which no policy evicts, and `prompts`
    [B], the first of these tokens, that the policy cannot read. Pages hold any number."""
    if not isinstance(cache, CompactCache):
        return
    slots = cache.policy.slot_bounds()
    needed = min(int(count.max()), slots.min)
    for layer, capacity in enumerate(cache.capacities):
        if capacity < needed and cache.overflow != "grow":
            raise ConfigError(
                f"capacity {capacity} of layer {layer} cannot hold {needed} tokens of {slots.reason}; "
                f"use capacity >= {round_up(needed)}"
            )
    cache.policy.check_prompt(cache.layers[0], cache.seen, prompts, chunk_size)


def grow_for(config: ModelConfig, cache: Cache, count: int, ahead: int | None = None, donate: bool = False) -> Any:
    """Return the cache, with larger buffers if its overflow is "grow" and `count` more tokens might not fit.

    `ahead` and `donate` are as in `page_memory.room_for`; slots have no use for them.
    """
    if isinstance(cache, PagedCache):
        return room_for(config, cache, count, ahead, donate)
    assert isinstance(cache, CompactCache)
    if cache.overflow != "grow" or not _may_overflow(cache, host_bounds(cache), count):
        return cache
    exact, layers = cache.read_bounds(), []
    for layer, live, max_slots in zip(cache.layers, exact.live, _max_slots(cache, exact), strict=True):
        needed = min(live + count, max_slots or live + count)
        layers.append(layer if needed <= layer.capacity else grown(layer, _next_capacity(layer.capacity, needed)))
    return replace(cache, layers=tuple(layers)).with_bounds(exact)


def _next_capacity(capacity: int, needed: int) -> int:
    """Grow by at least half, so that growing to n slots compiles about log(n) programs."""
    return round_up(max(needed, capacity + capacity // 2))


def check_overflow(cache: Cache, before: HostBounds, count: int) -> Any:
    """Return the cache after `count` tokens with new bounds, given the bounds from `before` these tokens.

    If the overflow is "raise" and a pair was pushed out or found no page, raise ConfigError.
    """
    if isinstance(cache, PagedCache):
        return check_starved(cache, before, count)
    assert isinstance(cache, CompactCache)
    if cache.overflow != "raise" or not _may_overflow(cache, before, count):
        return _advance(cache, before, count)
    forced = np.asarray(cache.forced_evictions)
    if not forced.any():
        return cache.with_bounds(cache.read_bounds())
    layer, row, head = (int(i) for i in np.unravel_index(forced.argmax(), forced.shape))
    capacity, more = cache.capacities[layer], int(forced.max())
    raise ConfigError(
        f"cache overflow at layer {layer}, row {row}, KV head {head}: capacity {capacity} "
        f"must be at least {capacity + more}; use capacity >= {round_up(capacity + more)}, or overflow='evict' "
        "or 'grow'"
    )


def _advance(cache: CompactCache, before: HostBounds, count: int) -> CompactCache:
    live = tuple(
        min(capacity, n + count, max_slots or capacity)
        for capacity, n, max_slots in zip(cache.capacities, before.live, _max_slots(cache, before), strict=True)
    )
    return cache.with_bounds(before._replace(seen=before.seen + count, live=live))


def _may_overflow(cache: CompactCache, known: HostBounds, count: int) -> bool:
    return any(
        min(n + count, max_slots or n + count) > capacity
        for n, capacity, max_slots in zip(known.live, cache.capacities, _max_slots(cache, known), strict=True)
    )
