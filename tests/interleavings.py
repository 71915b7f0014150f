"""Random interleavings of prefill, decoding and what may happen to a cache between them, against known logits."""

import dataclasses
import functools
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
from cases import TINY
from hypothesis import strategies as st

import dms_jax
from dms_jax.config import DMSConfig
from dms_jax.core.cache_base import Cache
from dms_jax.core.compact_cache import CompactCache
from dms_jax.core.paged_cache import PagedCache, select_rows
from dms_jax.models.decoder import Decoder

ROWS, LENGTH = 3, 40


def policy(window, shift=1, granularity="head", variant="projection", **fields):
    return DMSConfig(
        window_size=window,
        decision_shift=shift,
        granularity=granularity,
        variant=variant,
        evict_logit_bias=0.0,
        **fields,
    )


def heads(kv, group, size):
    return {"num_kv_heads": kv, "num_q_heads": kv * group, "head_dim": size}


def poisoned(cache: CompactCache) -> CompactCache:
    """Write NaN into the keys and values of every slot that is not live."""
    layers = []
    for layer in cache.layers:
        dead = (layer.expiry < cache.seen[:, None, None] - 1)[..., None]
        layers.append(
            dataclasses.replace(layer, k=jnp.where(dead, jnp.nan, layer.k), v=jnp.where(dead, jnp.nan, layer.v))
        )
    return dataclasses.replace(cache, layers=tuple(layers))


def poisoned_pages(cache: PagedCache) -> PagedCache:
    """Write NaN into every place of the arena that holds no live pair."""
    arena, heads, size = cache.arena, cache.heads, cache.page_size
    slot, ring_slots = jnp.arange(heads.table.shape[-1] * size)[None, None, None], heads.ring_pages(size) * size
    live = slot < jnp.minimum(cache.seen, heads.ring)[None, :, None, None]
    live = live | ((slot >= ring_slots) & (slot < ring_slots + heads.survivors[..., None]))
    live = jnp.zeros(arena.k.shape[1:3], bool).at[heads.table.ravel()].max(live.reshape(-1, size))[None, ..., None]
    nan = lambda x: jnp.where(live, x, jnp.nan)
    return dataclasses.replace(cache, arena=dataclasses.replace(arena, k=nan(arena.k), v=nan(arena.v)))


poisoned_jit = jax.jit(lambda cache: poisoned_pages(cache) if isinstance(cache, PagedCache) else poisoned(cache))
_reordered = jax.jit(lambda cache, order: jax.tree.map(lambda x: x[order], cache))


def reordered(cache, order):
    """Return a cache whose row i is row `order[i]`."""
    return select_rows(cache, jnp.asarray(order)) if isinstance(cache, PagedCache) else _reordered(cache, order)


def padded_chunk(rng, ids, seen, count, any_width):
    """Return rows of a chunk, padded left, right or, with a mask, on both sides. Padding holds ids that no vocabulary
    has.

    A chunk is of `any_width` that its rows fit into, or of one of two widths, which compiles less.
    """
    most = int(count.max())
    width = max(most + int(rng.integers(0, 3)), 1) if any_width else 6 if most <= 6 else 15
    style = rng.choice(["right", "left", "mask"])
    offset = {"right": np.zeros(ROWS, int), "left": width - count, "mask": rng.integers(0, width - count + 1)}[style]
    chunk = np.full((ROWS, width), -7, np.int32)
    for b in range(ROWS):
        chunk[b, offset[b] : offset[b] + count[b]] = ids[b, seen[b] : seen[b] + count[b]]
    column = np.arange(width)
    mask = (column >= offset[:, None]) & (column < (offset + count)[:, None])
    return chunk, {"mask": mask} if style == "mask" else {"lengths": count, "padding": str(style)}, offset


def check_prefill(run, last_only, want, seen, count, offset) -> Cache:
    """Run a prefill of `count` tokens in each row, from column `offset`; compare its logits with those of the rows."""
    logits, cache = run(last_only=last_only)
    logits = np.asarray(logits)
    for b in np.flatnonzero(count):
        whole = want[b, seen[b] : seen[b] + count[b]]
        ours = logits[b] if last_only else logits[b, offset[b] : offset[b] + count[b]]
        np.testing.assert_allclose(ours, whole[-1] if last_only else whole, rtol=1e-5, atol=1e-5)
    assert last_only or logits.shape == (*run.args[2].shape, TINY.vocab_size)
    return cache


