"""Programming problems with hidden inputs and outputs, in the format of LiveCodeBench (Jain et al., arXiv:2403.07974).

A record is {"question_content", "public_test_cases", "private_test_cases", "starter_code", "metadata"}, of which the
first two are required:

    question_content:  Read n and print the sum of the integers from 1 to n.
    public_test_cases: [{"input": "4", "output": "10", "testtype": "stdin"}]

A text like "```python\\nn = int(input())\\nprint(n * (n + 1) // 2)\\n```" scores 1. Test cases are a list, its JSON, or
the encoding of LiveCodeBench: base64 of zlib of a pickled JSON string. With the testtype "stdin", the program reads the
input and prints the output. With "functional", each line of the input is the JSON of one argument of the function
"func_name" in `metadata`, which may be a method of a class `Solution`; the output is the JSON of its result.
"""

import base64
import pickletools
import secrets
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from typing import Any, NamedTuple

from dms_jax.errors import ConfigError
from dms_jax.files import MAX_FILE, parse_json
from dms_jax.tasks.code_runner import PASSED, generated_code, require_run_code, run_program
from dms_jax.tasks.problem import Problem, TaskOptions
from dms_jax.tasks.records import Record, chosen, read_records

PRELUDE = (  # the imports that the websites of these problems provide
    "import bisect, collections, functools, heapq, itertools, json, math, operator, random, re, string, sys\n"
    "from bisect import *\nfrom collections import *\nfrom functools import *\nfrom heapq import *\n"
    "from itertools import *\nfrom math import *\nfrom typing import *\n"
    "from builtins import *\nsys.setrecursionlimit(50_000)\n"  # math.pow hides it
)
CALL = (
    "\nimport json as _json, sys as _sys\n"
    "_arguments = [_json.loads(line) for line in _sys.stdin.read().splitlines() if line.strip()]\n"
    "_function = getattr(Solution(), {name!r}) if 'Solution' in globals() else globals()[{name!r}]\n"
    "_sys.stdout.write({token!r} + _json.dumps(_function(*_arguments)) + {token!r})\n"
)
READS = "The program reads the input from stdin and prints the output to stdout."
REQUEST = "Write a Python program that solves this. {how} Give the whole program in one ```python block."

TEXTS = ("UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8")  # operations of a pickled text ...
FRAMES = ("PROTO", "FRAME", "MEMOIZE", "PUT", "BINPUT", "LONG_BINPUT", "STOP")  # ... and those around it


class CodeTest(NamedTuple):
    """One input, and the output of a correct program."""

    given: str
    wanted: str
    function: str  # to call; "" for a program that reads stdin


@dataclass(frozen=True)
class LiveCode:
    name: str = "code"
    max_new_tokens: int = 4096
    measures_answer: bool = False

    def problems(self, options: TaskOptions, count_tokens: Callable[[str], int]) -> list[Problem]:
        confined = require_run_code(self.name, options.run_code)
        if not options.data:
            raise ConfigError(
                f"{self.name} has no default data; give a file in the format of LiveCodeBench with --data"
            )
        return [self._problem(record, options, confined) for record in chosen(read_records(options.data), options)]

    def _problem(self, record: Record, options: TaskOptions, confined: bool) -> Problem:
        tests = _tests(record)
        starter = record.text("starter_code") if record.value.get("starter_code") else ""
        how = f"Start from this:\n\n```python\n{starter}\n```\n\n" if starter else READS
        prompt = f"{record.text('question_content').strip()}\n\n{REQUEST.format(how=how)}"
        limit = options.max_new_tokens or self.max_new_tokens
        return Problem(
            str(record.number),
            prompt,
            "",
            limit,
            as_chat=True,
            groups=record.groups("difficulty", "platform"),
            tests=tests,
            confined=confined,
        )

    def extract(self, text: str) -> str:
        return generated_code(text)

    def score(self, problem: Problem, text: str) -> float:
        """Return 1 if the program passes every test, else 0."""
        code = self.extract(text)
        return float(bool(code) and all(passes(code, test, problem.confined) for test in problem.tests))


