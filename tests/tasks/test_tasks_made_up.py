"""Tasks that generate their own problems: lengths, depths, determinism, and scores."""

import dataclasses
import re

import pytest

from dms_jax.errors import ConfigError
from dms_jax.tasks.grid import fill
from dms_jax.tasks.haystack import MAX_WORDS, sentences_of
from dms_jax.tasks.problem import TaskOptions
from dms_jax.tasks.registry import TASKS

HAY = " ".join(f"Sentence {chr(97 + i % 26)}{'lorem ipsum dolor ' * (i % 5)}ends here." for i in range(300))
MADE_UP = ("needle_single", "needle_multikey", "needle_multivalue", "variables", "copy", "recall")
IN_TEXT = MADE_UP[:4]
OPTIONS = TaskOptions(count=3, lengths=(300, 1000), depths=(0.0, 0.3, 1.0), haystack=HAY)
TOKENIZERS = {
    "words": lambda text: len(text.split()),
    "characters": lambda text: 1 + len(text) // 3,
    "joins": lambda text: len(re.findall(r"\w+|\W+", text)),
}


def made(name, options=OPTIONS, tokenizer="words"):
    return TASKS[name].problems(options, TOKENIZERS[tokenizer])


def test_registry_holds_every_task():
    assert list(TASKS) == [*MADE_UP, "gsm8k", "math500", "aime24", "aime25", "gpqa", "humaneval", "code"]
    assert all(TASKS[name].name == name for name in TASKS)
    assert [name for name in TASKS if TASKS[name].measures_answer] == list(MADE_UP)


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
@pytest.mark.parametrize("name", MADE_UP)
def test_prompts_fill_their_length_and_never_more(name, tokenizer):
    longest_step = {"words": MAX_WORDS, "characters": 100, "joins": 2 * MAX_WORDS}[tokenizer]
    for problem in made(name, tokenizer=tokenizer):
        tokens = TOKENIZERS[tokenizer](problem.prompt)
        assert problem.groups["length"] - longest_step < tokens <= problem.groups["length"]


@pytest.mark.parametrize("name", MADE_UP)
def test_units_are_unique_and_problems_depend_on_seed_and_unit_only(name):
    problems = {problem.unit: problem for problem in made(name)}
    assert len(problems) == 2 * 3 * 3 and "1000/0.3/2" in problems
    assert len({problem.prompt for problem in problems.values()}) == len(problems)
    fewer = made(name, dataclasses.replace(OPTIONS, count=1, lengths=(1000, 1000), depths=(1.0, 0.3)))
    assert [problem.unit for problem in fewer] == ["1000/1/0", "1000/0.3/0"]
    assert all(problem == problems[problem.unit] for problem in fewer)
    other = made(name, dataclasses.replace(OPTIONS, seed=1))
    assert not {problem.prompt for problem in other} & {problem.prompt for problem in problems.values()}


@pytest.mark.parametrize("name", MADE_UP)
def test_reference_scores_one_and_an_empty_answer_zero(name):
    task = TASKS[name]
    for problem in made(name):
        assert task.score(problem, problem.answer) == 1
        assert task.score(problem, "") == task.score(problem, " I do not know, zebra 1.") == 0
        assert problem.answer.startswith(" ") and not problem.prompt.endswith(" ")
        assert not problem.as_chat and 0 < problem.max_new_tokens <= 64


@pytest.mark.parametrize("name", MADE_UP)
def test_max_new_tokens_can_be_set(name):
    assert {problem.max_new_tokens for problem in made(name, dataclasses.replace(OPTIONS, max_new_tokens=5))} == {5}


def sentences_around(prompt, needle):
    """Sentences of the haystack before the needle, and all of them."""
    before, after = prompt.split(needle)
    return before.count("ends here."), before.count("ends here.") + after.count("ends here.")


def test_needle_occurs_once_at_its_depth():
    for problem in made("needle_single"):
        needle = re.search(r"The special magic number for the \w+ \w+ is (\d{5})\.", problem.prompt)
        assert problem.answer == f" {needle[1]}" and problem.prompt.count(needle[1]) == 1
        before, all_of_them = sentences_around(problem.prompt, needle[0])
        assert before == round(problem.groups["depth"] * all_of_them)
        assert problem.prompt.endswith(needle[0].split(" is ")[0] + " mentioned in the text is")


def test_multikey_asks_for_one_of_several_keys():
    for problem in made("needle_multikey"):
        stated = dict(re.findall(r"number for the (\w+ \w+) is (\d{5})\.", problem.prompt))
        asked = re.search(r"number for the (\w+ \w+) mentioned in the text is$", problem.prompt)[1]
        assert len(stated) == len(set(stated.values())) == 4 and problem.answer == f" {stated[asked]}"
        others = re.compile(r"The special magic number for the (?!" + asked + r")\w+ \w+ is \d{5}\. ?")
        before, all_of_them = sentences_around(
            others.sub("", problem.prompt), f"The special magic number for the {asked} is {stated[asked]}."
        )
        assert before == round(problem.groups["depth"] * all_of_them)
        wrong = next(value for key, value in stated.items() if key != asked)
        assert TASKS["needle_multikey"].score(problem, wrong) == 0


