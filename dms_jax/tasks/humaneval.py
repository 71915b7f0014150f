"""HumanEval (Chen et al., arXiv:2107.03374): complete a Python function so that its tests pass.

A record is {"task_id", "prompt", "test", "entry_point", "canonical_solution"}. The prompt:

    def truncate_number(number: float) -> float:
        \"\"\" Given a positive floating point number, it can be decomposed into and integer part ... and decimals ...
        Return the decimal part of the number.
        >>> truncate_number(3.5)
        0.5
        \"\"\"

The text "    return number % 1.0" scores 1. As in the paper, the prompt is not a chat. A whole program, fenced or not,
is accepted as well.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass

from dms_jax.errors import ConfigError
from dms_jax.tasks.answers import after_thinking
from dms_jax.tasks.code_runner import PASSED, generated_code, require_run_code, run_tests
from dms_jax.tasks.problem import Problem, TaskOptions
from dms_jax.tasks.records import chosen, read_records


@dataclass(frozen=True)
class HumanEval:
    name: str = "humaneval"
    default_data: str = "hf:openai/openai_humaneval:test"
    max_new_tokens: int = 512
    measures_answer: bool = False

    def problems(self, options: TaskOptions, count_tokens: Callable[[str], int]) -> list[Problem]:
        confined = require_run_code(self.name, options.run_code)
        found: dict[str, Problem] = {}
        for record in chosen(read_records(options.data or self.default_data), options):
            unit, prompt, solution = record.text("task_id"), record.text("prompt"), record.text("canonical_solution")
            if unit in found:
                raise ConfigError(f"{record.where}: duplicate task_id {unit!r}; give each problem its own")
            tests = (f"{record.text('test')}\ncheck({record.text('entry_point')})",)
            stops = ("\nclass ", "\ndef ", "\n#", "\nif ", "\nprint(")  # the first line after the function
            limit = options.max_new_tokens or self.max_new_tokens
            found[unit] = Problem(unit, prompt, solution, limit, stop_strings=stops, tests=tests, confined=confined)
        return list(found.values())

    def extract(self, text: str) -> str:
        """Return the rest of the function, up to the first line that is not indented, or else a whole program."""
        body = re.sub(r"\A(?:[ \t]*\n)+", "", after_thinking(text))
        if re.match(r"  |\t", body):
            return re.split(r"\n(?=[^\s)\]}])", body, maxsplit=1)[0].rstrip()
        return generated_code(text)

    def score(self, problem: Problem, text: str) -> float:
        code = self.extract(text)
        # A whole program is put after the prompt too, so that it can use the prompt's imports and helpers.
        joint = "" if code[:1].isspace() else "\n"
        program = f"{problem.prompt}{joint}{code}\n\n{problem.tests[0]}"
        return float(run_tests(program, confined=problem.confined) == PASSED)
