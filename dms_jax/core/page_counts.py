"""How many pages the heads of a cache need, and how many bytes that is, in plain numbers.

The engine makes caches of these sizes, and `planning` predicts them; both call `expected_pages` and `cache_bytes`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

MARGIN = 1.1  # more survivors than expected, because texts and heads differ
SMALL_ARENA = 32 * 2**20  # bytes; below it, few programs matter more than memory


class PageShape(NamedTuple):
    """Sizes of a cache in pages."""

    page_size: int  # pairs of a page
    head_dim: int
    number_bytes: int  # of one number of a key or value
    with_scores: bool = False  # whether a pair also has its score and its position, as under exact budgets

    @property
    def page_bytes(self) -> int:
        """Keys, values and, under exact budgets, scores and positions of one page."""
        return self.page_size * (2 * self.head_dim * self.number_bytes + 8 * self.with_scores)


def largest_that_fits(fits: Callable[[int], bool]) -> int:
    """Return the largest number that `fits`, which is true up to that number; 0 if 1 does not fit."""
    low, high = 0, 1
    while fits(high):
        low, high = high, 2 * high
    while low + 1 < high:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def pages_of(pairs: Any, page_size: int) -> Any:
    """Return how many pages hold so many pairs; numbers or arrays."""
    return -(-pairs // page_size)


def size_class(pages: int, page_bytes: int) -> int:
    """Round a number of pages up to one of few sizes, because each size of an arena is compiled.

    A small arena becomes at most an eighth larger, any other at most a thirty-second.
    """
    return round_to_few(pages, 8 if pages * page_bytes < SMALL_ARENA else 32)


def round_to_few(number: int, classes: int, multiple: int = 1) -> int:
    """Round up to one of `classes` numbers between each power of two and the next, but to multiples of `multiple`,
    which is a power of two."""
    step = max(multiple, (1 << (number - 1).bit_length()) // (2 * classes))
    return pages_of(number, step) * step


def length_class(tokens: int) -> int:
    """Round the length of a row up to one of few, so that a prompt of another length needs no other programs."""
    return round_to_few(tokens, 8, 64)


def table_columns(max_length: int, ring: int, page_size: int, budgets: np.ndarray | None = None) -> int:
    """Return the columns of a table for rows of `max_length` tokens of which each head may keep all, or its budget."""
    if budgets is not None:
        max_length = min(max_length, int(budgets.max()) - ring)
    return pages_of(ring, page_size) + pages_of(max_length, page_size)


def expected_pages(
    lengths: Int[np.ndarray, "B"],
    ring: int,
    page_size: int,
    fraction: float | Float[np.ndarray, "L K"],
    layers: int,
    kv_heads: int,
    budgets: Int[np.ndarray, "L K"] | None = None,
    slack: int | Int[np.ndarray, "B"] = 0,
) -> Int[np.ndarray, "L B K"]:
    """Return how many pages each head needs for rows of `lengths` tokens.

    Of the pairs behind the ring, a head keeps `fraction`, one for all heads or each its own, and `slack` pairs more; or
    what its budget leaves beside the ring.
    """
    behind = np.maximum(0, lengths - ring)[None, :, None]
    if budgets is not None:
        survivors = np.minimum(budgets[:, None] - ring, behind)
    else:
        of_head = np.broadcast_to(fraction, (layers, kv_heads))[:, None]
        survivors = np.minimum(behind, np.ceil(behind * of_head).astype(int) + np.reshape(slack, (1, -1, 1)))
        survivors = np.broadcast_to(survivors, (layers, len(lengths), kv_heads))
    return pages_of(np.minimum(ring, lengths), page_size)[None, :, None] + pages_of(survivors, page_size)


def expected_fraction(target_cr: float, margin: float = MARGIN) -> float:
    """Return the fraction of pairs behind the ring to make room for, given the nominal compression ratio."""
    return min(1.0, margin / target_cr)


def cache_bytes(shape: PageShape, num_pages: int, columns: int, ring: int, heads: int, rows: int) -> int:
    """Return the memory of all arrays of a `PagedCache` on one device, which has `heads` = layers x rows x KV heads."""
    arena = num_pages * (shape.page_bytes + 8) + 4  # and for each page its references and its place in the stack
    return arena + heads * (4 * columns + 4 + ring + 1 + 4 * shape.with_scores) + 4 * rows
