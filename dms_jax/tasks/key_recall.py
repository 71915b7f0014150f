"""Associative recall: a list of names, each with a word; at the end, the word of one name is asked for.

    Each line has a name and its word.

    calm tiger: lamp
    happy river: drum
    ...

    The same names again, in another order.

    happy river:

The answer is " drum". This follows MQAR (Arora et al., "Zoology", arXiv:2312.04927), with English words for symbols and
one query per prompt. The line that is asked for is at the given depth.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass

from dms_jax.errors import ConfigError
from dms_jax.tasks.grid import Cell, cells, fill
from dms_jax.tasks.problem import Problem, TaskOptions
from dms_jax.tasks.words import ADJECTIVES, NOUNS

MAX_PAIRS = len(ADJECTIVES) * len(NOUNS) // 2  # half of the possible names, so that drawing a new one stays quick


@dataclass(frozen=True)
class Recall:
    name: str = "recall"
    measures_answer: bool = True

    def problems(self, options: TaskOptions, count_tokens: Callable[[str], int]) -> list[Problem]:
        return [self._problem(cell, options, count_tokens) for cell in cells(self.name, options)]

    def _problem(self, cell: Cell, options: TaskOptions, count_tokens: Callable[[str], int]) -> Problem:
        pairs: dict[str, str] = {}

        def shown(count: int) -> list[tuple[str, str]]:
            if count > MAX_PAIRS:
                raise ConfigError(
                    f"{self.name}: --lengths must be shorter, got {cell.length}, which needs more than the "
                    f"{MAX_PAIRS} available names; use shorter prompts"
                )
            while len(pairs) < count:
                key = f"{cell.rng.choice(ADJECTIVES)} {cell.rng.choice(NOUNS)}"
                pairs.setdefault(key, cell.rng.choice(NOUNS))
            return list(pairs.items())[:count]

        def asked(count: int) -> tuple[str, str]:
            return shown(count)[round(cell.depth * (count - 1))]

        def prompt_of(count: int) -> str:
            lines = "".join(f"{key}: {word}\n" for key, word in shown(count))
            return (
                f"Each line has a name and its word.\n\n{lines}\nThe same names again, in another order.\n\n"
                f"{asked(count)[0]}:"
            )

        count = fill(prompt_of, cell.length, count_tokens, self.name, smallest=1)
        answer = f" {asked(count)[1]}"
        return Problem(
            cell.unit, prompt_of(count), answer, options.max_new_tokens or 8, stop_strings=("\n",), groups=cell.groups
        )

    def extract(self, text: str) -> str:
        """Return the first word of the text, in lower case."""
        found = re.search(r"\w+", text.lower())
        return found.group() if found else ""

    def score(self, problem: Problem, text: str) -> float:
        return float(self.extract(text) == problem.answer.strip())
