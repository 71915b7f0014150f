"""Sliding window with attention sinks, the training-free baseline a retrofit has to beat."""

from dataclasses import dataclass

from jaxtyping import Bool, Int

from dms_jax.axes import Array
from dms_jax.config import ConfigError


@dataclass(frozen=True)
class StreamingLLM:
    """Keep the first `num_sinks` pairs and the most recent ones, `budget` pairs in all. Xiao et al., arXiv:2309.17453.

    Deviation: rotary positions are not renumbered. In the terms of the one rule, every pair but the sinks is marked, and
    leaves after `window_size` steps.
    """

    budget: int
    num_sinks: int = 4

    def __post_init__(self):
        if self.budget <= self.num_sinks:
            raise ConfigError(f"a sliding window of {self.budget} pairs has no room beside {self.num_sinks} sinks; use a budget > {self.num_sinks}")

    @property
    def window_size(self) -> int:
        return self.budget - self.num_sinks - 1  # a pair is visible to itself and to this many later queries

    def marked(self, position: Int[Array, "S"]) -> Bool[Array, "S"]:
        return position >= self.num_sinks
