"""The TPU kernel for attention over pages, in interpret mode, against dense attention over the pairs of each head.

Heads are ragged, places without a pair and pages that belong to nobody hold NaN, and a page of one head lies between
those of others.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dms_jax.core.slot_attention import SoftmaxPart, merge_parts
from dms_jax.core.visibility import MASKED
from dms_jax.kernels import page_attention_tpu
from dms_jax.kernels.block_sizes import SlotBlocks

TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2}


class Pages:
    """Random pairs of ragged heads: each in pages of a shuffled arena, and one after the other."""

    def __init__(self, seed, counts, ring_slots, page_size, head_dim, dtype, columns=None):
        """`counts` holds the pairs in the ring and the survivors of each head [B K 2]."""
        rng, counts = np.random.default_rng(seed), np.asarray(counts)
        self.in_ring, self.survivors = counts[..., 0].astype(np.int32), counts[..., 1].astype(np.int32)
        pages_of = lambda pairs: -(-pairs // page_size)
        ring_pages = ring_slots // page_size
        columns = columns or ring_pages + int(pages_of(self.survivors).max()) + 1
        needed = int((pages_of(self.in_ring) + pages_of(self.survivors)).sum())
        free = list(1 + rng.permutation(needed + 3))
        self.table = np.zeros((*self.in_ring.shape, columns), np.int32)
        arena = np.full((2, len(free) + 1, page_size, head_dim), np.nan, np.float32)
        self.pairs = {}
        for head in np.ndindex(self.in_ring.shape):
            parts = []
            for first, count in ((0, self.in_ring[head]), (ring_pages, self.survivors[head])):
                parts.append(np.asarray(jnp.asarray(rng.normal(size=(2, count, head_dim)), dtype), np.float32))
                for start in range(0, count, page_size):
                    page = self.table[(*head, first + start // page_size)] = free.pop()
                    some = parts[-1][:, start : start + page_size]
                    arena[:, page, : some.shape[1]] = some
            self.pairs[head] = np.concatenate(parts, axis=1)
        self.k, self.v = (jnp.asarray(x, dtype) for x in arena)

    def dense(self, rows) -> SoftmaxPart:
        """Return maximum, sum and accumulator in float64, straight from the definition."""
        row_max, row_sum = np.full(rows.shape[:3], MASKED), np.zeros(rows.shape[:3])
        acc = np.zeros(rows.shape)
        for head, (k, v) in self.pairs.items():
            if k.shape[0]:
                s = np.asarray(rows[head], np.float64) @ k.T / np.sqrt(k.shape[1])
                row_max[head] = s.max(-1)
                p = np.exp(s - row_max[head][:, None])
                row_sum[head], acc[head] = p.sum(-1), p @ v
        return SoftmaxPart(row_max, row_sum, acc)


@partial(jax.jit, static_argnames=("ring_slots", "blocks"))
def by_kernel(rows, k, v, table, in_ring, survivors, ring_slots, blocks):
    return page_attention_tpu.attend_pages(
        rows, k, v, table, in_ring, survivors, ring_slots=ring_slots, blocks=blocks, interpret=True
    )


def check(counts, ring_slots, page_size, head_dim, num_rows, blocks, dtype="float32", cache_dtype=None, columns=None):
    pages = Pages(0, counts, ring_slots, page_size, head_dim, jnp.dtype(cache_dtype or dtype), columns)
    rows = np.random.default_rng(1).normal(size=(*pages.in_ring.shape, num_rows, head_dim))
    rows = jnp.asarray(rows, dtype)
    arrays = pages.k, pages.v, pages.table, pages.in_ring, pages.survivors
    part = by_kernel(rows, *arrays, ring_slots, SlotBlocks(*blocks))
    assert part.row_max.shape == (1, *rows.shape[:3]) and part.acc.shape == (1, *rows.shape)
    merged, tolerance = merge_parts(part), TOLERANCE[dtype]
    wanted = pages.dense(rows)
    np.testing.assert_allclose(
        merged.normalized(), wanted.acc / np.maximum(wanted.row_sum, 1e-30)[..., None], rtol=tolerance, atol=tolerance
    )
    np.testing.assert_allclose(merged.row_max, wanted.row_max, rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(merged.row_sum, wanted.row_sum, rtol=10 * tolerance)
    return merged


# Pairs in the ring and survivors of heads, with pages of 8 pairs and a ring of 24 slots: nothing, a part of a page,
# whole pages, one pair more, and heads that are much longer than others.
RAGGED = [
    [(0, 0), (1, 0), (8, 0)],
    [(24, 0), (24, 1), (0, 7)],
    [(5, 70), (24, 16), (0, 0)],
    [(17, 33), (9, 8), (24, 9)],
]


@pytest.mark.parametrize("blocks", [(4, 8), (64, 16), (64, 24), (2, 1024)])
def test_ragged_heads_equal_dense_attention(blocks):
    check(RAGGED, 24, 8, 16, 4, blocks)


@pytest.mark.parametrize("num_rows", [1, 3, 7])
def test_rows_that_blocks_do_not_divide_equal_dense_attention(num_rows):
    check(RAGGED[2:], 24, 8, 16, num_rows, (3, 16))


def test_survivors_without_a_ring_equal_dense_attention():
    counts = [[(0, 0), (0, 40)], [(0, 3), (0, 16)]]
    check(counts, 0, 8, 16, 5, (4, 16), columns=9)


@pytest.mark.parametrize(("head_dim", "page_size"), [(64, 16), (128, 32)])
@pytest.mark.parametrize(
    ("dtype", "cache_dtype"),
    [("float32", "float32"), ("bfloat16", "bfloat16"), ("bfloat16", "float8_e4m3fn"), ("bfloat16", "float8_e5m2")],
)
def test_head_sizes_and_small_types_equal_dense_attention(head_dim, page_size, dtype, cache_dtype):
    counts = [[(page_size + 3, 2 * page_size), (2 * page_size, 5)]]
    check(counts, 2 * page_size, page_size, head_dim, 4, (8, 3 * page_size), dtype, cache_dtype)


def test_head_without_pairs_is_an_empty_part():
    part = check([[(0, 0), (3, 2)]], 8, 8, 16, 2, (8, 8))
    np.testing.assert_array_equal(part.row_max[0, 0], np.float32(MASKED))
    np.testing.assert_array_equal(part.row_sum[0, 0], 0)
    np.testing.assert_array_equal(part.acc[0, 0], 0)


@pytest.mark.parametrize("entries", [1, 20, 60])
def test_table_that_does_not_fit_is_divided(monkeypatch, entries):
    """A head has 13 columns, so a call takes one head, or four of the twelve."""
    monkeypatch.setattr(page_attention_tpu, "MAX_TABLE", entries)
    calls, original = [], page_attention_tpu._call
    monkeypatch.setattr(page_attention_tpu, "_call", lambda *args: (calls.append(len(args[3])), original(*args))[1])
    by_kernel.clear_cache()
    check(RAGGED, 24, 8, 16, 4, (8, 16), columns=13)
    by_kernel.clear_cache()
    assert calls == ([4] * 3 if entries == 60 else [1] * 12)
