"""Needle in a haystack: numbers are hidden in a long text, and the prompt asks for some of them.

    Special magic numbers are hidden in the text below. Remember them.

    ... The keeper wrote in his log. The special magic number for the calm tiger is 48213. She found 31 volumes. ...

    The special magic number for the calm tiger mentioned in the text is

A text that names 48213 scores 1. This is Kamradt's test in three forms of RULER (Hsieh et al., arXiv:2404.06654): one
needle; several keys, one of which is asked for; and several values of one key, all of which are asked for. Deviations:
numbers have five digits, and each prompt ends with the beginning of its answer, so that base models and small models
know what to do. The needle that is asked for is at the given depth (with several values, the first of them); the other
needles are anywhere.
"""

import random
import re
from collections.abc import Callable
from dataclasses import dataclass

from dms_jax.tasks.grid import cells
from dms_jax.tasks.haystack import Haystack
from dms_jax.tasks.problem import Problem, TaskOptions
from dms_jax.tasks.words import ADJECTIVES, NOUNS

DIGITS = 5


@dataclass(frozen=True)
class Needles:
    name: str
    num_keys: int = 1  # keys with one value each; the first is asked for
    num_values: int = 1  # values of the key that is asked for
    measures_answer: bool = True

    def problems(self, options: TaskOptions, count_tokens: Callable[[str], int]) -> list[Problem]:
        haystack = Haystack(options.haystack, self.name)
        found = []
        for cell in cells(self.name, options):
            keys = distinct(self.num_keys, cell.rng, lambda rng: f"{rng.choice(ADJECTIVES)} {rng.choice(NOUNS)}")
            values = distinct(
                self.num_keys + self.num_values - 1,
                cell.rng,
                lambda rng: str(rng.randrange(10 ** (DIGITS - 1), 10**DIGITS)),
            )
            asked, others = values[: self.num_values], values[self.num_values :]
            depths = [cell.depth, *(cell.rng.random() for _ in values[1:])]
            facts = [(keys[0], value) for value in asked] + list(zip(keys[1:], others, strict=True))
            needles = [(depth, self._needle(*pair)) for depth, pair in zip(depths, facts, strict=True)]
            prompt = haystack.prompt(
                needles, lambda text, key=keys[0]: self._frame(text, key), cell.length, count_tokens, cell.rng
            )
            answer = " " + ", ".join(sorted(asked, key=prompt.index))
            found.append(
                Problem(cell.unit, prompt, answer, options.max_new_tokens or 16 * self.num_values, groups=cell.groups)
            )
        return found

    def _needle(self, key: str, value: str) -> str:
        one = "One special" if self.num_values > 1 else "The special"
        return f"{one} magic number for the {key} is {value}."

    def _frame(self, text: str, key: str) -> str:
        end = f"The special magic number for the {key} mentioned in the text is"
        if self.num_values > 1:
            end = f"All {self.num_values} special magic numbers for the {key} mentioned in the text are"
        return f"Special magic numbers are hidden in the text below. Remember them.\n\n{text}\n\n{end}"

    def extract(self, text: str) -> str:
        """Return all numbers of the text, each once."""
        return ", ".join(dict.fromkeys(re.findall(r"\d+", text)))

    def score(self, problem: Problem, text: str) -> float:
        """Return the fraction of the reference numbers that the text names."""
        reference = problem.answer.strip().split(", ")
        return len(set(reference) & set(self.extract(text).split(", "))) / len(reference)


def distinct(count: int, rng: random.Random, draw: Callable[[random.Random], str]) -> list[str]:
    """Draw until there are `count` different values, in the order in which they came."""
    drawn: dict[str, None] = {}
    while len(drawn) < count:
        drawn[draw(rng)] = None
    return list(drawn)
