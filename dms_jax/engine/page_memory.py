"""How many pages a paged cache gets, and what happens when they run out.

The host knows how many tokens each row may still append until pages can run out: a head needs at most one page for each
`page_size` tokens. It reads the device only when this number is used up, so decoding never waits after each token.
Errors are `ConfigError`.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from dms_jax.config import ModelConfig, Overflow
from dms_jax.config_reader import MAX_INT
from dms_jax.core.cache_base import HostBounds, TokenHistory
from dms_jax.core.page_arena import empty_arena
from dms_jax.core.page_counts import (
    MARGIN,
    SMALL_ARENA,
    PageShape,
    expected_fraction,
    expected_pages,
    length_class,
    pages_of,
    size_class,
    table_columns,
)
from dms_jax.core.paged_cache import HeadPages, PagedCache, pages_needed, pages_on_devices, resized
from dms_jax.errors import ConfigError, shown
from dms_jax.models.decoder import Decoder
from dms_jax.platform_defaults import platform_defaults
from dms_jax.policies import CachePolicy, policy_name, policy_of
from dms_jax.sharding import devices_of, mesh_of, named_sharding

LOOK_AHEAD = 16  # tokens that surely fit after the arena has changed its size, so that it does not do so at each step
PRIOR_TOKENS = 64  # tokens after which what a head has kept counts as much as what it was expected to keep
LARGEST_FIT = 15 / 16  # an arena that would become smaller by less than this keeps its size


def init_pages(
    model: Decoder,
    batch_size: int,
    max_length: int,
    memory: int | None = None,
    *,
    num_pages: int | None = None,
    policy: CachePolicy | str | None = None,
    overflow: Overflow | None = None,
    dtype: jnp.dtype | None = None,
    page_size: int | None = None,
) -> PagedCache:
    """Make an empty cache in pages, whose memory follows the live pairs of each head.

    Args:
      max_length: tokens of each row that the tables of pages have room for.
      memory: bytes of keys and values on each device. None allocates for the live fraction that the policy expects: all
        pairs if it evicts nothing, exactly the budgets under "dms_budget:N", and otherwise the window and 1 / target_cr
        of the other pairs of `max_length` tokens, where target_cr is that of training, with a margin of 10%.
      num_pages: the same in pages, instead of `memory`.
      policy: the model's own, "dense", "dms_budget:N", or another one that marks pairs as the model's own does. A
        policy that ranks pairs, such as "tova:256", needs the slots of `init_cache`.
      overflow: what happens when no page is free. "grow" copies all pages to a larger arena and compiles again; it is
        the default without `memory` and `num_pages`. "raise" raises ConfigError and is the default with one of them.
      dtype: the dtype of keys and values; by default the dtype of the model's weights.
      page_size: pairs of a page; by default 32 on a CPU, 64 on a GPU, 128 on a TPU.
    """
    config, policy = model.config, policy_of(model.config, policy)
    if not policy.in_pages:
        raise ConfigError(
            f"policy {policy_name(policy)} chooses among the pairs of a cache, which needs slots; use init_cache"
        )
    if memory is not None and num_pages is not None:
        raise ConfigError("memory and num_pages exclude each other; give either memory or num_pages")
    page_size = platform_defaults().page_size if page_size is None else page_size
    sizes = {"batch_size": batch_size, "max_length": max_length, "page_size": page_size}
    sizes |= {name: x for name, x in (("memory", memory), ("num_pages", num_pages)) if x is not None}
    for name, value in sizes.items():
        limit = 2**62 if name == "memory" else MAX_INT
        if not isinstance(value, int | np.integer) or isinstance(value, bool) or not 1 <= value <= limit:
            raise ConfigError(f"{name} must be a whole number from 1 to {limit}, got {shown(value)}")
    overflow = overflow or ("grow" if memory is None and num_pages is None else "raise")
    if overflow not in ("grow", "raise"):
        raise ConfigError(f"overflow of a cache in pages must be grow or raise, got {overflow!r}; use init_cache")
    dtype = jnp.dtype(dtype or model.embed.get_value().dtype)
    page_bytes = PageShape(int(page_size), config.head_dim, dtype.itemsize).page_bytes
    if memory is not None:
        num_pages = int(memory) // page_bytes
        if num_pages < 2:
            raise ConfigError(f"memory must be at least {2 * page_bytes} bytes, which are two pages, got {memory}")
    if num_pages is not None and num_pages < 2:
        raise ConfigError(f"num_pages must be at least 2, got {num_pages}")
    lengths = np.full(batch_size, max_length)
    return new_pages(model, lengths, int(max_length), num_pages, policy, overflow, dtype, page_size)


def pages_for(
    model: Decoder,
    prompts: Int[np.ndarray, "B"],
    new_tokens: int,
    max_length: int,
    chunk: int,
    policy: CachePolicy,
    overflow: Overflow | None,
) -> PagedCache:
    """Make an empty cache for `generate`: for rows of `prompts` tokens, read in chunks, and `new_tokens` more each."""
    page_size, dtype = platform_defaults().page_size, model.embed.get_value().dtype
    prompts, lengths = (np.array([length_class(int(n)) for n in tokens]) for tokens in (prompts, prompts + new_tokens))
    # The last chunk of each prompt needs room for all of its pairs.
    slack = np.ceil(np.minimum(prompts, chunk) * (1 - _prior(model.config, policy))).astype(int)
    longest = max(length_class(max_length), int(lengths.max()))
    return new_pages(
        model, lengths, longest, None, policy, overflow or "grow", dtype, page_size, np.maximum(slack, LOOK_AHEAD)
    )


def new_pages(
    model: Decoder,
    lengths: Int[np.ndarray, "B"],
    max_length: int,
    num_pages: int | None,
    policy: CachePolicy,
    overflow: Overflow,
    dtype: jnp.dtype,
    page_size: int,
    slack: Int[np.ndarray, "B"] | int = 0,
) -> PagedCache:
    """Do the work of `init_pages` for rows of `lengths` tokens, after the checks.

    `slack` is the number of pairs of each head that need room in addition to those that are expected.
    """
    config, mesh, rows = model.config, devices_of(model.embed.get_value()), len(lengths)
    budgets, ring = policy.budget_table(config.num_layers, config.num_kv_heads), policy.ring_size or page_size
    shape = PageShape(page_size, config.head_dim, dtype.itemsize, budgets is not None)
    if num_pages is None:
        kept = _prior(config, policy), config.num_layers, config.num_kv_heads
        expected = expected_pages(lengths, ring, page_size, *kept, budgets, slack)
        num_pages = size_class(1 + int(pages_on_devices(expected, mesh).max()), shape.page_bytes)
    arenas = 1 if mesh is None else mesh.size
    make = partial(empty_arena, arenas, int(num_pages), page_size, config.head_dim, dtype, budgets is not None)
    heads = (config.num_layers, rows, config.num_kv_heads)
    state = HeadPages(
        table=jnp.zeros((*heads, table_columns(max_length, ring, page_size, budgets)), jnp.int32),
        survivors=jnp.zeros(heads, jnp.int32),
        marked=jnp.zeros((*heads, ring), bool),
        starved=jnp.zeros(heads, bool),
        budget=None if budgets is None else jnp.asarray(np.repeat(budgets[:, None], rows, axis=1)),
    )
    if mesh is None:
        arena = make()
    else:
        place = lambda x: named_sharding(("arenas", *(None,) * (x.ndim - 1)), x.shape, mesh)
        arena = jax.jit(make, out_shardings=jax.tree.map(place, jax.eval_shape(make)))()
    cache = PagedCache(arena, state, jnp.zeros(rows, jnp.int32), policy.in_cache(), overflow)
    return cache.with_bounds(cache.read_bounds()).with_history(TokenHistory.empty(rows))


def _prior(config: ModelConfig, policy: CachePolicy) -> float:
    """Return the fraction of pairs behind the ring that heads probably keep, before any was seen, with the margin."""
    return expected_fraction(config.require_dms().target_cr) if policy.is_learned else 1.0


def _probable_pages(config: ModelConfig, cache: PagedCache, count: int, ahead: int) -> int:
    """Return the pages of an arena in which `ahead` more tokens of each row probably fit, and `count` tokens surely.

    Each head keeps the fraction of pairs that it has kept so far. As long as few pairs have left its ring, `_prior`
    counts more.
    """
    prior = _prior(config, cache.policy)
    if prior == 1 or cache.heads.budget is not None:  # exactly known
        fraction = 1.0
    else:
        survivors = np.asarray(cache.heads.survivors, np.float64)
        left = np.maximum(np.asarray(cache.seen, np.float64) - cache.heads.ring, 0)[None, :, None]
        fraction = np.minimum(1, (MARGIN * survivors + PRIOR_TOKENS * prior) / (left + PRIOR_TOKENS))
    more = pages_needed(cache, max(count, ahead), fraction, count)
    in_use = cache.arena.num_pages - np.asarray(cache.arena.free_count)
    return size_class(int((in_use + more).max()), cache.page_bytes)


def room_for(
    config: ModelConfig, cache: PagedCache, count: int, ahead: int | None = None, donate: bool = False
) -> PagedCache:
    """Return the cache, with larger arenas if its overflow is "grow" and `count` more tokens might not fit.

    The larger arenas are made for `ahead` tokens of each row, as far as that can be known. None is an eighth of the
    tokens so far, if the tables of pages have room for them. `donate` gives up the memory of the smaller arenas.
    """
    if cache.bounds is not None and cache.bounds.tokens >= count:
        return cache
    known, history = cache.read_bounds(), cache.history
    if known.tokens < count and cache.overflow == "grow":
        surely = max(count, LOOK_AHEAD)
        ahead = min(known.seen // 8, cache.max_length - known.seen) if ahead is None else ahead
        width = cache.heads.table.shape[-1]
        columns = cache.heads.ring_pages(cache.page_size) + pages_of(known.seen + max(surely, ahead), cache.page_size)
        is_wide = columns <= width or cache.heads.budget is not None
        columns = width if is_wide else max(columns, width + width // 2)
        pages = max(cache.arena.num_pages, _probable_pages(config, cache, surely, ahead))
        with mesh_of(cache.arena.k):
            cache = resized(cache, pages, columns, donate)
        known = cache.read_bounds()
    return cache.with_history(history).with_bounds(known)


def fitted(config: ModelConfig, cache: PagedCache, ahead: int, donate: bool = False) -> PagedCache:
    """Return the cache with smaller arenas, if its overflow is "grow" and `ahead` more tokens need clearly less.

    The caller has read a first prompt, which shows what fraction of their pairs the heads keep.
    """
    if cache.overflow != "grow":
        return cache
    history, seen = cache.history, int(np.asarray(cache.seen).max())
    if cache.arena.num_pages * cache.page_bytes < SMALL_ARENA:
        ahead = length_class(seen + ahead) - seen
    pages = _probable_pages(config, cache, min(ahead, LOOK_AHEAD), ahead)
    if pages > cache.arena.num_pages * LARGEST_FIT:
        return cache
    with mesh_of(cache.arena.k):
        cache = resized(cache, pages, cache.heads.table.shape[-1], donate)
    return cache.with_history(history).with_bounds(cache.read_bounds())


def check_starved(cache: PagedCache, before: HostBounds, count: int) -> PagedCache:
    """Return the cache after `count` tokens with new bounds, given the bounds from `before` these tokens.

    If no page was free for a pair, raise ConfigError.
    """
    if before.tokens >= count:
        return cache.with_bounds(before._replace(seen=before.seen + count, tokens=before.tokens - count))
    starved = np.asarray(cache.heads.starved)
    if not starved.any():
        return cache.with_bounds(cache.read_bounds())
    layer, row, head = (int(i) for i in np.argwhere(starved)[0])
    if (seen := int(np.asarray(cache.seen)[row])) > cache.max_length:
        raise ConfigError(
            f"rows of this cache must have at most {cache.max_length} tokens, got {seen} in row {row}; "
            f"use max_length >= {seen}, or overflow='grow'"
        )
    pages = cache.arena.num_pages
    raise ConfigError(
        f"the {pages} pages of this cache must hold the live pairs of all rows, but layer {layer}, row {row}, KV head "
        f"{head} found no free page; use num_pages >= {pages + pages // 4}, fewer rows, or overflow='grow'"
    )
