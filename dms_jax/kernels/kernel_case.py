"""The record of a benchmark case: one kernel at one shape."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax.numpy as jnp

from dms_jax.kernels.block_sizes import Blocks


class Case(NamedTuple):
    """One kernel at one shape."""

    kernel: str
    shape: dict[str, int]
    dtype: jnp.dtype  # of the computation
    cache_dtype: jnp.dtype  # of keys and values
    inputs: tuple
    run: Callable[..., Callable[..., tuple]]  # (implementation, interpret, blocks) -> a function of the inputs
    reference: Callable[..., tuple]  # a function of the inputs in fp32
    # (inputs, outputs) -> index -> new input of the next call; calls in a chain must depend on each other to be timed
    feed: Callable[[tuple, tuple], dict[int, Any]]
    min_bytes: float  # if each live byte is moved once
    flops: float
    # name of `DENSE` -> dense attention of the same shapes, or None if there is none
    dense: Callable[[str], Callable[..., tuple] | None] = lambda how: None

    @property
    def min_seconds(self) -> float:
        """A lower bound of the time on any device."""
        return max(self.min_bytes / 1e13, self.flops / 2e15)


def with_implementation(
    function: Callable, implementation: str, interpret: bool = False, blocks: Blocks | None = None
) -> Callable:
    """Return a function of `attention_api` that runs an implementation, as `Case.run` needs it."""
    return partial(function, implementation=implementation, interpret=interpret, blocks=blocks)
