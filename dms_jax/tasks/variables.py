"""Variable tracking of RULER (Hsieh et al., arXiv:2404.06654): which variables have a value that is passed on along a
chain?

    The text: ... VAR KLP = 52817. ... VAR ZRM = KLP. ... VAR QQA = ZRM. ...

    Variables with the value 52817:

The answer is " KLP, ZRM, QQA, ...", four names. Deviations from RULER: the text has a second chain with another value,
and wrong names lower the score, so that naming every variable does not pay. The first statement of the chain that is
asked for is at the given depth, and its other statements follow anywhere after it. A worked example precedes the text.
"""

import random
import re
from collections.abc import Callable
from dataclasses import dataclass

from dms_jax.tasks.grid import cells
from dms_jax.tasks.haystack import Haystack
from dms_jax.tasks.needles import distinct
from dms_jax.tasks.problem import Problem, TaskOptions

NUM_HOPS = 3  # a chain has one name more
LETTERS = "ABCDEFGHJKLMNPQRSTUVWXYZ"
EXAMPLE = (
    "Some variables are set in the text below. Remember them.\n\n"
    "For example, after VAR AXB = 31415. VAR QRT = AXB. VAR MNO = 27182.\n"
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
            names = distinct(2 * (NUM_HOPS + 1), cell.rng, _name)
            asked, other = names[: NUM_HOPS + 1], names[NUM_HOPS + 1 :]
            value, other_value = distinct(2, cell.rng, lambda rng: str(rng.randrange(10_000, 100_000)))
            depths = [cell.depth, *sorted(cell.rng.uniform(cell.depth, 1) for _ in range(NUM_HOPS))]
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
        """Return the names in the first line that is not blank, each once, in alphabetical order."""
        first = next((line for line in text.split("\n") if line.strip()), "")
        return ", ".join(sorted(set(re.findall(r"\b[A-Z]{3}\b", first)) - {"VAR"}))

    def score(self, problem: Problem, text: str) -> float:
        """Return the Jaccard index of the names in the reference and in the text."""
        reference = set(problem.answer.strip().split(", "))
        answer = set(self.extract(text).split(", ")) - {""}
        return len(reference & answer) / len(reference | answer)


def _name(rng: random.Random) -> str:
    while (name := "".join(rng.choices(LETTERS, k=3))) in ("VAR", "AXB", "QRT", "MNO"):  # names of the example
        pass
    return name


def _chain(names: list[str], value: str) -> list[str]:
    return [f"VAR {name} = {source}." for name, source in zip(names, [value, *names], strict=False)]


def _frame(text: str, value: str) -> str:
    return f"{EXAMPLE}The text: {text}\n\nVariables with the value {value}:"
