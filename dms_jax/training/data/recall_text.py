"""Documents in which facts are stated once and needed again some hundred tokens later.

A short retrofit learns from them which pairs must stay in the cache: plain text rarely asks for a single number or name
that it mentioned long ago. The kinds of documents are those of the evaluation tasks (`dms_jax.tasks`), in other words:
facts hidden in prose, several values of one key, chains of assignments, lists, tables, copies, programs and invented
biographies. Begin with `recall_documents`.
"""

import itertools
import random
from collections.abc import Iterator, Sequence

from dms_jax.tasks.needles import distinct
from dms_jax.training.data import word_lists
from dms_jax.training.data.biographies import biographies
from dms_jax.training.data.recall_lists import copied_list, directory, program, table
from dms_jax.training.data.word_lists import code_word, digits, labels, listing, persons, telephone, unique_id

# Characters of a document, 600 to 3000 tokens: numbers and codes have more tokens per character than prose.
PROSE_SIZES, LIST_SIZES = (2_600, 10_000), (1_400, 6_500)
DISTANCES = (700, 3_600)  # characters from a fact to its next use, about 170 to 850 tokens
PARAGRAPH = 5  # sentences
# (statement, question, answer) with the key {k}, a person, and the value {v} of the kind below it.
RELATIONS = (
    ("{k} wrote {v} on the lid of the trunk.", "What did {k} write on the lid of the trunk?", "{v}"),
    ("The combination that {k} uses for the vault is {v}.", "Which combination does {k} use for the vault?", "{v}"),
    ("The parcel for {k} carries the tracking code {v}.", "Which tracking code does the parcel for {k} carry?", "{v}"),
    ("Anyone who needs {k} should dial {v}.", "What should one dial to reach {k}?", "{v}"),
    ("{k} registered the boat under {v}.", "Under what did {k} register the boat?", "{v}"),
    ("In the ledger, {k} appears as entry {v}.", "As which entry does {k} appear in the ledger?", "{v}"),
    ("{k} lodged the complaint that is filed as {v}.", "How is the complaint of {k} filed?", "It is filed as {v}"),
)
NAMED_RELATIONS = (
    ("{k} moved to {t} after the flood.", "Where did {k} move after the flood?", "{t}"),
    ("{k} bought {l} at the auction.", "What did {k} buy at the auction?", "It was {l}"),
    ("{k} studied with {p} for two years.", "With whom did {k} study for two years?", "{p}"),
    ("{k} was born on {d}.", "When was {k} born?", "On {d}"),
    ("{k} hid the will inside {l}.", "Where did {k} hide the will?", "Inside {l}"),
    ("{k} borrowed the keys from {p}.", "From whom did {k} borrow the keys?", "From {p}"),
    ("{k} has worked as {o} in {t} ever since.", "What does {k} do, and where?", "{k} is {o} in {t}"),
)
QUESTION_FORMS = (
    "Question: {q}\nAnswer: {a}.",
    "Q: {q}\nA: {a}",
    "{q} {a}.",
    '"{q}" - "{a}."',
    "{q}\n{a}",
    "Reader, do you remember? {q} {a}.",
)


def recall_documents(sentences: Sequence[str], seed: int) -> Iterator[str]:
    """Yield endlessly many documents.

    `sentences`: prose in which facts are hidden, used in order and from the start again.
    """
    filler = itertools.cycle(sentences)
    for number in itertools.count():
        rng = random.Random(f"{seed}/recall/{number}")
        turn = number % (len(IN_PROSE) + len(LISTS))
        if turn < len(IN_PROSE):
            yield IN_PROSE[turn](rng, rng.randint(*PROSE_SIZES), filler)
        else:
            yield LISTS[turn - len(IN_PROSE)](rng, rng.randint(*LIST_SIZES))


