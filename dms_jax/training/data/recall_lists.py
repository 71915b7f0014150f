"""Documents that list invented facts and use them again: directories, tables, copied lists and programs.

Each function draws one document of about `size` characters from its generator of random numbers.
"""

import json
import random
from collections.abc import Callable

from dms_jax.training.data import word_lists
from dms_jax.training.data.word_lists import code_word, digits, labels, listing, persons, price, telephone, unique_id

Draw = Callable[[random.Random], str]
# (title, name of one entry's value, value). The entries are people or things.
DIRECTORIES: tuple[tuple[str, str, Draw], ...] = (
    ("Staff telephone directory", "telephone number", telephone),
    ("Luggage deposit", "ticket", code_word),
    ("Warehouse stock by shelf mark", "shelf mark", code_word),
    ("Lost property register", "register entry", lambda rng: digits(rng, 6)),
    ("Membership roll", "member number", lambda rng: digits(rng, 7)),
    ("Home towns of the participants", "home town", lambda rng: rng.choice(word_lists.TOWNS)),
    ("Gifts, and who receives them", "gift", lambda rng: labels(rng, 1)[0]),
    ("Session identifiers", "session", unique_id),
    ("Prices at the flea stall", "price", price),
    ("Trades of the guild", "trade", lambda rng: rng.choice(word_lists.TRADES)),
    ("Extensions of the switchboard", "extension", lambda rng: digits(rng, 4)),
)
ENTRY_FORMS = ("{k} - {v}", "{k} = {v}", "{k} -> {v}", "* {k}: {v}", "{v}\t{k}", "{k}, {v}", "[{k}] {v}", "{k} ({v})")
QUERY_FORMS = (
    "What is the {what} of {k}? {v}",
    "{k}'s {what} is {v}.",
    "The {what} listed for {k} is {v}.",
    "Q: {k}, {what}?\nA: {v}",
    "Look up {k}: the {what} is {v}.",
)


def _keys(rng: random.Random, count: int) -> list[str]:
    return labels(rng, count) if rng.random() < 0.4 else [str(person) for person in persons(rng, count)]


