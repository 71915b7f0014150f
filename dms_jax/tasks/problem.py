"""The interface of a task: it makes prompts with reference answers, and scores each generated answer."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol


@dataclass(frozen=True)
class Problem:
    """One prompt and its reference answer, as text.

        Problem(
            unit="1024/0.5/0",
            prompt="... The special magic number for the calm tiger mentioned in the text is",
            answer=" 48213",
            max_new_tokens=16,
            groups={"length": 1024, "depth": 0.5},
        )

    Results files store a hash of the `repr` of their problems, so a run could not continue an old file after a field
    was renamed.
    """

    unit: str  # its name, unique within the task; depends on the options only, so that a stopped run can continue
    prompt: str
    answer: str  # the reference answer, as a continuation of the prompt
    max_new_tokens: int
    as_chat: bool = False  # put the prompt into the model's chat template as the user's turn
    stop_strings: tuple[str, ...] = ()
    groups: dict[str, float | str] = field(default_factory=dict)  # what tables group by: "length", "depth", ...
    tests: tuple[Any, ...] = ()  # tests of a generated program, in a form that only their task knows
    confined: bool = field(default=True, repr=False)  # whether a generated program runs in namespaces of its own


@dataclass(frozen=True)
class TaskOptions:
    """The options of a command that concern problems. A task uses those that it needs."""

    count: int = 20  # problems, or repetitions of each cell of a grid
    seed: int = 0
    lengths: tuple[int, ...] = (1024,)  # tokens of a prompt, for tasks that generate their own
    depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)  # positions of needles; 0 is the start of the text
    data: str = ""  # file or hf: name, for tasks that read their problems; "" is the task's default
    haystack: str = ""  # the text in which needles are hidden
    max_new_tokens: int = 0  # 0: the task's own limit
    run_code: bool | str = False  # whether generated code may run; "unconfined" for without namespaces


class Task(Protocol):
    """One kind of problem."""

    @property
    def name(self) -> str: ...  # as in --tasks
    @property
    def measures_answer(self) -> bool: ...  # whether to measure log p(answer) as well

    def problems(self, options: TaskOptions, count_tokens: Callable[[str], int]) -> list[Problem]:
        """Make the problems. Raises ConfigError for files and options that cannot work, before any model runs."""
        ...

    def extract(self, text: str) -> str:
        """Return the answer within a generated text, in a normal form, so that equal answers vote together; "" if the
        text has no answer."""
        ...

    def score(self, problem: Problem, text: str) -> float:
        """Return the score of a generated text, from 0 to 1. It may depend on `extract(text)` only, because a vote
        elects an extracted answer."""
        ...