def passes(code: str, test: CodeTest, confined: bool = True) -> bool:
    """Return whether a program gives the output of a test."""
    token = secrets.token_hex(16)  # separates the result from what the program itself prints
    call = CALL.format(name=test.function, token=token) if test.function else ""
    verdict, output = run_program(f"{PRELUDE}{code}{call}", test.given, confined=confined)
    if verdict != PASSED:
        return False
    if not test.function:
        return same_output(output, test.wanted)
    parts = output.split(token)
    try:
        return len(parts) == 3 and parse_json(parts[1], "the result") == parse_json(test.wanted, "the output")
    except ConfigError:
        return False


def same_output(output: str, wanted: str) -> bool:
    """Compare line by line and word by word, ignoring extra blanks. Numbers are compared by value."""
    lines, wanted_lines = ([line.split() for line in text.strip().splitlines()] for text in (output, wanted))
    return [len(line) for line in lines] == [len(line) for line in wanted_lines] and all(
        same_word(*pair) for both in zip(lines, wanted_lines, strict=True) for pair in zip(*both, strict=True)
    )


def same_word(word: str, wanted: str) -> bool:
    try:
        return word == wanted or (Decimal(word) == Decimal(wanted))
    except InvalidOperation:  # at least one is not a number
        return False


def _tests(record: Record) -> tuple[CodeTest, ...]:
    cases = _cases(record, "public_test_cases") + _cases(record, "private_test_cases")
    try:
        metadata = record.value.get("metadata") or {}
        metadata = parse_json(metadata, "metadata") if isinstance(metadata, str) else metadata
        name = metadata.get("func_name", "")
        tests = tuple(
            CodeTest(case["input"], case["output"], name if case.get("testtype") == "functional" else "")
            for case in cases
        )
        if not all(isinstance(text, str) for test in tests for text in test):
            raise TypeError("input, output and func_name must be text")
        if any(case.get("testtype") == "functional" for case in cases):
            if not name:
                raise KeyError("func_name")
            for test in tests:
                parse_json(test.wanted, "the output")
    except (AttributeError, KeyError, TypeError, ValueError) as why:
        raise ConfigError(
            f"{record.where}: the test cases must have the format of LiveCodeBench ({type(why).__name__}: {why})"
        ) from why
    if not tests:
        raise ConfigError(
            f"{record.where}: 'public_test_cases' and 'private_test_cases' are empty; give at least one test"
        )
    return tests


def _cases(record: Record, key: str) -> list[dict[str, Any]]:
    cases = record.value.get(key) or []
    try:
        if isinstance(cases, str):
            cases = parse_json(cases if cases.lstrip().startswith("[") else _unpacked(cases), "its text")
        if not isinstance(cases, list) or not all(isinstance(case, dict) for case in cases):
            raise TypeError("it must be a list of objects")
    except (EOFError, TypeError, ValueError, zlib.error) as why:
        raise ConfigError(f"{record.where}: cannot read {key!r} ({type(why).__name__}: {why})") from why
    return cases


def _unpacked(packed: str) -> str:
    """Return the text in a pickle without unpickling it, which could call anything and ask for any amount of memory."""
    unpack = zlib.decompressobj()
    raw = unpack.decompress(base64.b64decode(packed), MAX_FILE)
    if not unpack.eof:
        raise ValueError(f"it is cut short, or unpacks to more than {MAX_FILE // 2**20} MiB")
    texts = []
    for operation, argument, _ in pickletools.genops(raw):
        if operation.name in TEXTS:
            texts.append(str(argument))
        elif operation.name not in FRAMES:
            raise ValueError(f"it asks for {operation.name}, which no pickled text does")
    if len(texts) != 1:
        raise ValueError(f"it must be one pickled text, got {len(texts)}")
    return texts[0]
