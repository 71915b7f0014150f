"""Tasks that read their problems: GSM8K, MATH, AIME, GPQA. An error in a file is one line that names the place."""

import gzip
import json
import sys
import types

import pytest

from dms_jax.errors import ConfigError
from dms_jax.tasks.problem import TaskOptions
from dms_jax.tasks.registry import TASKS

GSM8K = [{"question": f"What is {n} + 1000?", "answer": f"Add <<{n}+1000>>.\n#### {n + 1000:,}"} for n in range(30)]
MATH = [
    {"problem": f"Half of {n}?", "answer": rf"\frac{{{n}}}{{2}}", "level": n % 5, "subject": "Algebra"}
    for n in range(1, 9)
]
GPQA = [
    {
        "Question": f"Which {n}?",
        "Correct Answer": "right ",
        **{f"Incorrect Answer {i}": f"wrong {i}" for i in (1, 2, 3)},
    }
    for n in range(12)
]


def written(path, records):
    text = json.dumps(records) if ".json" in path.suffixes else "\n".join(map(json.dumps, records)) + "\n\n"
    path.write_bytes(gzip.compress(text.encode()) if path.name.endswith(".gz") else text.encode())
    return str(path)


def problems(name, data, **options):
    return TASKS[name].problems(TaskOptions(data=data, **options), len)


@pytest.mark.parametrize("file", ["a.jsonl", "a.jsonl.gz", "a.json", "a.ndjson", "a.json.gz"])
def test_gsm8k_answers_follow_the_mark(tmp_path, file):
    found = problems("gsm8k", written(tmp_path / file, GSM8K), count=99)
    assert [problem.unit for problem in found] == [str(number) for number in range(1, 31)]
    score = TASKS["gsm8k"].score
    for number, problem in enumerate(found):
        assert (
            problem.as_chat and problem.prompt.startswith(f"What is {number} + 1000?\n") and "boxed" in problem.prompt
        )
        assert problem.answer == f"{number + 1000:,}"
        assert score(problem, f"It is \\boxed{{{number + 1000}}}.") == score(problem, GSM8K[number]["answer"]) == 1
        assert score(problem, f"\\boxed{{{number + 1001}}} {number + 1000}") == score(problem, "") == 0


def test_math_answers_are_compared_in_normal_form(tmp_path):
    found = problems("math500", written(tmp_path / "a.jsonl", MATH), max_new_tokens=7)
    assert found[2].groups == {"level": 3, "subject": "Algebra"} and found[2].max_new_tokens == 7
    assert TASKS["math500"].score(found[2], "The answer is 1.5.") == 1
    assert TASKS["math500"].score(found[3], r"\boxed{2.0}") == 1


def test_aime_answers_are_numbers_or_texts(tmp_path):
    data = written(tmp_path / "a.jsonl", [{"problem": "p", "answer": 25}, {"problem": "q", "answer": "025"}])
    for name in ("aime24", "aime25"):
        assert [TASKS[name].score(problem, r"\boxed{25}") for problem in problems(name, data)] == [1, 1]


def test_smaller_count_draws_a_subset_of_a_larger_one(tmp_path):
    data = written(tmp_path / "a.jsonl", GSM8K)
    few, more, other = (problems("gsm8k", data, count=count, seed=seed) for count, seed in ((5, 0), (10, 0), (10, 1)))
    assert len(few) == 5 and all(problem in more for problem in few) and more != other
    assert [int(problem.unit) for problem in more] == sorted(int(problem.unit) for problem in more)
    with pytest.raises(ConfigError, match="--count"):
        problems("gsm8k", data, count=0)


def test_gpqa_choices_are_shuffled_by_the_seed(tmp_path):
    data = written(tmp_path / "a.jsonl", GPQA)
    found = problems("gpqa", data)
    for problem in found:
        lines = dict(line.split(") ") for line in problem.prompt.split("\n")[2:6])
        assert list(lines) == list("ABCD") and sorted(lines.values()) == ["right", "wrong 1", "wrong 2", "wrong 3"]
        assert lines[problem.answer] == "right"
    assert len({problem.answer for problem in found}) > 2
    assert {problem.unit: problem for problem in problems("gpqa", data, count=3)}.items() <= {
        problem.unit: problem for problem in found
    }.items()
    assert [problem.answer for problem in problems("gpqa", data, seed=1)] != [problem.answer for problem in found]


@pytest.mark.parametrize("answer", ["C", 2, "green"])
def test_listed_choices_keep_their_order(tmp_path, answer):
    data = written(tmp_path / "a.jsonl", [{"question": "q", "choices": ["red", "blue", "green"], "answer": answer}])
    (problem,) = problems("gpqa", data)
    assert "A) red\nB) blue\nC) green" in problem.prompt and problem.answer == "C"


@pytest.mark.parametrize(
    "text, letter",
    [
        (r"so \boxed{B}", "B"),
        (r"\boxed{\text{(C)}}", "C"),
        (r"\boxed{A) red}", "A"),
        ("The answer is (D).", "D"),
        ("Answer: **B**", "B"),
        ("B", "B"),
        ("(C)", "C"),
        ("A. red", "A"),
        ("**D**", "D"),
        ("A green frog", ""),
        ("I think Blue", ""),
        (r"\boxed{Blue}", ""),
        ("The answer is Blue", ""),
        ("<think>answer is A</think>The answer is B", "B"),
        ("", ""),
    ],
)
def test_gpqa_letter_is_found_in_a_text(text, letter):
    assert TASKS["gpqa"].extract(text) == letter


