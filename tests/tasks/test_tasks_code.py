"""Generated code: its limits, that it cannot skip its tests, and the formats of HumanEval and LiveCodeBench."""

import base64
import functools
import json
import os
import pickle
import sys
import zlib
from dataclasses import replace

import pytest

from dms_jax.errors import ConfigError
from dms_jax.tasks import code_runner
from dms_jax.tasks.code_runner import Limits, generated_code
from dms_jax.tasks.live_code import same_output
from dms_jax.tasks.problem import TaskOptions
from dms_jax.tasks.registry import TASKS

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="generated code runs on Linux only")
SHORT = Limits(seconds=2, memory_mib=512, output_mib=1)


@functools.cache
def run_code() -> bool | str:
    """Return the best value of --run-code on this machine, which is found out by trying."""
    try:
        return bool(code_runner.confining_tool())
    except ConfigError:
        return "unconfined"


def run_program(program: str, stdin: str = "", limits: Limits | None = None):
    return code_runner.run_program(program, stdin, limits or Limits(), confined=run_code() is True)


def run_tests(program: str) -> str:
    return code_runner.run_tests(program, confined=run_code() is True)


def test_program_reads_prints_and_ends():
    assert run_program("print(input()[::-1])", "abc\n") == ("passed", "cba\n")
    assert run_program("print(open(0).read() == '', __name__)") == ("passed", "True __main__\n")
    assert run_program("raise SystemExit") == ("passed", "")


@pytest.mark.parametrize(
    "program, verdict",
    [
        ("1 / 0", "failed: ZeroDivisionError: division by zero"),
        ("def f(:", "failed: SyntaxError: invalid syntax"),
        ("raise SystemExit(3)", "failed: exit status 3"),
        ("import os, signal; signal.raise_signal(9)", "failed: killed by signal 9"),
        ("x = bytearray(1 << 30)", "failed: MemoryError"),
        ("x = []\nwhile True: x.append(bytearray(1 << 22))", "failed: MemoryError"),
        ("while True: pass", "timed out"),
        ("import time; time.sleep(60)", "timed out"),
        ("while True:\n try:\n  while True: pass\n except BaseException: pass", "timed out"),
        ("import threading, time; threading.Thread(target=time.sleep, args=(60,)).start()", "timed out"),
        ("while True: print('x' * 9999)", "failed: OSError: [Errno 27] File too large"),
        ("open('big', 'w').write('x' * (2 << 20))", "failed: OSError: [Errno 27] File too large"),
        ("x = [open('/dev/null') for _ in range(100)]", "failed: OSError: [Errno 24] Too many open files: '/dev/null'"),
    ],
)
def test_verdict_says_how_a_program_ended(program, verdict):
    # A busy machine may need more than two seconds to fill the memory or a file.
    limits = SHORT if verdict == "timed out" else replace(SHORT, seconds=60)
    assert run_program(program, limits=limits).verdict == verdict


def test_program_cannot_skip_its_tests():
    assert run_tests("assert 1 + 1 == 2") == "passed"
    assert run_tests("assert 1 + 1 == 3, 'sum'") == "failed: AssertionError: sum"
    for early in ("raise SystemExit", "import sys; sys.exit(0)", "import os; os._exit(0)", "quit()"):
        assert run_tests(f"{early}\nassert False").startswith("failed: "), early


HUMANEVAL = [
    {
        "task_id": "own/0",
        "prompt": 'from math import inf\n\n\ndef smallest(numbers):\n    """The smallest, inf of none."""\n',
        "canonical_solution": "    return min(numbers, default=inf)\n",
        "test": "def check(candidate):\n    assert candidate([2, 1]) == 1\n    assert candidate([]) == float('inf')\n",
        "entry_point": "smallest",
    }
]
OWN = "def smallest(numbers):\n    return min([*numbers, inf])"


def written(path, records):
    path.write_text("\n".join(map(json.dumps, records)))
    return str(path)


@pytest.fixture
def humaneval(tmp_path):
    (problem,) = TASKS["humaneval"].problems(
        TaskOptions(data=written(tmp_path / "a.jsonl", HUMANEVAL), run_code=run_code()), len
    )
    return problem


