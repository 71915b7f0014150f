"""Chats whose later turns need what was said in earlier ones, for the dialogue of the default training text.

Two kinds alternate: the user pastes passages and asks about them, also about earlier ones; and the user tells facts of
a private life, talks about other things, and asks for the facts. Begin with `chats`.
"""

import itertools
import random
from collections.abc import Iterator, Sequence

from dms_jax.training.data import word_lists
from dms_jax.training.data.passages import Passage
from dms_jax.training.data.problem_templates import TEMPLATES
from dms_jax.training.data.word_lists import digits, labels, listing, persons, telephone
from dms_jax.training.data.word_problems import exercise

REQUESTS = (
    "Please read this passage and answer a question about it.\n\n{p}\n\n{q}",
    "{p}\n\nBased on the text above: {q}",
    "Here is another text about {t}:\n\n{p}\n\n{q}",
    "I have a question about {t}. My notes say:\n\n{p}\n\n{q}",
)
FOLLOW_UPS = ("{q}", "Another question about the same text: {q}", "And {q}", "One more: {q}")
RETURNS = (
    "Back to an earlier text, the one about {t}. {q}",
    "Earlier I pasted something else. {q}",
    "I forgot to ask this about the first passages: {q}",
    "Do you remember this? {q}",
)
ANSWERS = (
    "{a}.",
    "The text says: {a}.",
    "According to the passage, it is {a}.",
    "The answer is {a}.",
    'It says "{a}".',
)
QUOTES = ('{a}. The passage puts it like this: "{s}"', '"{s}" So the answer is {a}.')
SYSTEM = (
    "You are a helpful assistant.",
    "Answer from the texts that the user gives you.",
    "You remember all that the user tells you in this conversation.",
)


def chats(passages: Sequence[Passage], seed: int) -> Iterator[list[dict]]:
    """Yield endlessly many chats, as lists of messages. Once the passages are used up, they are of the second kind."""
    remaining = iter([passage for passage in passages if passage.questions])
    for number in itertools.count():
        rng = random.Random(f"{seed}/chats/{number}")
        group = [] if number % 5 in (1, 3) else list(itertools.islice(remaining, rng.randint(2, 5)))
        yield _with_system(rng, reading(rng, group) if group else private_facts(rng))


def _with_system(rng: random.Random, messages: list[dict]) -> list[dict]:
    return [{"role": "system", "content": rng.choice(SYSTEM)}, *messages] if rng.random() < 0.5 else messages


def _turn(user: str, assistant: str) -> list[dict]:
    return [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]


def reading(rng: random.Random, passages: Sequence[Passage]) -> list[dict]:
    """Ask about each passage, then, after each later one, about those before it."""
    messages: list[dict] = []
    unasked = [list(passage.questions) for passage in passages]
    for number, passage in enumerate(passages):
        for turn in range(min(rng.randint(1, 3), len(unasked[number]))):
            question, answer = unasked[number].pop(0)
            form = rng.choice(FOLLOW_UPS if turn else REQUESTS)
            text = form.format(p=passage.text, t=passage.title, q=question)
            messages += _turn(text, _answered(rng, passage, answer))
        for _ in range(2 if number else 0):
            earlier = rng.randrange(number)
            if unasked[earlier]:
                question, answer = unasked[earlier].pop(0)
                text = rng.choice(RETURNS).format(t=passages[earlier].title, q=question)
                messages += _turn(text, _answered(rng, passages[earlier], answer))
    return messages


def _answered(rng: random.Random, passage: Passage, answer: str) -> str:
    sentence = next((sentence for sentence in passage.sentences if answer in sentence), "")
    quoted = sentence and len(sentence) < 300 and rng.random() < 0.5
    return rng.choice(QUOTES if quoted else ANSWERS).format(a=answer, s=sentence)


