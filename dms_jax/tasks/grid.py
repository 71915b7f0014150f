"""The grid of generated problems, length x depth x repetition, and prompts that fill a length."""

import random
from collections.abc import Callable, Iterator
from typing import NamedTuple

from dms_jax.errors import ConfigError
from dms_jax.tasks.problem import TaskOptions

MAX_GUESSES = 8  # by interpolation; afterwards the search bisects, so that it ends soon with every tokenizer


class Cell(NamedTuple):
    """The place of one problem in the grid."""

    unit: str
    length: int
    depth: float
    rng: random.Random  # depends on (seed, task, unit) only, so a cell is the same in every grid

    @property
    def groups(self) -> dict[str, float | str]:
        return {"length": self.length, "depth": self.depth}


def cells(name: str, options: TaskOptions) -> Iterator[Cell]:
    """Yield all cells of a task, whose units look like `1024/0.25/3`."""
    for depth in options.depths:
        if not 0 <= depth <= 1:
            raise ConfigError(
                f"--depths must be in [0, 1], got {depth:g}; 0 is the start of the text, and 1 is its end"
            )
    if options.count < 1 or not options.lengths or not options.depths:
        raise ConfigError(
            f"--count must be at least 1, and --lengths and --depths must not be empty for {name}, got "
            f"{options.count}, {options.lengths} and {options.depths}"
        )
    places = {f"{length}/{depth:g}": (length, depth) for length in options.lengths for depth in options.depths}
    for place, (length, depth) in places.items():
        for number in range(options.count):
            unit = f"{place}/{number}"
            yield Cell(unit, length, depth, random.Random(f"{options.seed}/{name}/{unit}"))


def fill(
    prompt_of: Callable[[int], str], length: int, count_tokens: Callable[[str], int], name: str, smallest: int = 0
) -> int:
    """Find the largest n with count_tokens(prompt_of(n)) <= length, where prompts grow with n. Raises ConfigError if
    the prompt of `smallest` is already too long."""
    low, low_tokens = smallest, count_tokens(prompt_of(smallest))
    if low_tokens > length:
        raise ConfigError(
            f"{name}: --lengths must be at least {low_tokens}, the tokens of its shortest prompt, got {length}"
        )
    high, high_tokens = low + 16, count_tokens(prompt_of(low + 16))
    while high_tokens <= length:
        low, low_tokens = high, high_tokens
        high = int(high * 1.05 * length / high_tokens) + 1
        high_tokens = count_tokens(prompt_of(high))
    guesses = 0
    while high - low > 1:
        share = (length - low_tokens) / (high_tokens - low_tokens) if guesses < MAX_GUESSES else 0.5
        middle = min(max(low + int(share * (high - low)), low + 1), high - 1)
        tokens = count_tokens(prompt_of(middle))
        guesses += 1
        if tokens <= length:
            low, low_tokens = middle, tokens
        else:
            high, high_tokens = middle, tokens
    return low
