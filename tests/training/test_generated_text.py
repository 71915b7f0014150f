"""The generated training text: the same for one seed, correct, full of facts that recur, and unlike the evaluations."""

import itertools
import json
import random
import re

import pytest

from dms_jax.tasks.words import ADJECTIVES, NOUNS
from dms_jax.training.data import recall_lists, word_lists
from dms_jax.training.data.biographies import biographies
from dms_jax.training.data.default_chats import chats, private_facts, reading
from dms_jax.training.data.passages import MAX_QUESTIONS, encyclopaedia, passages_of
from dms_jax.training.data.problem_templates import TEMPLATES
from dms_jax.training.data.recall_text import (
    IN_PROSE,
    LISTS,
    assignments,
    hidden_facts,
    recall_documents,
    several_values,
)
from dms_jax.training.data.word_problems import exercise, problem_sheets

SENTENCES = [f"Sentence {i} of the haystack tells nothing that anybody needs to know." for i in range(50)]
ARTICLE = {
    "title": "The_Moon",
    "paragraphs": [
        {
            "context": f"Paragraph {i} begins. Its fact is F{i}x{0}, F{i}x{1}, F{i}x{2} and F{i}x{3}. It ends.",
            "qas": [{"question": f" What is {i}, {j}? ", "answers": [{"text": f"F{i}x{j}"}]} for j in range(4)]
            + [{"question": "Unanswerable?", "answers": []}],
        }
        for i in range(30)
    ],
}
PASSAGES = passages_of(ARTICLE)
SEEDS = range(20)
# A whole sum with its result, such as "2 * (3 + 9) = 24"; not a part of one, and not an equation with a letter.
SUM = r"(?<![\w.(*+/-])(?<![*+/-] )(\(?[\d.]+\)?(?: [-+*/] \(?[\d.]+\)?)+) = ([\d.]*\d)(?!\w| [-+*/])"
GENERATORS = {
    "recall": lambda seed: recall_documents(SENTENCES, seed),
    "maths": problem_sheets,
    "chats": lambda seed: chats(PASSAGES, seed),
    "encyclopaedia": lambda seed: encyclopaedia([PASSAGES], seed),
}


def drawn(name: str, seed: int = 0, count: int = 60) -> list[str]:
    documents = itertools.islice(GENERATORS[name](seed), count)
    return [item if isinstance(item, str) else json.dumps(item, ensure_ascii=False) for item in documents]


def filler():
    return itertools.cycle(SENTENCES)


@pytest.mark.parametrize("name", GENERATORS)
def test_generated_text_is_a_function_of_its_seed(name):
    assert drawn(name) == drawn(name) != drawn(name, seed=1)
    assert all(item.strip() for item in drawn(name))


def test_no_word_is_shared_with_the_evaluation_tasks():
    lists = [value for value in vars(word_lists).values() if isinstance(value, tuple) and isinstance(value[0], str)]
    assert len(lists) == 7 and all(len(set(words)) == len(words) for words in lists)
    assert not {word.lower() for words in lists for word in words} & {*ADJECTIVES, *NOUNS}


def test_no_number_is_in_the_range_of_the_evaluation_tasks():
    rng = random.Random(0)
    assert not [value for _ in range(2000) if len(value := word_lists.digits(rng)) == 5]


def test_no_phrase_is_shared_with_the_evaluation_tasks():
    phrases = r"magic number|a name and its word|same names again|same list again|list of words|\bVAR\b|with the value"
    assert not [item for name in GENERATORS for item in drawn(name) if re.search(phrases, item, re.IGNORECASE)]


@pytest.mark.parametrize("template", TEMPLATES, ids=lambda template: template.question[:30])
def test_solution_computes_right_and_uses_the_numbers_of_its_question(template):
    for seed in SEEDS:
        item = exercise(random.Random(seed), template)
        solution = item.solution.replace("$", "")
        sums = re.findall(SUM, solution)
        for left, right in sums:
            assert eval(left) == pytest.approx(float(right), abs=1e-9), (left, right)  # digits and operators only
        assert sums, item
        missing = set(re.findall(r"\d+", item.question)) - set(re.findall(r"\d+", item.solution))
        assert len(missing) <= 1, (item, missing)  # a count that the words repeat, such as the hour of a rate