# What the user tells, and a question whose answer needs it. The words in braces are drawn in `_private_life`.
PRIVATE = (
    ("My name is {name}, by the way.", "What is my name?", "Your name is {name}."),
    (
        "I live in {town}, but I grew up in {home}.",
        "Where did I grow up?",
        "You grew up in {home}; now you live in {town}.",
    ),
    ("My sister {sister} works as {trade}.", "What does my sister do?", "Your sister {sister} works as {trade}."),
    ("My new telephone number is {phone}.", "Can you repeat my telephone number?", "Your telephone number is {phone}."),
    (
        "The code of our front door is {code}.",
        "What was the door code again?",
        "The code of your front door is {code}.",
    ),
    ("For {friend}'s birthday I bought {gift}.", "What did I buy for {friend}?", "You bought {gift}."),
    ("Our parrot is called {pet}.", "How is our parrot called?", "Your parrot is called {pet}."),
    ("I am allergic to {food}.", "What should I not eat?", "You are allergic to {food}."),
    ("The meeting with {boss} is on {date}.", "When do I meet {boss}?", "You meet {boss} on {date}."),
    (
        "My flight to {target} leaves from gate {gate}.",
        "Which gate do I need?",
        "Gate {gate}, for your flight to {target}.",
    ),
    (
        "The hotel in {target} booked me under {booking}.",
        "What is the booking number?",
        "The booking number is {booking}.",
    ),
    ("I lent my {gift2} to {friend}.", "Who has my {gift2}?", "{friend} has your {gift2}."),
    ("The project at work is called {project}.", "What is my project at work called?", "It is called {project}."),
    (
        "The plumber charged me {cost} dollars.",
        "How much did the plumber charge?",
        "The plumber charged you {cost} dollars.",
    ),
)
NOTED = ("Thank you, I will remember that.", "Noted.", "Good to know.", "I have made a note of it.", "All right.")
FOODS = ("cashews", "celery", "gluten", "hazelnuts", "lupins", "mustard", "oysters", "sesame", "shellfish", "soybeans")
SMALL_TALK = (
    ("What is a good way to start the day?", "Drink something warm, open a window, and write down the one task that "
     "matters most before you look at any message. Ten minutes without a screen help more than an hour of planning."),
    ("How do I keep herbs fresh?", "Cut the ends, stand the stems in a little liquid, cover the leaves loosely, and "
     "keep them cold. Change the liquid every other day, and remove leaves that turn yellow so that the rest lasts."),
    ("Can you explain what inflation is?", "Inflation means that prices rise on average, so that the same amount of "
     "money buys less than before. Statistical offices measure it by following the price of a fixed basket of goods."),
    ("Give me a tip for learning a language.", "Learn whole sentences instead of single words, repeat them after a "
     "day, three days and a week, and speak them aloud. Short daily practice beats one long session."),
    ("Why is the sky dark at night?", "The side of the planet on which we stand is turned away from its nearest star, "
     "and the light of all the others is too faint or has been shifted out of sight by the expansion of space."),
    ("What should I pack for a hike?", "Take layers of clothing, something to drink, food that does not melt, a paper "
     "plan of the route, a whistle and a small first aid kit. Tell somebody when you expect to be back."),
    ("How does a lever work?", "A lever turns around a fixed point. The longer the arm on which you push, the smaller "
     "the effort that balances a given load, because effort times arm is equal on both sides."),
    ("What makes bread rise?", "Yeast feeds on the starch of the flour and gives off carbon dioxide. The dough is "
     "elastic enough to hold the bubbles, and the heat of the oven sets them before they can escape."),
    ("Tell me how to sleep better.", "Go to bed at the same hour every day, keep the bedroom cool and dark, avoid "
     "caffeine after midday, and leave the telephone in another place. If you lie awake, get up and read for a while."),
    ("What is a prime example of teamwork?", "A rowing crew is one: eight people pull at exactly the same moment, and "
     "the fastest boat is not the one with the strongest rower but the one in which nobody breaks the rhythm."),
)  # fmt: skip


def private_facts(rng: random.Random) -> list[dict]:
    """Tell facts one by one between small talk, ask for them in another order, then for several at once."""
    life = _private_life(rng)
    facts = [tuple(text.format(**life) for text in fact) for fact in rng.sample(PRIVATE, rng.randint(5, 11))]
    exercises = (exercise(rng, template) for template in rng.sample(TEMPLATES, 6))
    talk = [*rng.sample(SMALL_TALK, 3), *((item.question, item.solution) for item in exercises)]
    rng.shuffle(talk)
    messages: list[dict] = []
    told: list[tuple] = []
    for fact in facts:
        question, answer = talk.pop() if talk and rng.random() < 0.6 else ("", "")
        messages += _turn(f"{fact[0]} {question}".strip(), f"{rng.choice(NOTED)} {answer}".strip())
        told.append(fact)
        if len(told) > 2 and rng.random() < 0.4:
            _, asked, reply = rng.choice(told[:-1])
            messages += _turn(asked, reply)
    for _, asked, reply in rng.sample(told, rng.randint(3, len(told))):
        messages += _turn(asked, reply)
    summary = " ".join(reply for _, _, reply in told)
    return messages + _turn(
        "Please repeat everything that you know about me, in the order in which I told it.", summary
    )


def _private_life(rng: random.Random) -> dict[str, str]:
    names = persons(rng, 6)
    home, town, target = rng.sample(word_lists.TOWNS, 3)
    gift, gift2, project = labels(rng, 3)
    return {
        "name": str(names[0]),
        "sister": names[1].given,
        "friend": names[2].given,
        "boss": str(names[3]),
        "pet": names[4].given,
        "home": home,
        "town": town,
        "target": target,
        "trade": word_lists.with_article(rng.choice(word_lists.TRADES)),
        "phone": telephone(rng),
        "code": digits(rng, 6),
        "booking": digits(rng, 7),
        "gift": word_lists.with_article(gift),
        "gift2": gift2,
        "project": project.title(),
        "food": listing(rng.sample(FOODS, 2)),
        "date": f"{rng.randint(1, 28)} {rng.choice(word_lists.MONTHS)}",
        "gate": f"{rng.choice('BCDEF')}{rng.randint(2, 78)}",
        "cost": digits(rng, 4),
    }
