"""Word problems with worked solutions, for the maths of the default training text.

A template draws small numbers, and its solution computes with all of them, so that quantities from the statement are
needed again in the solution. Begin with `problem_sheets`.
"""

import itertools
import random
from collections.abc import Callable, Iterator
from typing import NamedTuple

from dms_jax.training.data import word_lists
from dms_jax.training.data.problem_templates import TEMPLATES, Template


class Exercise(NamedTuple):
    question: str
    solution: str  # ends with the answer


def exercise(rng: random.Random, template: Template) -> Exercise:
    numbers = {name: rng.randint(low, high) for name, (low, high) in template.ranges.items()}
    first, second, third = rng.sample(word_lists.GIVEN_NAMES, 3)
    thing = rng.choice(word_lists.THINGS)
    values = {**numbers, **template.derived(**numbers), "n": first, "m": second, "k": third, "thing": thing}
    values["town"] = rng.choice(word_lists.TOWNS)
    return Exercise(template.question.format(**values), template.solution.format(**values))


def problem_sheets(seed: int) -> Iterator[str | list[dict]]:
    """Yield endlessly many documents of four to ten exercises, as text or as the messages of a chat."""
    kinds: tuple[Callable[[random.Random, list[Exercise]], str | list[dict]], ...] = (
        _solutions_at_the_end,
        _chat,
        _solved_one_by_one,
        _stock_taking,
    )
    for number in itertools.count():
        rng = random.Random(f"{seed}/maths/{number}")
        templates = rng.sample(TEMPLATES, rng.randint(4, 10))
        yield kinds[number % len(kinds)](rng, [exercise(rng, template) for template in templates])


def _solutions_at_the_end(rng: random.Random, exercises: list[Exercise]) -> str:
    head, tail = rng.choice((("Exercises", "Solutions"), ("Homework", "Answers"), ("Test", "Marking scheme")))
    questions = "\n".join(f"{number}. {item.question}" for number, item in enumerate(exercises, 1))
    order = list(enumerate(exercises, 1))
    if rng.random() < 0.3:
        rng.shuffle(order)
    solutions = "\n".join(f"{number}. {item.solution}" for number, item in order)
    return f"{head}\n\n{questions}\n\n{tail}\n\n{solutions}"


def _solved_one_by_one(rng: random.Random, exercises: list[Exercise]) -> str:
    question, solution = rng.choice((("Problem", "Solution"), ("Question", "Answer"), ("Exercise", "Working")))
    return "\n\n".join(f"{question}: {item.question}\n{solution}: {item.solution}" for item in exercises)


def _chat(rng: random.Random, exercises: list[Exercise]) -> list[dict]:
    messages: list[dict] = []
    for item in exercises:
        messages += [{"role": "user", "content": item.question}, {"role": "assistant", "content": item.solution}]
    again = rng.choice(exercises[:-1])
    return messages + [
        {"role": "user", "content": f"Please explain this one again: {again.question}"},
        {"role": "assistant", "content": f"Of course. {again.solution}"},
    ]


def _stock_taking(rng: random.Random, exercises: list[Exercise]) -> str:
    """A long problem: the stock of a shop over some days, then the balance, which needs every number again.

    The exercises only set the number of days.
    """
    owner, things = rng.choice(word_lists.GIVEN_NAMES), rng.sample(word_lists.THINGS, rng.randint(4, 7))
    start = {thing: rng.randint(40, 400) for thing in things}
    sentences = [f"The shop of {owner} opens with the following stock."]
    sentences += [f"There are {count} pieces of the article {thing}." for thing, count in start.items()]
    changes: dict[str, list[int]] = {thing: [] for thing in things}
    for date in range(1, 2 * len(exercises) + 1):
        thing = rng.choice(things)
        left = start[thing] + sum(changes[thing])
        change = rng.choice((rng.randint(5, 90), -rng.randint(1, max(1, left // 2))))
        changes[thing].append(change)
        event = "are delivered" if change > 0 else "are sold"
        sentences.append(f"On day {date}, {abs(change)} pieces of the article {thing} {event}.")
    lines = []
    for thing in rng.sample(things, len(things)):
        terms = " ".join(f"{'+' if change > 0 else '-'} {abs(change)}" for change in changes[thing])
        total = start[thing] + sum(changes[thing])
        sum_shown = f"{start[thing]} {terms} = {total}" if terms else f"{total}, unchanged"
        lines.append(f"{thing}: {sum_shown}")
    return " ".join(sentences) + "\n\nHow much is left of each article? The balance is as follows.\n" + "\n".join(lines)