def woven(
    rng: random.Random, size: int, filler: Iterator[str], facts: Sequence[tuple[str, str]], repeats: int = 2
) -> str:
    """Hide facts in prose and come back to each of them at most `repeats` times, at random distances.

    Args:
      size: length in characters up to the last fact; the questions that are due later follow at the end.
      facts: (statement, question with its answer, or "" to ask nothing).
    """
    events: list[tuple[float, int, str]] = []
    for order, (statement, question) in enumerate(facts):
        place = rng.uniform(0, 0.75) * size
        events.append((place, order, statement))
        for _ in range(rng.randint(1, repeats) if question else 0):
            place += rng.uniform(*DISTANCES)
            events.append((min(place, size), order, "\n\n" + question + "\n\n"))
    parts: list[str] = []
    written = 0
    for place, _, text in sorted(events, key=lambda event: event[0]):
        while written < place:
            parts.append(next(filler) + ("\n\n" if len(parts) % PARAGRAPH == PARAGRAPH - 1 else ""))
            written += len(parts[-1]) + 1
        parts.append(text)
        written += len(text)
    text = "".join(part if part.endswith("\n") else part + " " for part in parts)
    return "\n\n".join(paragraph.strip() for paragraph in text.split("\n\n") if paragraph.strip())


def _asked(rng: random.Random, question: str, answer: str) -> str:
    return rng.choice(QUESTION_FORMS).format(q=question, a=answer)


def hidden_facts(rng: random.Random, size: int, filler: Iterator[str]) -> str:
    """Facts about a few people in prose, each asked for later."""
    people = persons(rng, 24)
    facts = []
    for person, other in zip(people[: max(3, size // 900)], reversed(people), strict=False):
        values = {
            "k": str(person),
            "p": str(other),
            "v": rng.choice((digits, digits, code_word, unique_id, telephone))(rng),
            "t": rng.choice(word_lists.TOWNS),
            "l": word_lists.with_article(labels(rng, 1)[0]),
            "d": word_lists.day(rng),
            "o": word_lists.with_article(rng.choice(word_lists.TRADES)),
        }
        statement, question, answer = rng.choice(RELATIONS if rng.random() < 0.55 else NAMED_RELATIONS)
        facts.append((statement.format(**values), _asked(rng, question.format(**values), answer.format(**values))))
    return woven(rng, size, filler, facts)


def several_values(rng: random.Random, size: int, filler: Iterator[str]) -> str:
    """Several values of each key, scattered over prose, then collected in order."""
    blocks = []
    for person in persons(rng, max(1, size // 4_000)):
        values = distinct(rng.randint(3, 5), rng, digits)
        what = rng.choice(("medal", "lottery ticket", "library card", "invoice", "seed packet"))
        text = woven(
            rng,
            min(size, 3_400),
            filler,
            [(f"Among other things, {person} owns the {what} numbered {value}.", "") for value in values],
        )
        order = sorted(values, key=lambda value: text.index(f"numbered {value}."))
        question = f"Which numbers does each {what} of {person} carry, in the order of the text?"
        blocks.append(f"{text}\n\n{_asked(rng, question, listing(order))}")
    return "\n\n".join(blocks)


def assignments(rng: random.Random, size: int, filler: Iterator[str]) -> str:
    """Chains of containers that take over each other's number, in prose, and questions about the end of a chain."""
    names = iter(rng.sample([f"{thing} {letter}" for thing in word_lists.THINGS[::7] for letter in "BCDFGH"], 40))
    facts = []
    for _ in range(max(2, size // 2_500)):
        value, chain = digits(rng), [next(names) for _ in range(rng.randint(2, 4))]
        steps = [f"The counter of {chain[0]} is set to {value}."]
        steps += [f"The counter of {new} is set to that of {old}." for old, new in itertools.pairwise(chain)]
        trail = ", which has it from ".join(reversed(chain))
        question = _asked(rng, f"What does the counter of {chain[-1]} show?", value)
        facts.append((" ".join(steps), f"{question}\n{trail}. Counters that show {value}: {listing(chain)}."))
    return woven(rng, size, filler, facts)


def copied_prose(rng: random.Random, size: int, filler: Iterator[str]) -> str:
    """A passage that is quoted again word for word, in full and sentence by sentence."""
    passage: list[str] = []
    limit = rng.randint(700, 2_600)
    while sum(map(len, passage)) < limit:
        passage.append(next(filler))
    text = f"The original text:\n\n{' '.join(passage)}\n\nA faithful copy of it:\n\n{' '.join(passage)}"
    for number in rng.sample(range(len(passage)), min(len(passage), 3)):
        text += f"\n\nSentence {number + 1} of it reads: {passage[number]}"
    return text


# The kinds of documents, which take turns.
IN_PROSE = (hidden_facts, several_values, assignments, hidden_facts, copied_prose)
LISTS = (directory, table, biographies, directory, copied_list, program, biographies)
