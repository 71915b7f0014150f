"""Invented lives, told twice: a document introduces several people and comes back to all their facts."""

import random

from dms_jax.training.data import word_lists
from dms_jax.training.data.word_lists import Person, labels, listing, persons

INTRODUCTIONS = (
    "{n}, {a_trade} from {home}, was born on {born}. {g} grew up in {home} with {friend}, and both left for {city} in "
    "{year}. There {g} founded the company {firm}, which made the {work} famous.",
    "{n} was born on {born} in {home}. After an apprenticeship as {a_trade}, {g} settled in {city}, where {friend} "
    "joined the company {firm} in {year}. Its best known piece is the {work}.",
    "The {trade} {n} (born on {born} in {home}) is known for the {work}. {g} made it in {year} in {city}, in the "
    "workshop of {firm}, together with {friend}.",
)
RETURNS = (
    "Years later, {g} {s} went back to {home} and left the house in {city} to {friend}.",
    "When {firm} closed, {friend} kept the {work}, since {g} no longer wanted it.",
    "The museum of {city} asked {g} {s} for the {work}, but {firm} had sold it long before.",
    "A street in {home} bears the name of {n}; the plaque gives {born} as the date of birth.",
    "In a letter from {city}, {friend} describes how {g} carried the {work} through the rain in {year}.",
    "{firm} was named after the street in {home} where {g} and {friend} had met.",
    "Every visitor to {firm} was shown the {work} first, and {g} told the story of {year} again.",
    "Critics compared the {work} of {g} {s} with older pieces from {home}, which annoyed {friend}.",
)
QUESTIONS = (
    ("Who is known for the {work}?", "{n}"),
    ("Where was {n} born?", "In {home}"),
    ("When was {n} born?", "On {born}"),
    ("Which company did {n} belong to?", "{firm}"),
    ("Who was the companion of {n}?", "{friend}"),
    ("What was the trade of {n}?", "{n} was {a_trade}"),
    ("To which city did {n} move?", "{city}"),
    ("In which year did {g} {s} come to {city}?", "In {year}"),
    ("What is the best known work of {n}?", "The {work}"),
)


def biographies(rng: random.Random, size: int) -> str:
    """Tell the lives of two to six people in turns, then answer questions about them; about `size` characters."""
    people = persons(rng, 12)
    lives = [_life(rng, *pair) for pair in zip(people[: max(2, min(6, size // 1_800))], people[6:], strict=False)]
    paragraphs = [rng.choice(INTRODUCTIONS).format(**life) for life in lives]
    while sum(map(len, paragraphs)) < size * 0.7:
        life = rng.choice(lives)
        paragraphs.append(" ".join(form.format(**life) for form in rng.sample(RETURNS, rng.randint(2, 3))))
    asked = []
    while sum(map(len, paragraphs)) + sum(map(len, asked)) < size:
        life, (question, answer) = rng.choice(lives), rng.choice(QUESTIONS)
        asked.append(f"Question: {question.format(**life)}\nAnswer: {answer.format(**life)}")
    names = listing([life["n"] for life in lives])
    return "\n\n".join([f"The lives of {names}", *paragraphs, "\n".join(asked)])


def _life(rng: random.Random, person: Person, friend: Person) -> dict[str, str]:
    home, city = rng.sample(word_lists.TOWNS, 2)
    trade = rng.choice(word_lists.TRADES)
    born = rng.randint(1840, 1980)
    return {
        "n": str(person),
        "g": person.given,
        "s": person.surname,
        "friend": str(friend),
        "home": home,
        "city": city,
        "born": f"{rng.randint(1, 28)} {rng.choice(word_lists.MONTHS)} {born}",
        "trade": trade,
        "a_trade": word_lists.with_article(trade),
        "year": str(born + rng.randint(19, 44)),
        "firm": f"{rng.choice(word_lists.SURNAMES)} & {rng.choice(word_lists.SURNAMES)}",
        "work": labels(rng, 1)[0].title(),
    }
