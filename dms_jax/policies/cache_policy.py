"""Which pair leaves the cache, and when: the one question that tells policies apart. The engine asks nothing else."""

from typing import Protocol

from jaxtyping import Float, Int

from dms_jax.axes import Array
from dms_jax.core.compact_cache import Verdict


class CachePolicy(Protocol):
    """A frozen, hashable dataclass: the engine treats it as part of the program."""

    @property
    def window_size(self) -> int:
        """A full buffer does not push out a pair this young while it can choose."""
        ...

    def judge(
        self, logits: Float[Array, "B K T"], position: Int[Array, "B T"], count: Int[Array, "B"], threshold: float | Float[Array, ""]
    ) -> Verdict:
        """What becomes of the pairs at `position`, of which the first `count` of each row are real, and of the pair before
        them. `logits` are the evict logits of their tokens."""
        ...