def check_interleaving(
    model: Decoder,
    cache: Cache,
    rng: np.random.Generator,
    ids: np.ndarray,
    want: np.ndarray,
    live: np.ndarray,
    operations: list[str],
    any_width: bool,
    threshold: float = 0.0,
):
    """Run ragged parts of the rows `ids` [3 40] through the operations.

    Compare every logit with `want` [3 40 V], and the last live counts with `live` [L 3 K 40], those after each token.
    """
    lengths, seen = rng.integers(1, LENGTH + 1, ROWS), np.zeros(ROWS, np.int64)
    options, remaining = {"threshold": threshold, "donate": True}, list(operations)
    while (seen < lengths).any():
        operation = remaining.pop(0) if remaining else "prefill"
        if operation == "permute":
            order = rng.permutation(ROWS)
            cache = reordered(cache, order)
            ids, want, live, lengths, seen = ids[order], want[order], live[:, order], lengths[order], seen[order]
        elif operation == "poison":
            cache = poisoned_jit(cache)
        elif operation == "fork":
            cache = reordered(dms_jax.fork(cache, 2), np.arange(1, 2 * ROWS, 2))  # keep the second copy of each row
        elif operation == "save":
            with tempfile.TemporaryDirectory() as folder:
                dms_jax.save_cache(model, cache, f"{folder}/cache.safetensors")
                cache = dms_jax.load_cache(model, f"{folder}/cache.safetensors")
        elif operation == "decode":
            for _ in range(rng.integers(1, 6)):
                active = (rng.random(ROWS) < 0.7) & (seen < lengths)
                step = ids[np.arange(ROWS), np.minimum(seen, LENGTH - 1)]
                logits, cache = dms_jax.decode_step(model, cache, step, active=active, **options)
                logits = np.asarray(logits)  # slicing it costs no compilation then
                for b in np.flatnonzero(active):
                    np.testing.assert_allclose(logits[b], want[b, seen[b]], rtol=1e-5, atol=1e-5)
                assert not logits[~active].any()
                seen = seen + active
        else:
            count = np.minimum(rng.integers(0, 14, ROWS), lengths - seen)
            chunk, layout, offset = padded_chunk(rng, ids, seen, count, any_width)
            size = 5 if operation == "chunks" else None  # few sizes, because each is compiled
            run = functools.partial(dms_jax.prefill, model, cache, chunk, chunk_size=size, **layout, **options)
            cache = check_prefill(run, operation == "last", want, seen, count, offset)
            seen = seen + count
    np.testing.assert_array_equal(cache.seen, lengths)
    np.testing.assert_array_equal(cache.live_counts, live[:, np.arange(ROWS), :, lengths - 1].swapaxes(0, 1))
    assert not np.asarray(cache.forced_evictions).any()
    if isinstance(cache, PagedCache):
        check_pages_counted(cache)


def check_pages_counted(cache: PagedCache):
    """Compare references and free pages with the tables, and the number of pages with the live pairs."""
    arena, table = jax.tree.map(np.asarray, cache.arena), np.asarray(cache.heads.table)
    counts = np.bincount(table[table > 0], minlength=arena.references.shape[1])
    np.testing.assert_array_equal(arena.references[0], counts)
    free = arena.free[0, : arena.free_count[0]]
    np.testing.assert_array_equal(np.sort(free), np.flatnonzero(counts == 0)[1:])
    ring = np.minimum(np.asarray(cache.seen), cache.heads.ring)[None, :, None]
    pages = -(-ring // cache.page_size) + -(-np.asarray(cache.heads.survivors) // cache.page_size)
    np.testing.assert_array_equal((table > 0).sum(-1), pages)
    assert not np.asarray(cache.starved).any()


OPERATIONS = st.lists(
    st.sampled_from(["prefill", "chunks", "decode", "last", "permute", "poison", "fork", "save"]), max_size=12
)
