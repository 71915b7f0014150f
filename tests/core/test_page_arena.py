"""The allocator of pages does what a set of free pages and a count of references do."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from dms_jax.core import page_arena
from dms_jax.core.page_arena import NOBODY, Arena
from dms_jax.platform_defaults import platform_defaults

PAGES, SIZE, HOLDERS = 12, 2, 5
STEPS = st.lists(st.tuples(st.sampled_from(["take", "share", "release", "resize"]), st.integers(0, 2**31)), max_size=25)


def fresh() -> Arena:
    return jax.tree.map(lambda x: x[0], page_arena.empty_arena(1, PAGES, SIZE, 2, jnp.float32))


take, share, release, copy = (
    jax.jit(f) for f in (page_arena.take, page_arena.share, page_arena.release, page_arena.copy_pages)
)


@partial(jax.jit, static_argnames="num_pages")
def resized(arena: Arena, num_pages: int) -> tuple[Arena, jax.Array]:
    """Return an arena of another size with the same pages in use, and the new number of each page."""
    source, references, free, free_count, number = page_arena.renumbered(arena.references, num_pages)
    moved = {name: x[source] for name, x in page_arena.contents(arena).items()}
    return dataclasses.replace(arena, **moved, references=references, free=free, free_count=free_count), number


def check(arena: Arena, held: list[int]):
    """Compare the arena with the pages that are held, one entry for each reference."""
    references, free = np.asarray(arena.references), np.asarray(arena.free)[: int(arena.free_count)]
    np.testing.assert_array_equal(references, np.bincount(held, minlength=arena.num_pages))
    assert sorted(free.tolist()) == [page for page in range(1, arena.num_pages) if page not in held]


@settings(max_examples=60, deadline=None)
@given(STEPS)
def test_pages_are_given_once_counted_and_returned(steps):
    arena, held = fresh(), []
    for kind, seed in steps:
        rng = np.random.default_rng(seed)
        if kind == "take":
            wanted, free = rng.random((1, HOLDERS)) < 0.5, int(arena.free_count)
            arena, pages = take(arena, wanted)
            given_pages = np.asarray(pages)[wanted]
            assert not np.asarray(pages)[~wanted].any()
            got = given_pages[given_pages != NOBODY].tolist()
            assert len(got) == min(free, wanted.sum()) and len(set(got)) == len(got) and not set(got) & set(held)
            # If pages are short, the first ones that want a page get it.
            assert (given_pages[: len(got)] != NOBODY).all()
            held += got
        elif kind == "resize":
            shrinks = arena.num_pages > PAGES and len(set(held)) < PAGES
            arena, number = resized(arena, PAGES if shrinks else PAGES + 5)
            held = np.asarray(number)[held].tolist()
        else:
            chosen = rng.permutation(held)[:HOLDERS] if held else np.zeros(0, int)
            pages = np.pad(chosen, (0, HOLDERS - len(chosen))).astype(np.int32)[None]
            arena = (share if kind == "share" else release)(arena, pages)
            for page in chosen.tolist():
                held.append(page) if kind == "share" else held.remove(page)
        check(arena, held)
    for start in range(0, len(held), HOLDERS):
        part = held[start : start + HOLDERS]
        arena = release(arena, np.pad(part, (0, HOLDERS - len(part))).astype(np.int32)[None])
    check(arena, [])
    assert int(arena.free_count) == arena.num_pages - 1


def test_content_moves_with_its_page():
    arena, pages = take(fresh(), np.ones((1, HOLDERS), bool))
    content = np.arange(PAGES * SIZE * 2, dtype=np.float32).reshape(PAGES, SIZE, 2)
    arena = jax.tree.map(lambda x: content if x.shape == content.shape else x, arena)
    kept = np.asarray(pages)[0, 1::2]
    arena = release(arena, np.asarray(pages)[:, ::2])
    smaller, number = resized(arena, len(kept) + 1)
    np.testing.assert_array_equal(smaller.k[number[kept]], content[kept])
    assert int(smaller.free_count) == 0
    copied = copy(arena, kept.astype(np.int32), np.array([9, NOBODY], np.int32))
    np.testing.assert_array_equal(copied.k[9], content[kept[0]])
    np.testing.assert_array_equal(copied.k[:9], content[:9])


def test_order_of_memory_changes_no_result(monkeypatch, rng):
    """Where the numbers of a pair are not neighbors in memory, whole pages are read, and few pairs written at once."""
    shape = 2, 3, 7
    page, offset = 1 + rng.permutation(59)[:42].reshape(shape), rng.integers(0, 4, shape)
    page[0, 0, :2] = NOBODY
    pairs = {name: jnp.asarray(rng.normal(size=(*shape, 5)), jnp.float32) for name in "kv"}
    pairs |= {"score": pairs["k"][..., 0], "position": jnp.asarray(offset, jnp.int32)}
    page, offset = (jnp.asarray(x, jnp.int32) for x in (page, offset))
    empty = jax.tree.map(lambda x: x[0], page_arena.empty_arena(1, 60, 4, 5, jnp.float32, with_scores=True))
    found = []
    for platform in ("cpu", "tpu"):
        monkeypatch.setattr(page_arena, "platform_defaults", lambda platform=platform: platform_defaults(platform))
        monkeypatch.setattr(page_arena, "FEW_WRITES", 8)
        arena = page_arena.write(empty, page, offset, pairs)
        found.append((arena, page_arena.pairs_at(arena, page, offset)))
    jax.tree.map(np.testing.assert_array_equal, *found)
    np.testing.assert_array_equal(found[1][1]["k"][1], pairs["k"][1])
    np.testing.assert_array_equal(found[1][1]["k"][0, 0, :2], 0)
