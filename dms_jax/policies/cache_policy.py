"""The interface of cache policies. The rest of the package asks a policy four questions and nothing else.

1. `mark`, when pairs arrive: until when is each one visible? A rule that depends on the tokens alone needs no more.
2. `read`, before attention, only if `reads_subset`: which slots are worth reading now?
3. `select`, after attention, only if `ranks_pairs`: which pairs stay? Methods with a budget rank here.
4. `slot_bounds` and `budget_table`, before anything runs: how many pairs must a head be able to hold, and how many may
   it hold at any query?

Class flags say what a policy can do, so no caller compares types or names. To add a policy, write its file, its
line in `dms_jax.policies.POLICIES` and its test. `keep_all` is the smallest policy, and `knorm` is the
smallest one with a budget.
"""

import re
from abc import ABC, abstractmethod
from typing import ClassVar, Literal, NamedTuple, Self

import numpy as np
from jaxtyping import Bool, Float, Int

from dms_jax.axes import Array
from dms_jax.config import ModelConfig
from dms_jax.core.compact_cache import Expiries, LayerCache, Selection
from dms_jax.errors import ConfigError, shown

UNBOUNDED = 2**30  # more pairs or queries than any row has; position + UNBOUNDED still fits into an int32


class SlotBounds(NamedTuple):
    """Pairs per row and KV head that a policy needs room for."""

    min: int  # a head holds at least this many pairs once the row has that many tokens
    max: int | None  # a head never holds more than this; None if the number depends on the tokens
    reason: str  # for messages: where the bounds come from
    max_of_layer: tuple[int, ...] | None = None  # `max` for each layer, if layers differ


class FusedRule(NamedTuple):
    """The parameters of the rule that the one-kernel decode step implements: marked pairs leave after a window."""

    window_size: int
    decision_shift: Literal[0, 1] | None  # as in `DMSConfig`; None if no pair is ever marked
    granularity: Literal["head", "layer"] = "head"


def parsed_budget(text: str) -> int:
    """Read the budget in the name of a policy. Raises ConfigError."""
    if not re.fullmatch("[0-9]{1,9}", text):
        raise ConfigError(f"the budget must be a number of pairs per KV head, e.g. 256, got {shown(text)}")
    return int(text)


class CachePolicy(ABC):
    """Base of all policies. A policy is a frozen, hashable dataclass, and static under jit.

    It is a part of each compiled program. A method that reads a variable of a notebook does not see it change, so
    whatever may change must be a field.
    """

    is_learned: ClassVar[bool] = False  # follows the evict head of a retrofitted model, at a threshold
    has_budget: ClassVar[bool] = False  # has a field `budget`, in pairs per KV head, as in "tova:256"
    ranks_pairs: ClassVar[bool] = False  # `select` is asked after each chunk; the policy can also compress a prompt
    reads_subset: ClassVar[bool] = False  # `read` is asked before attention
    keeps_prompt: ClassVar[bool] = False  # the first prefill stays, or `check_prompt` refuses it
    # Marks pairs that leave `window_size` steps after they were added, or never, so that a `PagedCache` can hold them.
    in_pages: ClassVar[bool] = False
    compresses_prompt: ClassVar[bool] = False  # `compress_prompt` is called once, after the prefill
    compares_heads: ClassVar[bool] = False  # scores of a layer's heads have one unit, so the heads can share a budget

    @classmethod
    def from_text(cls, budget: str, config: ModelConfig) -> Self:
        """Make the policy named "NAME" or "NAME:BUDGET" for a model of `config`. Raises ConfigError."""
        if cls.has_budget:
            return cls(parsed_budget(budget))  # pyrefly: ignore[bad-argument-count]  # `budget` is the first field
        if budget:
            raise ConfigError(f"the policy has no budget, got {shown(budget)}; leave it out")
        return cls()

    @classmethod
    def check_compares_heads(cls) -> None:
        """Raise ConfigError if the heads of a layer cannot share one budget under this policy, as in Ada-KV."""
        if not cls.compares_heads:
            raise ConfigError(
                f"{cls.__name__} does not compare pairs of different heads, so heads cannot share a budget as in "
                "Ada-KV; leave out adakv, or use snapkv, h2o, observed_attention, dropkv or expected_attention"
            )

    def budget_table(self, num_layers: int, num_kv_heads: int) -> Int[np.ndarray, "L K"] | None:
        """Return the budget of each head if `core.budget_eviction` holds heads to it, query by query; else None."""
        return None

    def in_cache(self) -> Self:
        """Return the policy without what a cache holds in arrays, so that compiled programs do not depend on it."""
        return self

    @property
    @abstractmethod
    def window_size(self) -> int:
        """A full buffer pushes out a pair of at most this age only if all of its pairs are that young."""

    @property
    def ring_size(self) -> int | None:
        """Newest pairs of each head that a `PagedCache` keeps apart; None for any number."""
        return self.window_size + 1

    @property
    def features(self) -> int:
        """How many numbers the cache stores for each pair on behalf of this policy."""
        return 0

    def head_state(self, config: ModelConfig) -> Float[Array, "state"] | None:
        """Return the numbers with which each KV head of a new cache begins; None if the policy remembers none."""
        return None

    @abstractmethod
    def slot_bounds(self) -> SlotBounds:
        """Return how many pairs a head must be able to hold."""

    def check_prompt(
        self, slots: LayerCache, seen: Int[Array, "B"], count: Int[np.ndarray, "B"], chunk_size: int | None
    ) -> None:
        """Raise ConfigError if the next `count` tokens of a row, which has `seen` tokens so far, cannot be its prompt.

        `slots` are those of any layer. The tokens are read in chunks of `chunk_size`; None stands for the default.
        """
        return None

    def fused_rule(self) -> FusedRule | None:
        """Return the rule for the one-kernel decode step; None if that kernel does not implement this policy."""
        return None

    @abstractmethod
    def mark(
        self,
        logits: Float[Array, "B K T"],
        position: Int[Array, "B T"],
        count: Int[Array, "B"],
        threshold: float | Float[Array, ""],
    ) -> Expiries:
        """Decide about the pairs at `position` and about the pair before them; the first `count` of each row are real.

        `logits` are the evict logits of their tokens; a learned policy evicts where a logit exceeds `threshold`.
        """

    def read(
        self, q: Float[Array, "B T N H"], slots: LayerCache, position: Int[Array, "B T"]
    ) -> Bool[Array, "B K T C"] | None:
        """Return the slots that each query at `position` reads, among those that it may see; None reads all."""
        return None

    def pairs_read(self, live: Float[Array, "*A"]) -> Float[Array, "*A"]:
        """Return how many of `live` pairs one decoded token reads. This number determines the cost of its attention."""
        return live

    def select(
        self,
        q: Float[Array, "B T N H"],
        k: Float[Array, "B K T H"],
        v: Float[Array, "B K T H"],
        expiries: Expiries,
        slots: LayerCache,
        position: Int[Array, "B T"],
        count: Int[Array, "B"],
    ) -> Selection | None:
        """Return which slots and chunk pairs stay, and their new statistic; None keeps all that are live."""
        return None
