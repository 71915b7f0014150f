"""The Hopper kernel for attention over pages, in interpret mode, against the definition and `core.paged_attention`."""

from functools import partial
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dms_jax.core import paged_attention
from dms_jax.core.page_arena import NOBODY
from dms_jax.core.slot_attention import merge_parts
from dms_jax.core.visibility import MASKED
from dms_jax.kernels.block_sizes import SlotBlocks
from dms_jax.kernels.page_attention_gpu import attend_pages

RUN = jax.jit(partial(attend_pages, interpret=True), static_argnames=("ring_slots", "blocks"))


def random_pages(in_ring, survivors, ring_slots, page_size, head_dim, dtype=jnp.float32, columns=None):
    """Draw an arena in which heads [B K] have these pairs, in pages that lie in any order.

    Whatever holds no pair is NaN: page 0, pages of nobody, and the places of a head's pages that are free. Columns
    behind a head's last page are 0.
    """
    rng = np.random.default_rng(0)
    in_ring, survivors = np.asarray(in_ring), np.asarray(survivors)
    slots = max(ring_slots + survivors.max(), page_size)
    columns = columns or -(-slots // page_size)
    slot = np.arange(columns * page_size)
    live = slot < in_ring[..., None]
    live |= (slot >= ring_slots) & (slot < ring_slots + survivors[..., None])
    has_page = live.reshape(*in_ring.shape, columns, page_size).any(-1)
    num_pages = has_page.sum() + 4
    table = np.full(has_page.shape, NOBODY)
    table[has_page] = rng.permutation(np.arange(1, num_pages))[: has_page.sum()]
    filled = np.zeros((num_pages, page_size), bool)
    filled[table[has_page]] = live.reshape(*in_ring.shape, columns, page_size)[has_page]
    k, v = rng.normal(size=(2, *filled.shape, head_dim))
    k, v = (jnp.asarray(np.where(filled[..., None], x, np.nan), dtype) for x in (k, v))
    ints = (jnp.asarray(x, jnp.int32) for x in (table, in_ring, survivors))
    return k, v, *ints


def attention(rows, k, v, table, in_ring, survivors, ring_slots):
    """Attend from rows [B K R H] to the pairs of their head, one after the other, in fp64."""
    rows, k, v = (np.asarray(x, np.float64) for x in (rows, k, v))
    out, page_size = np.zeros(rows.shape), k.shape[1]
    for b, head in np.ndindex(*rows.shape[:2]):
        live = [*range(in_ring[b, head]), *range(ring_slots, ring_slots + survivors[b, head])]
        if live:
            places = [(table[b, head, c // page_size], c % page_size) for c in live]
            keys, values = (np.array([x[place] for place in places]) for x in (k, v))
            s = rows[b, head] @ keys.T / np.sqrt(rows.shape[-1])
            p = np.exp(s - s.max(-1, keepdims=True))
            out[b, head] = p @ values / p.sum(-1, keepdims=True)
    return out


def check(pages, ring_slots, num_rows, blocks, tolerance=1e-5, dtype=jnp.float32):
    (b, heads, _), head_dim = pages[2].shape, pages[0].shape[2]
    rows = jnp.asarray(np.random.default_rng(1).normal(size=(b, heads, num_rows, head_dim)), dtype)
    parts = RUN(rows, *pages, ring_slots=ring_slots, blocks=blocks)
    assert parts.row_max.shape == (blocks.parts * (2 if blocks.rows == 64 else 1), *rows.shape[:3])
    expected = attention(rows, *pages, ring_slots)
    np.testing.assert_allclose(merge_parts(parts).normalized(), expected, rtol=tolerance, atol=tolerance)
    return parts


def test_ring_and_survivors_that_end_anywhere_in_a_page():
    """Each of an empty, partial and full ring, with survivors that end before, at and behind a border.

    A block of 16 slots has two pages of 8, and the ring of 24 slots ends in the middle of a block.
    """
    counts = product([0, 8, 17, 24], [0, 1, 7, 8])
    in_ring, survivors = np.array([*counts]).reshape(4, 4, 2).transpose(2, 0, 1)
    check(random_pages(in_ring, survivors, 24, 8, 8), 24, 2, SlotBlocks(64, 16, 1, 2))


def test_parts_share_the_pairs_of_each_head():
    """One head has 5 blocks of pairs, of which the first of two parts gets 3; one has 3 blocks, and one has none."""
    pages = random_pages([[8, 8, 0]], [[25, 9, 0]], 8, 8, 16)
    parts = check(pages, 8, 3, SlotBlocks(64, 8, 2, 2))
    of_empty_head = jax.tree.map(lambda x: x[:, 0, 2], parts)
    assert (of_empty_head.row_max == jnp.float32(MASKED)).all()
    assert not of_empty_head.row_sum.any() and not of_empty_head.acc.any()
    # Two warpgroups alternate within a part: blocks 0 and 2, 1; 3, 4. Of the shorter head: blocks 0, 1; 2, nothing.
    np.testing.assert_array_equal(parts.row_sum[:, 0, 0, 0] > 0, [True, True, True, True])
    np.testing.assert_array_equal(parts.row_sum[:, 0, 1, 0] > 0, [True, True, True, False])


def test_rows_of_a_chunk_over_survivors():
    """Use 72 rows, so that the second warpgroup has a few real rows. The ring is left out."""
    check(random_pages([[0, 0, 0]], [[21, 16, 0]], 0, 8, 8), 0, 72, SlotBlocks(128, 16, 1, 2))


@pytest.mark.parametrize("rows", [64, 128])
def test_pages_longer_than_a_block_and_blocks_longer_than_the_table(rows):
    pages = random_pages([[16, 5]], [[20, 0]], 16, 16, 8)
    check(pages, 16, 2, SlotBlocks(rows, 8, 1, 2))
    check(pages, 16, 2, SlotBlocks(rows, 64, 1, 2))


@pytest.mark.parametrize(("rows", "dtype"), [(64, jnp.float8_e4m3fn), (128, jnp.float8_e5m2)])
def test_eight_bit_pages(rows, dtype):
    check(random_pages([[8, 3]], [[11, 0]], 8, 8, 8, dtype), 8, 2, SlotBlocks(rows, 16, 1, 2))


@pytest.mark.parametrize("head_dim", [64, 128])
def test_bfloat16_pages_of_64_equal_core(head_dim):
    """The sizes of a model: a ring of 129 pairs in three pages, and a table with room for more survivors."""
    group, page_size = 2, 64
    pages = random_pages(
        [[129, 129], [40, 40]], [[100, 171], [0, 0]], 192, page_size, head_dim, jnp.bfloat16, columns=7
    )
    rows = jnp.asarray(np.random.default_rng(2).normal(size=(2, 2, group, head_dim)), jnp.bfloat16)
    parts = RUN(rows, *pages, ring_slots=192, blocks=SlotBlocks(64, 8192 // head_dim, 0, 4))
    expected = paged_attention.attend_pages(rows, *pages, ring_slots=192).normalized()
    np.testing.assert_allclose(merge_parts(parts).normalized(), expected, rtol=2e-2, atol=2e-2)
