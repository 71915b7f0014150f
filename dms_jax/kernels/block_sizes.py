"""Block sizes of the kernels: how much of each axis one step of a grid holds in on-chip memory."""

from typing import NamedTuple


class SlotBlocks(NamedTuple):
    """Attention over slots, and compaction of them."""

    rows: int  # query rows; in compaction, pairs that come
    keys: int  # slots
    parts: int  # ways in which the slots of a head are split among parallel workers
