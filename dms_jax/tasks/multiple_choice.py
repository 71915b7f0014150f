r"""Multiple choice: GPQA-Diamond (Rein et al., arXiv:2311.12022), and files of the same kind.

A record has either the columns of the hub's dataset, "Question", "Correct Answer" and "Incorrect Answer 1" to "3",
whose order is drawn from (seed, unit); or {"question", "choices": [...], "answer": a letter, an index from 0, or the
choice itself}, whose order is kept.

    Which gas do plants take in for photosynthesis?

    A) oxygen
    B) carbon dioxide
    C) nitrogen

    Please reason step by step, and put the letter of the right choice within \boxed{}.

Texts like "... \boxed{B}", "The answer is (B)." and "B" score 1.
"""

import random
import re
from collections.abc import Callable
from dataclasses import dataclass

from dms_jax.errors import ConfigError, shown
from dms_jax.tasks.answer_form import normal_form
from dms_jax.tasks.answers import after_thinking, last_boxed
from dms_jax.tasks.problem import Problem, TaskOptions
from dms_jax.tasks.records import Record, chosen, read_records

LETTERS = "ABCDEFGHIJ"
REQUEST = "Please reason step by step, and put the letter of the right choice within \\boxed{}."
ANSWER_KEYS = ("Correct Answer", "Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3")


@dataclass(frozen=True)
class MultipleChoice:
    name: str = "gpqa"
    default_data: str = "hf:Idavidrein/gpqa:gpqa_diamond:train"  # the user must accept its license on the hub
    max_new_tokens: int = 4096
    measures_answer: bool = False

    def problems(self, options: TaskOptions, count_tokens: Callable[[str], int]) -> list[Problem]:
        return [
            self._problem(record, options)
            for record in chosen(read_records(options.data or self.default_data), options)
        ]

    def _problem(self, record: Record, options: TaskOptions) -> Problem:
        if "choices" in record.value:
            question, choices, right = record.text("question"), *_given(record)
        else:
            question, choices = record.text("Question"), [record.text(key).strip() for key in ANSWER_KEYS]
            order = random.Random(f"{options.seed}/{self.name}/{record.number}").sample(
                range(len(choices)), len(choices)
            )
            choices, right = [choices[i] for i in order], order.index(0)
        lines = "\n".join(f"{letter}) {choice}" for letter, choice in zip(LETTERS, choices, strict=False))
        prompt = f"{question.strip()}\n\n{lines}\n\n{REQUEST}"
        limit = options.max_new_tokens or self.max_new_tokens
        return Problem(
            str(record.number),
            prompt,
            LETTERS[right],
            limit,
            as_chat=True,
            groups=record.groups("High-level domain", "Subdomain", "subject"),
        )

    def extract(self, text: str) -> str:
        """Return the letter that is boxed, else the last one that is called the answer, else the one with which the
        text begins ("B", "B) red")."""
        text = after_thinking(text)
        boxed = last_boxed(text)
        if boxed is not None:
            found = re.match(r"\(?([A-J])(?![A-Za-z])", normal_form(boxed))
            return found[1] if found else ""
        stated = re.findall(r"(?i:\banswer\s*+(?:is\s*+:?|:|=))[\s*(]*+([A-J])(?![A-Za-z])", text)
        alone = re.match(r"\s*[*(]*([A-J])(?:[).:*]|\s*$)", text)
        return stated[-1] if stated else alone[1] if alone else ""

    def score(self, problem: Problem, text: str) -> float:
        return float(self.extract(text) == problem.answer)


def _given(record: Record) -> tuple[list[str], int]:
    """Return the choices of a record, and the index of the right one."""
    choices, answer = record.value["choices"], record.value.get("answer")
    if (
        not isinstance(choices, list)
        or not 2 <= len(choices) <= len(LETTERS)
        or not all(isinstance(choice, str) for choice in choices)
    ):
        raise ConfigError(
            f"{record.where}: `choices` must be a list of 2 to {len(LETTERS)} texts, got {shown(choices)}"
        )
    if isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(choices):
        return choices, answer
    if isinstance(answer, str) and choices.count(answer) == 1:
        return choices, choices.index(answer)
    if isinstance(answer, str) and len(answer.strip()) == 1 and answer.strip() in LETTERS[: len(choices)]:
        return choices, LETTERS.index(answer.strip())
    raise ConfigError(
        f"{record.where}: `answer` must be a letter from A to {LETTERS[len(choices) - 1]}, an index from 0, "
        f"or one of the choices; got {shown(answer)}"
    )