def test_multivalue_counts_each_value_of_one_key():
    for problem in made("needle_multivalue"):
        values = re.findall(r"One special magic number for the \w+ \w+ is (\d{5})\.", problem.prompt)
        assert problem.answer == " " + ", ".join(values) and len(set(values)) == 4
        score = TASKS["needle_multivalue"].score
        assert score(problem, f"{values[2]} and 7 and {values[0]}, {values[0]}") == 0.5
        assert score(problem, values[3] + values[2]) == 0  # ten digits are another number


def test_variables_get_their_value_along_a_chain():
    for problem in made("variables"):
        text = problem.prompt.split("The text:")[1]
        value = re.search(r"Variables with the value (\d{5}):$", problem.prompt)[1]
        held, order = {}, []
        for name, source in re.findall(r"VAR (\w+) = (\w+)\.", text):
            assert source.isdigit() or source in held  # no name is used before it is set
            held[name] = source if source.isdigit() else held[source]
            order.append(name)
        right = [name for name in order if held[name] == value]
        assert len(held) == 8 and problem.answer == " " + ", ".join(right) and len(right) == 4
        score = TASKS["variables"].score
        assert score(problem, f" {right[1]}, {right[0]}\n{right[2]}") == 0.5
        assert score(problem, ", ".join(held)) == 0.5  # all names: half of them are wrong
        first = f"VAR {right[0]} = {value}."
        chains = re.compile(r"VAR (?!" + right[0] + r")\w+ = \w+\. ?")
        before, all_of_them = sentences_around(chains.sub("", problem.prompt), first)
        assert before == round(problem.groups["depth"] * all_of_them)


def test_copied_words_follow_their_cue():
    for problem in made("copy"):
        shown, cue = re.fullmatch(
            r"A list of words: (.*)\n\nA part of the same list again: (.*)", problem.prompt
        ).groups()
        assert shown.count(cue + problem.answer) == 1 and shown.count(cue) == 1
        start = len(shown.split(cue)[0].split())
        assert start == round(problem.groups["depth"] * (len(shown.split()) - 13))
        words = problem.answer.split()
        assert len(words) == 8
        assert TASKS["copy"].score(problem, " ".join([*words[:6], "wrong", words[7]])) == 7 / 8
        assert TASKS["copy"].score(problem, " ".join(words[1:])) < 0.5  # each at its place


def test_recall_asks_for_a_line_of_the_list():
    for problem in made("recall"):
        pairs = re.findall(r"^(\w+ \w+): (\w+)$", problem.prompt, re.MULTILINE)
        asked = problem.prompt.split("\n")[-1].removesuffix(":")
        assert len(dict(pairs)) == len(pairs) and problem.answer == f" {dict(pairs)[asked]}"
        assert pairs.index((asked, dict(pairs)[asked])) == round(problem.groups["depth"] * (len(pairs) - 1))
        assert TASKS["recall"].score(problem, f" {problem.answer.upper()}\nmore: words") == 1


@pytest.mark.parametrize("name", IN_TEXT)
def test_haystack_is_required(name):
    for text in ("", " \n "):
        with pytest.raises(ConfigError, match="--haystack FILE"):
            made(name, dataclasses.replace(OPTIONS, haystack=text))


@pytest.mark.parametrize("name", MADE_UP)
def test_too_short_a_length_names_the_shortest(name):
    with pytest.raises(ConfigError, match=r"--lengths.* \d+, .*got 10") as error:
        made(name, dataclasses.replace(OPTIONS, lengths=(10,), count=1))
    enough = int(re.search(r"--lengths\D* (\d+)", str(error.value))[1])
    assert made(name, dataclasses.replace(OPTIONS, lengths=(enough,), count=1, depths=(0.0,)))


def test_depths_and_counts_are_checked():
    for depth in (-0.1, 1.5, float("nan")):
        with pytest.raises(ConfigError, match="--depths"):
            made("recall", dataclasses.replace(OPTIONS, depths=(depth,)))
    with pytest.raises(ConfigError, match="--count"):
        made("recall", dataclasses.replace(OPTIONS, count=0))


def test_recall_has_a_limited_number_of_keys():
    with pytest.raises(ConfigError, match="recall: .*1000000"):
        made("recall", dataclasses.replace(OPTIONS, lengths=(1_000_000,), count=1, depths=(0.0,)))


def test_haystack_is_cut_at_the_ends_of_sentences():
    text = 'He said "no." Then\nhe left! (Really?) Yes\n\nA title\n\n' + "word " * (MAX_WORDS + 1)
    assert sentences_of(text, "t")[:5] == ['He said "no."', "Then he left!", "(Really?)", "Yes", "A title"]
    assert [len(sentence.split()) for sentence in sentences_of(text, "t")[5:]] == [MAX_WORDS, 1]


GROWTHS = {
    "even": lambda n: n,
    "framed": lambda n: 3 + 7 * n,
    "faster": lambda n: 1 + n * n // 50,
    "steps": lambda n: 1 + 5 * (n // 30),
    "a leap": lambda n: n + 900 * (n > 800),
}


@pytest.mark.parametrize("growth", GROWTHS)
@pytest.mark.parametrize("length", [3, 29, 800, 801, 5000])
def test_fill_finds_the_largest_count_that_fits(growth, length):
    tokens_of = GROWTHS[growth]
    count = fill(lambda n: "x" * n, length, lambda text: tokens_of(len(text)), "t")
    assert tokens_of(count) <= length < tokens_of(count + 1)
