"""What tells cache policies apart. The engine asks four questions and nothing else; most policies answer one of them.

1. `mark`, when pairs come: until when is each one visible? Enough for whatever follows from the tokens alone.
2. `read`, before attention: which slots are worth reading now? All, by default.
3. `choose`, after attention: which pairs stay? By default those whose time has not come. Methods with a budget rank here.
4. `room`, before anything runs: how many pairs must a head be able to hold?
"""

from typing import ClassVar, NamedTuple, Protocol

from jaxtyping import Bool, Float, Int

from dms_jax.axes import Array
from dms_jax.core.compact_cache import Expiries, LayerCache, Selection


class SlotBounds(NamedTuple):
    """Pairs per row and KV head."""

    min: int  # a head holds this many as soon as so many have come
    max: int | None  # and never more than this; None: it depends on the tokens
    reason: str


class CachePolicy(Protocol):
    """A frozen, hashable dataclass: the engine treats it as part of the program."""

    ranks_pairs: ClassVar[bool] = False  # `select` is asked after each chunk; the policy can also compress a prompt
    reads_subset: ClassVar[bool] = False  # attention reads some of the live pairs only
    is_learned: ClassVar[bool] = False  # needs the evict head of a retrofitted model
    has_budget: ClassVar[bool] = False  # takes a number of pairs per KV head

    @property
    def window_size(self) -> int:
        """A full buffer does not push out a pair this young while it can choose."""
        ...

    @property
    def features(self) -> int:
        """How many numbers the cache keeps of each pair for this policy."""
        return 0

    def slot_bounds(self) -> SlotBounds: ...

    def mark(
        self,
        logits: Float[Array, "B K T"],
        position: Int[Array, "B T"],
        count: Int[Array, "B"],
        threshold: float | Float[Array, ""],
    ) -> Expiries:
        """What becomes of the pairs at `position`, of which the first `count` of each row are real, and of the pair before
        them. `logits` are the evict logits of their tokens."""
        ...

    def read(
        self, q: Float[Array, "B T N H"], slots: LayerCache, position: Int[Array, "B T"]
    ) -> Bool[Array, "B K T C"] | None:
        """Slots that each query at `position` looks at, of those it may see; None: all."""
        return None

    def pairs_read(self, live: Float[Array, "*A"]) -> Float[Array, "*A"]:
        """How many pairs a decoded token reads of `live` ones; what it costs."""
        return live

    def select(
        self,
        q: Float[Array, "B T N H"],
        k: Float[Array, "B K T H"],
        expiries: Expiries,
        slots: LayerCache,
        position: Int[Array, "B T"],
        count: Int[Array, "B"],
    ) -> Selection | None:
        """Which slots and pairs of the chunk stay after it, and what to remember of them; None: those that have not expired."""
        return None
