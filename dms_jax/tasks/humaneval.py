"""HumanEval (Chen et al., arXiv:2107.03374): complete a Python function so that its tests pass.

Lines of {"task_id", "prompt", "test", "entry_point", "canonical_solution"}. The prompt is the file's, not a chat, as in the
paper; an answer that is a whole program, in a fence or not, is taken too.
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
        require_run_code(self.name, options)
        found: dict[str, Problem] = {}
        for record in chosen(read_records(options.data or self.default_data), options):
            unit, prompt, solution = record.text("task_id"), record.text("prompt"), record.text("canonical_solution")
            if unit in found:
                raise ConfigError(f"{record.where}: the task_id {unit!r} came before; give each problem its own")
            tests = (f"{record.text('test')}\ncheck({record.text('entry_point')})",)
            stops = ("\nclass ", "\ndef ", "\n#", "\nif ", "\nprint(")  # the function has ended
            found[unit] = Problem(
                unit, prompt, solution, options.max_new_tokens or self.max_new_tokens, stop_strings=stops, tests=tests
            )
        return list(found.values())

    def extract(self, text: str) -> str:
        """The rest of the function, which ends before the first line that is not indented; or a whole program."""
        body = re.sub(r"\A(?:[ \t]*\n)+", "", after_thinking(text))
        if re.match(r"  |\t", body):
            return re.split(r"\n(?=[^\s)\]}])", body, maxsplit=1)[0].rstrip()
        return generated_code(text)

    def score(self, problem: Problem, text: str) -> float:
        code = self.extract(text)
        joint = (
            "" if code[:1].isspace() else "\n"
        )  # a whole program stands behind the prompt, whose imports and helpers it may use
        return float(run_tests(f"{problem.prompt}{joint}{code}\n\n{problem.tests[0]}") == PASSED)
