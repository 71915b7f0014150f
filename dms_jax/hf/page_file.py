"""The pages of a `PagedCache` as tensors of a file, and back.

A file holds the pages in use once, however many rows share them, without regard to devices: entry e of `table` is page
e - 1 of `pages.k` and `pages.v`, and 0 is no page. Errors are `ConfigError`.
"""

from collections.abc import Mapping
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Int

from dms_jax.axes import Array
from dms_jax.config import ModelConfig
from dms_jax.core.page_arena import Arena
from dms_jax.core.paged_cache import HeadPages, PagedCache, heads_on_devices, holds_pair, pages_in_use, pages_of
from dms_jax.errors import ConfigError
from dms_jax.hf.cache_state import FLOATS
from dms_jax.policies import CachePolicy
from dms_jax.sharding import named_sharding

PAIRS, BUDGETED = ("k", "v"), ("score", "position")
HEADS = ("table", "survivors", "marked")


def page_fields(policy: CachePolicy, config: ModelConfig) -> tuple[str, ...]:
    """Return the names of the tensors."""
    budgeted = policy.budget_table(config.num_layers, config.num_kv_heads) is not None
    return (*HEADS, *(f"pages.{name}" for name in PAIRS + BUDGETED * budgeted), *("budget",) * budgeted)


def page_tensors(cache: PagedCache) -> dict[str, np.ndarray]:
    """Return what a file holds of a cache, apart from the tokens seen."""
    if np.asarray(cache.starved).any():
        raise ConfigError("a cache that has run out of pages must not be saved, because pairs are missing from it")
    heads, arena, own = cache.heads, cache.arena, np.asarray(cache.heads.table)
    table, pages, done = np.zeros_like(own), [], set()
    for index, (rows, kv_heads) in enumerate(heads_on_devices(own.shape[1:3], cache.mesh)):
        if (key := (str(rows), str(kv_heads))) in done:
            continue  # another device holds the same heads
        done.add(key)
        part = own[:, rows, kv_heads]
        used = np.unique(part[part > 0])
        table[:, rows, kv_heads] = np.where(part > 0, 1 + sum(map(len, pages)) + np.searchsorted(used, part), 0)
        pages.append([(index, page) for page in used])
    places = np.array([place for part in pages for place in part], np.int32).reshape(-1, 2)
    names = PAIRS if arena.score is None else PAIRS + BUDGETED
    tensors = {f"pages.{name}": np.asarray(getattr(arena, name)[places[:, 0], places[:, 1]]) for name in names}
    tensors |= {"table": table, "survivors": np.asarray(heads.survivors)}
    tensors["marked"] = np.asarray(heads.marked).astype(np.uint8)
    return tensors | ({} if heads.budget is None else {"budget": np.asarray(heads.budget)})


def cache_of(
    tensors: Mapping[str, np.ndarray],
    seen: np.ndarray,
    policy: CachePolicy,
    overflow: Any,
    pages: int,
    mesh: Mesh | None,
) -> PagedCache:
    """Make the cache of a file on the devices of `mesh`, with arenas of at least `pages` pages."""
    table, parts = np.zeros_like(tensors["table"]), []
    for rows, kv_heads in heads_on_devices(table.shape[1:3], mesh):
        part = tensors["table"][:, rows, kv_heads]
        used = np.unique(part[part > 0])
        table[:, rows, kv_heads] = np.where(part > 0, 1 + np.searchsorted(used, part), 0)
        parts.append((used, np.bincount(table[:, rows, kv_heads].ravel(), minlength=len(used) + 1)))
    num_pages = max(pages, *(len(used) + 2 for used, _ in parts))

    def placed(x: np.ndarray, *axes: str | None) -> Array:
        return jnp.asarray(x) if mesh is None else jax.device_put(x, named_sharding(axes, x.shape, mesh))

    def stored(name: str) -> Array | None:
        if f"pages.{name}" not in tensors:
            return None
        content = tensors[f"pages.{name}"]
        whole = np.zeros((len(parts), num_pages, *content.shape[1:]), content.dtype)
        for arena, (used, _) in zip(whole, parts, strict=True):
            arena[1 : len(used) + 1] = content[used - 1]
        return placed(whole, "arenas", *(None,) * (whole.ndim - 1))

    references, free = np.zeros((len(parts), num_pages), np.int32), np.zeros((len(parts), num_pages), np.int32)
    for index, (used, counts) in enumerate(parts):
        references[index, 1 : len(used) + 1] = counts[1:]
        free[index, : num_pages - 1 - len(used)] = np.arange(len(used) + 1, num_pages)
    count = np.array([num_pages - 1 - len(used) for used, _ in parts], np.int32)
    arena = Arena(
        cast(Array, stored("k")),
        cast(Array, stored("v")),
        placed(references, "arenas", None),
        placed(free, "arenas", None),
        placed(count, "arenas"),
        stored("score"),
        stored("position"),
    )
    survivors = tensors["survivors"]
    heads = HeadPages(
        jnp.asarray(table),
        jnp.asarray(survivors),
        jnp.asarray(tensors["marked"].astype(bool)),
        jnp.zeros(survivors.shape, bool),
        jnp.asarray(tensors["budget"]) if "budget" in tensors else None,
    )
    return PagedCache(arena, heads, jnp.asarray(seen), policy, overflow)