@pytest.mark.parametrize(
    "text, score",
    [
        (HUMANEVAL[0]["canonical_solution"], 1),
        ("    return min(numbers, default=inf)\n\n\ndef broken(:\n", 1),  # what comes after the function is cut
        ("    return min(numbers, default=inf)\n```\nThat was it.", 1),
        ("\n    best = inf\n    for n in numbers:\n        best = min(\n            best, n\n)\n    return best", 1),
        (f"Sure:\n```python\n{OWN}\n```\nDone.", 1),
        (f"<think>```python\nx\n```</think>```\n{OWN}\n```", 1),
        (f"```python\n{OWN}", 1),
        (OWN, 1),
        ("```python\n    return min(numbers, default=inf)\n```", 1),
        ("    return max(numbers, default=inf)", 0),
        ("    pass", 0),
        ("    import sys; sys.exit(0)", 0),
        ("I cannot do this.", 0),
        ("", 0),
    ],
)
def test_humaneval_scores_1_if_the_tests_pass(humaneval, text, score):
    assert TASKS["humaneval"].score(humaneval, text) == score


def test_humaneval_problems_have_unique_task_ids(humaneval, tmp_path):
    assert humaneval.unit == "own/0" and humaneval.prompt == HUMANEVAL[0]["prompt"] and not humaneval.as_chat
    with pytest.raises(ConfigError, match="line 2: .*'own/0'"):
        TASKS["humaneval"].problems(
            TaskOptions(data=written(tmp_path / "twice.jsonl", HUMANEVAL * 2), run_code=run_code()), len
        )


def test_results_can_be_continued_with_another_run_code(tmp_path):
    """Results files store a hash of the repr of their problems."""
    path = written(tmp_path / "a.jsonl", HUMANEVAL)
    made = lambda value: repr(TASKS["humaneval"].problems(TaskOptions(data=path, run_code=value), len))
    assert made(run_code()) == made("unconfined") and "confined" not in made("unconfined")


@pytest.mark.parametrize("name", ["humaneval", "code"])
def test_code_runs_only_with_its_option(tmp_path, name):
    with pytest.raises(
        ConfigError,
        match=f"{name} .*--run-code",
    ):
        TASKS[name].problems(TaskOptions(data=written(tmp_path / "a.jsonl", HUMANEVAL)), len)


STDIN = {
    "question_content": "Double the number.",
    "public_test_cases": json.dumps([{"input": "2\n", "output": "4\n", "testtype": "stdin"}]),
    "private_test_cases": base64.b64encode(
        zlib.compress(pickle.dumps(json.dumps([{"input": "5", "output": "10", "testtype": "stdin"}])))
    ).decode(),
    "difficulty": "easy",
}
FUNCTIONAL = {
    "question_content": "Pair them.",
    "starter_code": "class Solution:\n    def pair(self, a: List[int], b: str):\n",
    "public_test_cases": [{"input": '[1, 2]\n"x"', "output": '[[1, "x"], [2, "x"]]', "testtype": "functional"}],
    "metadata": json.dumps({"func_name": "pair"}),
}
METHOD = (
    "class Solution:\n    def pair(self, a: List[int], b: str):\n        print('noise')\n"
    "        return [(n, b) for n in a]"
)


def live(tmp_path, record):
    (problem,) = TASKS["code"].problems(
        TaskOptions(data=written(tmp_path / "a.jsonl", [record]), run_code=run_code()), len
    )
    return problem


@pytest.mark.parametrize(
    "record, code, score",
    [
        (STDIN, "print(2 * int(input()))", 1),
        (STDIN, "def main():\n    print(2 * int(input()))\nif __name__ == '__main__':\n    main()\n    sys.exit(0)", 1),
        (STDIN, "print(4)", 0),  # the public test only
        (STDIN, "print(pow(2, 1, 3) * int(input()))", 1),  # the pow with three arguments
        (STDIN, "", 0),
        (FUNCTIONAL, METHOD, 1),
        (FUNCTIONAL, "def pair(a, b):\n    return [[n, b] for n in a]", 1),
        (FUNCTIONAL, METHOD.replace("(n, b)", "(b, n)"), 0),
        (FUNCTIONAL, METHOD.replace("return", "return {1} and"), 1),
        (FUNCTIONAL, METHOD.replace("return", "exit() or"), 0),
        (FUNCTIONAL, "def other(a, b): return 1", 0),
    ],
)
def test_live_code_scores_1_if_every_test_passes(tmp_path, record, code, score):
    problem = live(tmp_path, record)
    assert (
        problem.as_chat
        and record["question_content"] in problem.prompt
        and record.get("starter_code", "") in problem.prompt
    )
    assert TASKS["code"].score(problem, f"```python\n{code}\n```") == score


def test_live_code_has_public_and_private_tests(tmp_path):
    assert [test.given for test in live(tmp_path, STDIN).tests] == ["2\n", "5"]
    assert live(tmp_path, STDIN).groups == {"difficulty": "easy"}


