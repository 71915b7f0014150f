"""Fixed-length rows of token ids, contiguous or packed, and batches of them.

A batch is a pure function of its step and the seed, so that a resumed run needs no iterator state. Begin with `Rows`.
"""

import functools
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from dms_jax.errors import ConfigError

if TYPE_CHECKING:  # this module imports JAX, and `--help` must not
    from dms_jax.axes import Array

PADDING = -1  # segment id of padding, which no document has


class Batch(NamedTuple):
    """The rows of one step, or one host's part of them.

    The arrays are NumPy arrays, or JAX arrays once placed on a mesh.
    """

    tokens: "Array"  # int32 [B, T]
    segment_ids: (
        "Array"  # int32 [B, T]; a query sees only keys with its own id; contiguous: 0, packed: 1..n, padding: -1
    )
    loss_mask: "Array"  # bool [B, T]; False on padding
    examples: "Array"  # int32 [B]; step * batch_size + row; seeds the noise, independently of the number of hosts


class Rows:
    """Fixed-length rows over a token store.

    Row r consists of the pieces first[r] to first[r+1]-1, each a range of the store.
    """

    def __init__(
        self, ids: np.ndarray, starts: np.ndarray, sizes: np.ndarray, length: int, layout: str, pad_short: bool = False
    ):
        """Lay out the documents `ids[starts[i] : starts[i] + sizes[i]]`, in this order.

        `layout`: "contiguous" or "packed". `pad_short`: make one padded row if there are too few tokens for one
        contiguous row.
        """
        self.length, self.tokens, self._ids, self._packed = length, int(sizes.sum()), ids, layout == "packed"
        if self._packed:
            self._starts, self._sizes, row_of_piece = _pack(starts, sizes, length)
        else:
            self._starts, self._sizes, row_of_piece = _cut(starts, sizes, length, pad_short)
        self.num_rows = int(row_of_piece[-1]) + 1 if len(row_of_piece) else 0
        self.used_tokens = int(self._sizes.sum())
        self._first = np.searchsorted(row_of_piece, np.arange(self.num_rows + 1))

    def batch(self, step: int, batch_size: int, seed: int, start: int = 0, count: int | None = None) -> Batch:
        """Return rows [start, start + count) of the global batch of `step`, as a pure function of the arguments.

        In each epoch, every row occurs once, in an order drawn from (seed, epoch). A batch may span two epochs.
        """
        if not self.num_rows:
            raise ConfigError(
                "a batch needs at least one row, got none; raise data.held_out_fraction or set data.eval_paths"
            )
        count = batch_size - start if count is None else count
        examples = step * batch_size + start + np.arange(count, dtype=np.int64)
        tokens = np.zeros((count, self.length), np.int32)
        segment_ids = np.full((count, self.length), PADDING, np.int32)
        for i, example in enumerate(examples.tolist()):
            epoch, position = divmod(example, self.num_rows)
            self._fill(_permutation(self.num_rows, seed, epoch)[position], tokens[i], segment_ids[i])
        return Batch(tokens, segment_ids, segment_ids != PADDING, (examples % 2**31).astype(np.int32))

    def _fill(self, row: int, tokens: np.ndarray, segment_ids: np.ndarray) -> None:
        at = 0
        pieces = slice(self._first[row], self._first[row + 1])
        for segment, (start, size) in enumerate(
            zip(self._starts[pieces].tolist(), self._sizes[pieces].tolist(), strict=True), 1
        ):
            tokens[at : at + size] = self._ids[start : start + size]
            segment_ids[at : at + size] = segment if self._packed else 0
            at += size


def _cut(
    starts: np.ndarray, sizes: np.ndarray, length: int, pad_short: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Concatenate the documents and cut them every `length` tokens.

    Returns (starts, sizes, row) of the pieces. A piece ends where a document or a row ends.
    """
    ends = np.cumsum(sizes)
    total = int(ends[-1]) if len(ends) else 0
    used = total if pad_short and total < length else total - total % length
    edges = np.union1d(np.append(ends, 0), np.arange(0, used + 1, length))
    edges = edges[edges <= used]
    document = np.searchsorted(ends, edges[:-1], side="right")
    return starts[document] + edges[:-1] - (ends - sizes)[document], np.diff(edges), edges[:-1] // length


def _pack(starts: np.ndarray, sizes: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cut documents into pieces of at most `length` tokens, and put each into the fullest row that has room for it.

    Returns (starts, sizes, row) of the pieces, sorted by row.
    """
    counts = -(-sizes // length)
    document = np.repeat(np.arange(len(sizes)), counts)
    offset = (np.arange(len(document)) - np.repeat(np.cumsum(counts) - counts, counts)) * length
    piece_sizes = np.minimum(sizes[document] - offset, length)
    rows_with_free: list[list[int]] = [[] for _ in range(length)]
    available = 0  # bit f is set while some row has f free tokens, so the tightest fit is the lowest set bit >= `size`
    row_of_piece = np.empty(len(document), np.int64)
    num_rows = 0
    for piece, size in enumerate(piece_sizes.tolist()):
        fitting = available >> size
        if fitting:
            free = size + (fitting & -fitting).bit_length() - 1
            row = rows_with_free[free].pop()
            available ^= 0 if rows_with_free[free] else 1 << free
        else:
            free, row, num_rows = length, num_rows, num_rows + 1
        if free > size:
            rows_with_free[free - size].append(row)
            available |= 1 << (free - size)
        row_of_piece[piece] = row
    order = np.argsort(row_of_piece, kind="stable")
    return (starts[document] + offset)[order], piece_sizes[order], row_of_piece[order]


def mix(values: np.ndarray, *salts: int) -> np.ndarray:
    """Hash uint64 to uint64 with rounds of splitmix64, one per salt.

    Unlike NumPy's generators, this hash is the same in all versions, so that a resumed run sees the same rows after an
    upgrade.
    """
    values = np.asarray(values, np.uint64)
    for salt in (*salts, 0):
        values = values + np.uint64((salt * 0x9E3779B97F4A7C15 + 0x9E3779B97F4A7C15) % 2**64)
        values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        values = values ^ (values >> np.uint64(31))
    return values


@functools.lru_cache(maxsize=4)  # training and held-out rows, for two epochs each at the end of an epoch
def _permutation(num_rows: int, seed: int, epoch: int) -> np.ndarray:
    return np.argsort(mix(np.arange(num_rows), seed, epoch), kind="stable")