def check_pages(tensors: Mapping[str, np.ndarray], seen: np.ndarray, policy: CachePolicy, config: ModelConfig) -> None:
    """Refuse tensors that no cache can hold, or that contradict each other."""
    table, survivors, marked, k = (tensors[name] for name in (*HEADS, "pages.k"))
    heads = (config.num_layers, len(seen), config.num_kv_heads)
    ring, size = marked.shape[-1], k.shape[1] if k.ndim == 3 else 0
    pages = (len(k), size)
    shapes = {
        "table": (*heads, table.shape[-1]),
        "survivors": heads,
        "marked": (*heads, policy.ring_size or size),
        "budget": heads,
        "pages.score": pages,
        "pages.position": pages,
    }
    dtypes = {"marked": np.uint8, "pages.k": tensors["pages.v"].dtype, "pages.v": k.dtype, "pages.score": np.float32}
    for name, tensor in tensors.items():
        shape = shapes.get(name, (*pages, config.head_dim))
        if tensor.shape != shape or tensor.dtype != dtypes.get(name, np.int32) or 0 in (size, ring):
            raise ConfigError(f"{name} has shape {list(tensor.shape)} and dtype {tensor.dtype}")
    if k.dtype not in FLOATS:
        raise ConfigError(f"pages.k has dtype {k.dtype}")
    left = np.maximum(seen - ring, 0)[None, :, None]
    if "budget" in tensors:
        budget = tensors["budget"]
        _refuse("budget must be at least window_size + 1", budget < ring)
        _refuse("survivors must fill the budget", survivors != np.minimum(left, budget - ring))
    _refuse("survivors must be pairs that have left the ring", (survivors < 0) | (survivors > left))
    _refuse("table must have room for all pairs", pages_of(ring, size) + pages_of(survivors, size) > table.shape[-1])
    _refuse("marked must be 0 or 1", np.asarray((marked > 1).any(axis=-1)))
    _check_table(table, survivors, seen, ring, size, len(k), "budget" in tensors)
    live = _live(table, survivors, seen, ring, size, len(k))
    for name in ("pages.k", "pages.v", "pages.score"):  # a place that is not live may hold anything
        if name in tensors and not _finite(tensors[name])[live].all():
            raise ConfigError(f"{name} must be finite")
    if "pages.position" in tensors:
        position = tensors["pages.position"][live]
        if (position < 0).any() or (position >= max(seen, default=0)).any():
            raise ConfigError("pages.position must be in [0, seen)")


def _check_table(
    table: Int[np.ndarray, "L B K P"], survivors, seen, ring: int, size: int, pages: int, private: bool
) -> None:
    """Refuse numbers of pages that do not exist, are missing or superfluous, or are shared although they may change."""
    in_ring, behind = map(np.asarray, pages_in_use(survivors, seen, ring, size))
    column, ring_pages = np.arange(table.shape[-1]), pages_of(ring, size)
    used = (column < in_ring[..., None]) | ((column >= ring_pages) & (column < ring_pages + behind[..., None]))
    _refuse(f"table must name pages 1 to {pages}, and no others", ((table > 0) != used) | (table < 0) | (table > pages))
    full = (column >= ring_pages) & (column < ring_pages + survivors[..., None] // size) & (not private)
    references = np.bincount(table[used], minlength=pages + 1)
    _refuse("pages that may change must not be shared", used & ~full & (references[table] > 1))
    if (references[1:] == 0).any():
        raise ConfigError(f"page {1 + int(np.argmin(references[1:]))} must be in the table")


def _live(table, survivors, seen, ring: int, size: int, pages: int) -> np.ndarray:
    """Return which places of pages [n S] hold a live pair."""
    live, ring_slots = np.zeros((pages + 1, size), bool), pages_of(ring, size) * size
    slot = np.arange(table.shape[-1] * size)
    filled = holds_pair(slot, np.minimum(seen, ring)[None, :, None, None], ring_slots, survivors[..., None])
    np.logical_or.at(live, table.ravel(), filled.reshape(-1, size))
    return live[1:]


def _finite(tensor: np.ndarray) -> np.ndarray:
    """Return which places of pages [n S] hold finite numbers only."""
    return np.asarray(np.isfinite(tensor).all(axis=tuple(range(2, tensor.ndim))))


def _refuse(rule: str, where: np.ndarray) -> None:
    if where.any():
        layer, row, head = np.argwhere(where)[0][:3]
        raise ConfigError(f"layer {layer}, row {row}, KV head {head}: {rule}")