class _Evil:
    def __reduce__(self):
        return os.system, ("touch evil",)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"public_test_cases": "[1]"}, "line 1: .*'public_test_cases' .*list"),
        ({"public_test_cases": "[{"}, "line 1: cannot read 'public_test_cases'"),
        ({"private_test_cases": "%%"}, "line 1: cannot read 'private_test_cases'"),
        (
            {"private_test_cases": base64.b64encode(zlib.compress(pickle.dumps(_Evil()))).decode()},
            "cannot read 'private_test_cases' .*asks for",
        ),
        ({"public_test_cases": [{"input": "1"}]}, "line 1: .*LiveCodeBench .*output"),
        ({"public_test_cases": [{"input": 1, "output": "1"}]}, "line 1: .*LiveCodeBench .*text"),
        (
            {"public_test_cases": [{"input": "1", "output": "1", "testtype": "functional"}]},
            "line 1: .*LiveCodeBench .*func_name",
        ),
        ({"public_test_cases": [], "private_test_cases": ""}, "line 1: 'public_test_cases'"),
        ({"question_content": None}, "line 1: 'question_content'"),
    ],
)
def test_bad_test_cases_are_named(tmp_path, change, message):
    with pytest.raises(ConfigError, match=message):
        live(tmp_path, STDIN | change)
    assert not os.path.exists("evil")


PACKED = {
    "another operation": (pickle.dumps(["a"]), "asks for EMPTY_LIST"),
    "two texts": (pickle.dumps("[]")[:-1] + pickle.dumps("[]"), "one pickled text, got 2"),
    "a length of 8 GiB": (b"\x80\x05\x8d\x00\x00\x00\x00\x02\x00\x00\x00.", "8589934592 bytes"),
    "an index of 2**31": (b"Nr\xff\xff\xff\x7f.", "asks for NONE"),
    "no end": (b"", "STOP"),
    "deep": (pickle.dumps("[" * 9999), "nested too deeply"),
    "half a character": (pickle.dumps('["\ud800"]'), "surrogate"),
    "digits": (pickle.dumps("[" + "1" * 5000 + "]"), "digits"),
    "a bomb": (b"0" * 10**6, "unpacks to more than"),
}


@pytest.mark.parametrize("name", PACKED)
def test_packed_tests_are_read_as_one_text_and_nothing_else(tmp_path, monkeypatch, name):
    monkeypatch.setattr("dms_jax.tasks.live_code.MAX_FILE", 10**5)
    content, words = PACKED[name]
    record = STDIN | {"private_test_cases": base64.b64encode(zlib.compress(content)).decode()}
    with pytest.raises(ConfigError, match=f"line 1: cannot read 'private_test_cases' .*{words}"):
        live(tmp_path, record)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_packed_tests_may_have_any_protocol(tmp_path, protocol):
    tests = pickle.dumps(json.dumps([{"input": "é" * 300, "output": "1", "testtype": "stdin"}]), protocol)
    record = STDIN | {"private_test_cases": base64.b64encode(zlib.compress(tests)).decode()}
    assert [test.given for test in live(tmp_path, record).tests][1:] == ["é" * 300]


def test_live_code_has_no_default_data():
    with pytest.raises(ConfigError, match="--data"):
        TASKS["code"].problems(TaskOptions(run_code=run_code()), len)


@pytest.mark.parametrize(
    "output, wanted, same",
    [
        ("1 2\n3\n", "1  2 \n3", True),
        ("1.0", "1", True),
        ("0.5", ".50", True),
        ("a b", "a\nb", False),
        ("1", "2", False),
        ("nan", "1", False),
        ("Yes", "YES", False),
        ("", "", True),
        ("", "0", False),
        ("1\n", "1\n2", False),
        ("NaN", "NaN", True),
        ("sNaN", "1", False),
    ],
)
def test_same_output_ignores_spacing(output, wanted, same):
    assert same_output(output, wanted) == same


@pytest.mark.parametrize(
    "text, code",
    [
        ("plain = 1\n", "plain = 1"),
        ("a\n```python\nx = 1\n```\nb", "x = 1"),
        ("```\nx\n```\nor\n```py\ny\n```", "y"),
        ("```python\nx = 1", "x = 1"),
        ("<think>```\nx\n```</think>```\ny\n```", "y"),
        ("```x = 1```", "x = 1"),
        ("", ""),
    ],
)
def test_generated_code_is_found_in_an_answer(text, code):
    assert generated_code(text) == code
