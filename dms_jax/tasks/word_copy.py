"""Copying: a long list of random words, then a short part of it, which the model must continue.

    A list of words: calm tiger red lamp old river happy bread noisy drum tall ship ...

    A part of the same list again: tiger red lamp old river

The answer is " happy bread noisy drum tall ship ...", 8 words, and the score is the fraction that is right. This is the
induction task of Olsson et al., "In-context Learning and Induction Heads" (arXiv:2209.11895), at a given depth. The
words are random, so a model can know them only from its cache.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass

from dms_jax.errors import ConfigError
from dms_jax.tasks.grid import Cell, cells, fill
from dms_jax.tasks.problem import Problem, TaskOptions
from dms_jax.tasks.words import ADJECTIVES, NOUNS

WORDS = ADJECTIVES + NOUNS
NUM_CUE, NUM_COPY = 5, 8  # words at the end of the prompt, and words that must follow


@dataclass(frozen=True)
class Copy:
    name: str = "copy"
    measures_answer: bool = True

    def problems(self, options: TaskOptions, count_tokens: Callable[[str], int]) -> list[Problem]:
        return [self._problem(cell, options, count_tokens) for cell in cells(self.name, options)]

    def _problem(self, cell: Cell, options: TaskOptions, count_tokens: Callable[[str], int]) -> Problem:
        words: list[str] = []

        def split(count: int) -> tuple[list[str], int]:
            """Return the first `count` words, and the index at which the repeated part begins."""
            while len(words) < count:
                words.append(cell.rng.choice(WORDS))
            return words[:count], round(cell.depth * (count - NUM_CUE - NUM_COPY))

        def prompt_of(count: int) -> str:
            shown, start = split(count)
            return (
                f"A list of words: {' '.join(shown)}\n\n"
                f"A part of the same list again: {' '.join(shown[start : start + NUM_CUE])}"
            )

        count = fill(prompt_of, cell.length, count_tokens, self.name, smallest=NUM_CUE + NUM_COPY)
        shown, start = split(count)
        cue = shown[start : start + NUM_CUE]
        if sum(shown[i : i + NUM_CUE] == cue for i in range(count)) > 1:
            raise ConfigError(
                f"{self.name}: the words that {cell.unit} asks for occur twice in its list; use another --seed"
            )
        answer = " " + " ".join(shown[start + NUM_CUE : start + NUM_CUE + NUM_COPY])
        limit = options.max_new_tokens or 4 * NUM_COPY
        return Problem(cell.unit, prompt_of(count), answer, limit, stop_strings=("\n",), groups=cell.groups)

    def extract(self, text: str) -> str:
        """Return the first words of the text, as many as the reference has."""
        return " ".join(re.findall(r"\w+", text.lower())[:NUM_COPY])

    def score(self, problem: Problem, text: str) -> float:
        """Return the fraction of words that are right and in the right place."""
        reference, answer = problem.answer.split(), self.extract(text).split()
        return sum(a == b for a, b in zip(reference, answer, strict=False)) / len(reference)
