r"""Questions with one short answer: GSM8K, MATH-500, AIME.

- gsm8k    {"question", "answer"}; the answer ends with `#### N` (Cobbe et al., arXiv:2110.14168)
- math500  {"problem", "answer"} (Hendrycks et al., arXiv:2103.03874; the 500 of Lightman et al., arXiv:2305.20050)
- aime24, aime25  {"problem", "answer"}; whole numbers, of the American Invitational Mathematics Examination

An example of GSM8K:

    question: Weng earns $12 an hour for babysitting. Yesterday, she just did 50 minutes of babysitting.
              How much did she earn?
    answer:   Weng earns 12/60 = $<<12/60=0.2>>0.2 per minute.
              Working 50 minutes, she earned 0.2 x 50 = $<<0.2*50=10>>10.
              #### 10

A text like "So she earned \boxed{10}" scores 1. Answers are compared in the normal form of `answer_form`.
"""

from collections.abc import Callable
from dataclasses import dataclass

from dms_jax.errors import ConfigError
from dms_jax.tasks.answer_form import normal_form
from dms_jax.tasks.answers import math_answer
from dms_jax.tasks.problem import Problem, TaskOptions
from dms_jax.tasks.records import Record, chosen, read_records

REQUEST = "\n\nPlease reason step by step, and put your final answer within \\boxed{}."


@dataclass(frozen=True)
class MathProblems:
    name: str
    default_data: str
    max_new_tokens: int
    question_key: str = "problem"
    answer_mark: str = ""  # the reference answer follows this mark
    measures_answer: bool = False

    def problems(self, options: TaskOptions, count_tokens: Callable[[str], int]) -> list[Problem]:
        return [
            self._problem(record, options)
            for record in chosen(read_records(options.data or self.default_data), options)
        ]

    def _problem(self, record: Record, options: TaskOptions) -> Problem:
        _, mark, answer = (
            record.text("answer").rpartition(self.answer_mark) if self.answer_mark else ("", "", record.text("answer"))
        )
        if mark != self.answer_mark or not normal_form(answer):
            rule = f"end with {self.answer_mark!r} and the answer" if self.answer_mark else "not be empty"
            raise ConfigError(f"{record.where}: `answer` must {rule}; is this a file for {self.name}?")
        prompt = record.text(self.question_key).strip() + REQUEST
        limit = options.max_new_tokens or self.max_new_tokens
        return Problem(
            str(record.number), prompt, answer.strip(), limit, as_chat=True, groups=record.groups("level", "subject")
        )

    def extract(self, text: str) -> str:
        return math_answer(text)

    def score(self, problem: Problem, text: str) -> float:
        return float(self.extract(text) == normal_form(problem.answer))