def directory(rng: random.Random, size: int) -> str:
    """A list of keys with values, some of which are looked up afterwards, in another order and more than once."""
    title, what, draw = rng.choice(DIRECTORIES)
    entry_form, query_form = rng.choice(ENTRY_FORMS), rng.choice(QUERY_FORMS)
    probe = len(entry_form.format(k="Given Surname", v=draw(rng)))
    entries = {key: draw(rng) for key in _keys(rng, min(80, max(8, int(size * rng.uniform(0.25, 0.5)) // probe)))}
    if rng.random() < 0.15:
        text = f"{title} as JSON:\n\n{json.dumps(entries, indent=2, ensure_ascii=False)}\n\nLookups\n"
    else:
        lines = "\n".join(entry_form.format(k=key, v=value) for key, value in entries.items())
        text = f"{title}\n\n{lines}\n\nLookups\n"
    while len(text) < size:
        for key in rng.sample(list(entries), len(entries)):
            text += "\n" + query_form.format(k=key, v=entries[key], what=what)
            if len(text) >= size:
                break
    return text


COLUMNS: tuple[tuple[str, Draw], ...] = (
    ("town", lambda rng: rng.choice(word_lists.TOWNS)),
    ("trade", lambda rng: rng.choice(word_lists.TRADES)),
    ("age", lambda rng: str(rng.randint(19, 88))),
    ("telephone", telephone),
    ("balance", price),
    ("birthday", word_lists.day),
    ("contract", code_word),
    ("favorite object", lambda rng: labels(rng, 1)[0]),
)


def table(rng: random.Random, size: int) -> str:
    """A table of people, followed by sentences that need single cells, rows, or people who share a value."""
    columns = rng.sample(COLUMNS, rng.randint(2, 4))
    heads = ["name", *(name for name, _ in columns)]
    rows = [[str(person), *(draw(rng) for _, draw in columns)] for person in persons(rng, rng.randint(8, 26))]
    left, between, right = rng.choice((("| ", " | ", " |"), ("", ",", ""), ("", "\t", ""), ("", " ; ", "")))
    lines = [left + between.join(row) + right for row in [heads, *rows]]
    if left:
        lines.insert(1, "|" + "---|" * len(heads))
    text = "Records\n\n" + "\n".join(lines) + "\n\nNotes on the records\n"
    while len(text) < size:
        row, column = rng.choice(rows), rng.randrange(1, len(heads))
        form = rng.randrange(3)
        if form == 0:
            text += f"\nAccording to the records, the {heads[column]} of {row[0]} is {row[column]}."
        elif form == 1:
            facts = listing([f"{head} {cell}" for head, cell in zip(heads[1:], row[1:], strict=True)])
            text += f"\nThe whole entry of {row[0]}: {facts}."
        else:
            same = [other[0] for other in rows if other[column] == row[column]]
            text += f"\nWhose {heads[column]} is {row[column]}? It is that of {listing(same)}."
    return text


def copied_list(rng: random.Random, size: int) -> str:
    """A random sequence that is repeated in full, and then in parts."""
    draw: Draw = rng.choice(
        (
            lambda rng: rng.choice(word_lists.THINGS),
            lambda rng: rng.choice(word_lists.GIVEN_NAMES),
            lambda rng: labels(rng, 1)[0],
            code_word,
            lambda rng: digits(rng, rng.choice((4, 6))),
        )
    )
    between, items = rng.choice((", ", "\n", " / ", "; ")), [draw(rng)]
    while len(between.join(items)) < size * rng.uniform(0.3, 0.4):
        items.append(draw(rng))
    text = f"Dictation\n\n{between.join(items)}\n\nThe dictation once more:\n\n{between.join(items)}"
    while len(text) < size:
        start = rng.randrange(len(items))
        part = items[start : start + rng.randint(6, 24)]
        text += f"\n\nAn excerpt, starting with {part[0]}:\n{between.join(part)}"
    return text


def program(rng: random.Random, size: int) -> str:
    """A Python module that defines constants and functions and uses each of them far below."""
    things = rng.sample(word_lists.THINGS, 24)
    constants = {
        f"{rng.choice(word_lists.QUALITIES).replace('-', '_')}_{thing}".upper(): rng.choice(
            (digits(rng), f'"{code_word(rng)}"', f'"{rng.choice(word_lists.TOWNS)}"', f"{rng.randint(2, 999) / 8}")
        )
        for thing in things[: rng.randint(8, 14)]
    }
    functions = {f"{rng.choice(('pack', 'ship', 'weigh', 'mend', 'label'))}_{thing}": thing for thing in things[14:]}
    helper = dict(zip(functions, rng.sample(list(constants), min(len(functions), len(constants))), strict=False))
    text = f'"""Inventory of the {rng.choice(word_lists.TOWNS)} depot."""\n\n'
    text += "".join(f"{name} = {value}\n" for name, value in constants.items())
    for function, name in helper.items():
        thing = functions[function]
        text += (
            f"\n\ndef {function}(count, owner):\n"
            f'    """Return the entry for `count` pieces of the {thing} kind, marked with {name}."""\n'
            f'    entry = {{"{thing}": count, "owner": owner, "mark": {name}}}\n'
            f"    return entry\n"
        )
    text += "\n\ndef test_inventory():\n"
    while len(text) < size:
        if rng.random() < 0.4:
            name = rng.choice(list(constants))
            text += f"    assert {name} == {constants[name]}\n"
            continue
        function = rng.choice(list(helper))
        count, owner = rng.randint(2, 99), rng.choice(word_lists.GIVEN_NAMES)
        text += (
            f'    entry = {function}({count}, "{owner}")\n'
            f'    assert entry == {{"{functions[function]}": {count}, "owner": "{owner}", '
            f'"mark": {constants[helper[function]]}}}\n'
        )
    return text
