"""How the kernels cut their arrays into blocks: small tuples of ints, part of the program."""

from typing import NamedTuple


class SlotBlocks(NamedTuple):
    """Attention over slots."""

    rows: int  # query rows that a block of keys meets at once
    keys: int
    parts: int  # splits of the slots in use, worked on in parallel and merged afterwards
    steps: int = 4  # blocks of keys in flight


class PlaceBlocks(NamedTuple):
    """Stream compaction."""

    pairs: int  # pairs of the chunk that one program looks at
