"""Block sizes of the kernels."""

from typing import NamedTuple


class TrainBlocks(NamedTuple):
    """Of training attention: rows of queries and of keys that meet in one step, and the steps whose loads are in flight."""

    q: int
    k: int
    steps: int = 2
