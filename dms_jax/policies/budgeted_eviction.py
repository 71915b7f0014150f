"""The learned policy within an exact budget: lazy eviction, in the order of the evict logits."""

import math
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import numpy as np
from jaxtyping import Float, Int

from dms_jax.axes import Array
from dms_jax.config import ModelConfig
from dms_jax.core.compact_cache import Expiries
from dms_jax.errors import ConfigError, shown
from dms_jax.policies.cache_policy import UNBOUNDED, FusedRule, SlotBounds, parsed_budget
from dms_jax.policies.learned_eviction import LearnedEviction, learned_config

HeadBudgets = tuple[tuple[int, ...], ...]  # pairs per layer and KV head


@dataclass(frozen=True)
class BudgetedEviction(LearnedEviction):
    """Evict nothing while a head is within its budget; then evict the pair with the highest evict logit.

    Pairs of the window never leave. There is no threshold: `mark` only scores the pairs, and `core.budget_eviction`
    lets them expire. A head has at most its budget of pairs at every query, in a prefill as in decoding, so the memory
    of a cache is known beforehand.

    Deviation from the paper (arXiv:2506.05345), which evicts by a threshold: there, the compression ratio is about
    constant and memory grows with the row; here, memory is constant and the ratio grows.
    """

    has_budget: ClassVar[bool] = True
    budget: int  # mean over all layers and KV heads
    head_budgets: HeadBudgets | None = None  # None gives each head `budget`

    @classmethod
    def from_text(cls, budget: str, config: ModelConfig) -> Self:
        return cls(learned_config(config), parsed_budget(budget))

    def __post_init__(self):
        smallest, table = self.window_size + 1, self.head_budgets
        filled = lambda x: isinstance(x, tuple) and len(x) > 0
        if table is not None and not (filled(table) and all(map(filled, table))):
            raise ConfigError(f"head_budgets must be a tuple of tuples of numbers, got {shown(table)}")
        every = [self.budget, *(pairs for layer in table or () for pairs in layer)]
        for pairs in every:
            if not isinstance(pairs, int) or isinstance(pairs, bool) or not smallest <= pairs <= UNBOUNDED:
                raise ConfigError(
                    f"a budget must be a whole number of at least window_size + 1 = {smallest} pairs, because the "
                    f"window always stays, and at most 2**30, got {shown(pairs)}; use {smallest} or more"
                )
        if table is not None and sum(every[1:]) != self.budget * (len(every) - 1):
            raise ConfigError(
                f"the budgets of heads must have a mean of {self.budget}, the budget of the policy, "
                f"got {sum(every[1:]) / (len(every) - 1):g}; use their mean as the budget"
            )

    def slot_bounds(self) -> SlotBounds:
        smallest, reason = self.window_size + 1, f"a window of {self.window_size} (window_size + 1 pairs always stay)"
        if self.head_budgets is None:
            return SlotBounds(smallest, self.budget, reason)
        of_layer = tuple(max(layer) for layer in self.head_budgets)
        return SlotBounds(smallest, max(of_layer), reason, of_layer)

    def budget_table(self, num_layers: int, num_kv_heads: int) -> Int[np.ndarray, "L K"]:
        shape = num_layers, num_kv_heads
        if self.head_budgets is None:
            return np.full(shape, self.budget, np.int32)
        if len(self.head_budgets) != num_layers or any(len(layer) != num_kv_heads for layer in self.head_budgets):
            raise ConfigError(
                f"head_budgets must be {num_kv_heads} numbers for each of {num_layers} layers of this model, "
                f"got {[len(layer) for layer in self.head_budgets]}"
            )
        return np.array(self.head_budgets, np.int32)

    def in_cache(self) -> Self:
        return replace(self, head_budgets=None)

    def fused_rule(self) -> FusedRule | None:
        return None  # the fused step evicts by a threshold

    def mark(
        self,
        logits: Float[Array, "B K T"],
        position: Int[Array, "B T"],
        count: Int[Array, "B"],
        threshold: float | Float[Array, ""],
    ) -> Expiries:
        return super().mark(logits, position, count, math.inf)  # no logit exceeds it: scores only
