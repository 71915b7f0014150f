"""Variable tracking of RULER (Hsieh et al., arXiv:2404.06654): which variables hold a value that was handed on along a chain?

A chain is VAR A = 12345, VAR B = A, VAR C = B, ... in this order, hidden in a text. Deviations: a second chain with another
value is there too, and the score counts names that are wrong, so that naming every variable is not right; the first statement of
the asked chain is at the given depth and the others anywhere behind it; a worked example stands before the text.
"""

import random
import re
from collections.abc import Callable
from dataclasses import dataclass

from dms_jax.tasks.grid import cells
from dms_jax.tasks.haystack import Haystack
from dms_jax.tasks.needles import distinct
from dms_jax.tasks.problem import Problem, TaskOptions

HOPS = 3  # a chain has one name more
LETTERS = "ABCDEFGHJKLMNPQRSTUVWXYZ"
EXAMPLE = (
    "Some variables are set in the text below. Remember them.\n\nFor example, after VAR AXB = 31415. VAR QRT = AXB. VAR MNO = 27182.\n"
    "Variables with the value 31415: AXB, QRT\n\n"
)


@dataclass(frozen=True)
class Variables:
    name: str = "variables"
    measures_answer: bool = True

    def problems(self, options: TaskOptions, count_tokens: Callable[[str], int]) -> list[Problem]:
        haystack = Haystack(options.haystack, self.name)
        found = []
        for cell in cells(self.name, options):
            names = distinct(2 * (HOPS + 1), cell.rng, _name)
            asked, other = names[: HOPS + 1], names[HOPS + 1 :]
            value, other_value = distinct(2, cell.rng, lambda rng: str(rng.randrange(10_000, 100_000)))
            depths = [cell.depth, *sorted(cell.rng.uniform(cell.depth, 1) for _ in range(HOPS))]
            needles = [*zip(depths, _chain(asked, value), strict=True)]
            needles += zip(sorted(cell.rng.random() for _ in other), _chain(other, other_value), strict=True)
            prompt = haystack.prompt(
                needles, lambda text, value=value: _frame(text, value), cell.length, count_tokens, cell.rng
            )
            answer = " " + ", ".join(asked)
            found.append(
                Problem(
                    cell.unit, prompt, answer, options.max_new_tokens or 40, stop_strings=("\n",), groups=cell.groups
                )
            )
        return found

    def extract(self, text: str) -> str:
        """The names in the first line that says something, each once, in the order of the alphabet."""
        first = next((line for line in text.split("\n") if line.strip()), "")
        return ", ".join(sorted(set(re.findall(r"\b[A-Z]{3}\b", first)) - {"VAR"}))

    def score(self, problem: Problem, text: str) -> float:
        """Names that are right, of all that were wanted or said."""
        wanted = set(problem.answer.strip().split(", "))
        said = set(self.extract(text).split(", ")) - {""}
        return len(wanted & said) / len(wanted | said)


def _name(rng: random.Random) -> str:
    while (name := "".join(rng.choices(LETTERS, k=3))) in ("VAR", "AXB", "QRT", "MNO"):  # the example's
        pass
    return name


def _chain(names: list[str], value: str) -> list[str]:
    return [f"VAR {name} = {source}." for name, source in zip(names, [value, *names], strict=False)]


def _frame(text: str, value: str) -> str:
    return f"{EXAMPLE}The text: {text}\n\nVariables with the value {value}:"
