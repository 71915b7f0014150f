"""Sizes of blocks, chosen ahead of time: what a kernel holds in fast memory at once."""

from typing import NamedTuple


class TrainBlocks(NamedTuple):
    """Queries and keys of one block of scores in the training attention."""

    q: int
    k: int
