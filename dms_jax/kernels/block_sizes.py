"""The block sizes that a kernel takes, one type for each family of kernels. `kernel_table` holds their defaults."""

from typing import NamedTuple


class TrainBlocks(NamedTuple):
    """Training attention: queries and keys per block."""

    q: int
    k: int
    steps: int = 2  # blocks in flight (GPU)

    def fit(self, length: int) -> "TrainBlocks":
        """Return blocks that are no larger than rows of `length` tokens need."""
        longest = max(128, 1 << (length - 1).bit_length())
        return self._replace(q=min(self.q, longest), k=min(self.k, longest))


class SlotBlocks(NamedTuple):
    """Attention over slots: query rows and keys per block, and the number of parts of a head's slots."""

    rows: int
    keys: int
    parts: int = 1  # (GPU) 0 chooses a number that keeps the multiprocessors busy
    steps: int = 4  # blocks in flight (GPU)


class PlaceBlocks(NamedTuple):
    """Compaction: pairs of the chunk and slots of the cache per block."""

    pairs: int
    slots: int = 512  # (TPU) a GPU touches only the slots that it writes


Blocks = TrainBlocks | SlotBlocks | PlaceBlocks