BAD = {
    "a.jsonl": ('{"question": "x", "answer": "#### 1"}\n{"question"', r"a.jsonl, line 2 is not valid JSON"),
    "list.jsonl": ("\n[1]\n", r"list.jsonl, line 2: .*\[1\]"),
    "no_mark.jsonl": (
        '{"question": "x", "answer": "1"}',
        r"no_mark.jsonl, line 1: `answer`.*'####'.*gsm8k",
    ),
    "no_answer.jsonl": (
        '{"question": "x", "answer": "#### "}',
        r"no_answer.jsonl, line 1: `answer`.*'####'",
    ),
    "absent.jsonl": (
        '{"problem": "x", "answer": "#### 1"}',
        r"absent.jsonl, line 1: .*'question'.*'problem'",
    ),
    "null.jsonl": (
        '{"question": null, "answer": "#### 1"}',
        r"null.jsonl, line 1: 'question'.*None",
    ),
    "empty.jsonl": ("\n", r"empty.jsonl"),
    "dict.json": ('{"question": 1}', r"dict.json: missing key 'answer'"),
    "lines.json": ('{"question": 1}\n{"question": 2}', r"lines.json is not valid JSON.*rename it to .jsonl"),
    "half.jsonl": (r'{"question": "x", "answer": "#### 1", "\ud800": 1}', r"half.jsonl, line 1 .*surrogate"),
    "digits.jsonl": ('{"question": ' + "1" * 5000 + "}", r"digits.jsonl, line 1 .*digits"),
    "item.json": ('[{"question": "x", "answer": "#### 1"}, 2]', r"item.json, item 2: .*got 2"),
    "latin.jsonl": (b'{"question": 1}\n{"question": "\xe9"}', r"latin.jsonl, line 2: not UTF-8 \(byte 0xe9\)"),
    "twice.jsonl": ('{"question": "x", "question": "y"}', r"twice.jsonl, line 1 .*'question'"),
    "cut.jsonl.gz": (gzip.compress(b'{"question": 1}' * 99)[:-12], r"cannot read .*cut.jsonl.gz"),
    "not.jsonl.gz": ("{}", r"cannot read .*not.jsonl.gz"),
    "a.csv": ("question,answer", r"--data.*\.jsonl, .*hf:NAME.*a\.csv; convert it.*read_csv"),
    "a.tar.gz": ("x", r"--data.*a\.tar\.gz; unpack it first"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_file_is_one_line_that_names_the_place(tmp_path, name):
    content, message = BAD[name]
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigError, match=message) as error:
        problems("gsm8k", str(tmp_path / name))
    assert "\n" not in str(error.value)


def test_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"cannot read .*absent.jsonl: No such file"):
        problems("math500", str(tmp_path / "absent.jsonl"))


@pytest.mark.parametrize(
    "record, message",
    [
        ({"question": "q", "choices": ["a"], "answer": "A"}, "line 1: `choices`.*2 to 10"),
        ({"question": "q", "choices": ["a", 1], "answer": "A"}, "line 1: `choices`"),
        ({"question": "q", "choices": ["a", "b"], "answer": "C"}, "line 1: `answer`.* to B"),
        ({"question": "q", "choices": ["a", "b"], "answer": 2}, "line 1: `answer`"),
        ({"question": "q", "choices": ["a", "b"]}, "line 1: `answer`"),
        ({"Question": "q", "Correct Answer": "a"}, "line 1: .*'Incorrect Answer 1'"),
    ],
)
def test_bad_choices_are_named(tmp_path, record, message):
    with pytest.raises(ConfigError, match=message):
        problems("gpqa", written(tmp_path / "a.jsonl", [record]))


@pytest.mark.parametrize(
    "name, called, records",
    [
        ("gsm8k", ("openai/gsm8k", "main", "test"), GSM8K),
        ("math500", ("HuggingFaceH4/MATH-500", "test"), MATH),
        ("aime24", ("HuggingFaceH4/aime_2024", "train"), MATH),
        ("aime25", ("math-ai/aime25", "test"), MATH),
        ("gpqa", ("Idavidrein/gpqa", "gpqa_diamond", "train"), GPQA),
    ],
)
def test_hub_is_asked_without_a_file(monkeypatch, name, called, records):
    calls = []
    fake = types.SimpleNamespace(load_dataset=lambda *names, split: calls.append((*names, split)) or records)
    monkeypatch.setitem(sys.modules, "datasets", fake)
    assert len(problems(name, "", count=5)) == 5 and calls == [called]
    with pytest.raises(ConfigError, match="hf:other: row 1: .*key"):
        fake.load_dataset = lambda *names, split: [{}]
        problems(name, "hf:other")


def test_datasets_package_is_named_if_it_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(
        ConfigError, match=r"hf:openai/gsm8k:main:test needs the datasets package: pip install .*or give files"
    ):
        problems("gsm8k", "")