def test_stock_taking_adds_up():
    for text in drawn("maths", count=40)[3::4]:
        stock = {thing: int(count) for count, thing in re.findall(r"are (\d+) pieces of the article (\w+)", text)}
        for count, thing, event in re.findall(r"(\d+) pieces of the article (\w+) are (\w+)", text):
            stock[thing] += int(count) if event == "delivered" else -int(count)
        shown = dict(re.findall(r"^(\w+): .*?(\d+)(?:, unchanged)?$", text, re.MULTILINE))
        assert {thing: int(count) for thing, count in shown.items()} == stock and min(stock.values()) >= 0


def test_encyclopaedia_has_every_paragraph_once_and_asks_only_about_earlier_ones():
    (text,) = encyclopaedia([PASSAGES], 0)
    assert text.startswith("The Moon\n\nParagraph 0")
    places = [text.index(passage.text) for passage in PASSAGES]
    assert places == sorted(places) and all(text.count(passage.text) == 1 for passage in PASSAGES)
    asked = [
        (found.start(), int(found[1])) for found in re.finditer(r"Question: What is (\d+), \d\?\nAnswer: F\1x", text)
    ]
    assert len(asked) == len(set(re.findall(r"Question: .*", text))) > 60
    behind = [sum(place < at for place in places) - number for at, number in asked]
    assert min(behind) >= 1 and max(behind) <= 12 and sum(distance > 4 for distance in behind) > len(asked) // 10


def test_passages_leave_out_questions_without_an_answer():
    assert [len(passage.questions) for passage in PASSAGES] == [4] * 30 and MAX_QUESTIONS >= 4
    assert PASSAGES[1].questions[0] == ("What is 1, 0?", "F1x0")


def test_readings_ask_about_earlier_passages():
    returns = 0
    for seed in SEEDS:
        messages, seen = reading(random.Random(seed), PASSAGES[:4]), ""
        assert [message["role"] for message in messages] == ["user", "assistant"] * (len(messages) // 2)
        for user, assistant in zip(messages[::2], messages[1::2], strict=True):
            seen += user["content"]
            paragraph = int(re.search(r"What is (\d+)", user["content"])[1])
            assert f"F{paragraph}x" in assistant["content"] and PASSAGES[paragraph].text in seen
            returns += PASSAGES[paragraph].text not in user["content"] and f"Paragraph {paragraph + 1}" in seen
    assert returns > 3 * len(SEEDS)


def test_private_facts_are_told_before_they_are_asked_for():
    for seed in SEEDS:
        messages = private_facts(random.Random(seed))
        told = " ".join(message["content"] for message in messages if message["role"] == "user")
        summary = messages[-1]["content"]
        assert len(summary.split(". ")) >= 5
        for word in re.findall(r"\b[A-Z]\d+|\d{4,}|\d+-\d+-\d+", summary):  # gates, codes and telephone numbers
            assert word in told


@pytest.mark.parametrize("make", [hidden_facts, assignments, several_values])
def test_facts_in_prose_come_back_after_their_statement(make):
    for seed in SEEDS:
        text = make(random.Random(seed), 6_000, filler())
        values = re.findall(r"\b\d{4}\b|\b\d{6,7}\b", text)
        assert 2 * len(set(values)) <= len(values)


def test_facts_come_back_at_varied_distances():
    distances = []
    for seed in SEEDS:
        text = assignments(random.Random(seed), 9_000, filler())
        for value in set(re.findall(r"is set to (\d+)\.", text)):
            distances.append(text.rindex(value) - text.index(f"is set to {value}"))
    assert min(distances) < 2_500 and max(distances) > 4_000


@pytest.mark.parametrize("make", [recall_lists.directory, recall_lists.table, recall_lists.copied_list, biographies])
def test_lists_repeat_what_they_state_and_keep_to_their_size(make):
    for seed in SEEDS:
        text = make(random.Random(seed), 5_000)
        assert 5_000 <= len(text) < 6_500
        half = set(re.findall(r"[\w-]{4,}", text[: len(text) // 3]))
        again = set(re.findall(r"[\w-]{4,}", text[len(text) // 3 :]))
        assert len(half & again) > len(half) // 3


def test_programs_run_and_their_assertions_hold():
    for seed in SEEDS:
        text, names = recall_lists.program(random.Random(seed), 4_000), {}
        exec(compile(text, "program", "exec"), names)
        names["test_inventory"]()


def test_all_kinds_of_recall_take_turns():
    count = len(IN_PROSE) + len(LISTS)
    documents = list(itertools.islice(recall_documents(SENTENCES, 0), count))
    assert len(set(documents)) == count and all(1_300 < len(item) < 18_000 for item in documents)
