"""What a task hands to the engine, and what it gets back: prompts with reference answers, and a score for each answer."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol


@dataclass(frozen=True)
class Problem:
    """One prompt. Everything is text: the engine tokenises."""

    unit: str  # its name, unique within its task and the same in every run with the same options: a resumed run skips by it
    prompt: str
    answer: str  # the reference, as a continuation of the prompt; its log-probability is measured too where `measures_answer`
    max_new_tokens: int
    as_chat: bool = False  # put the prompt into the model's chat template, as the user's turn
    stop_strings: tuple[str, ...] = ()
    groups: dict[str, float | str] = field(
        default_factory=dict
    )  # what a table or a heat map groups by: "length", "depth", ...
    tests: tuple[Any, ...] = ()  # what a generated program is run against; only the task that made them reads them


@dataclass(frozen=True)
class TaskOptions:
    """What the command line says about problems. A task takes what it needs."""

    count: int = 20  # problems, or repetitions of each cell of a grid
    seed: int = 0
    lengths: tuple[int, ...] = (1024,)  # tokens of a prompt, for tasks that make their own
    depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)  # where a needle is put, 0 is the start
    data: str = ""  # file, or hf: name, of a task that reads one; "" is the task's own default
    haystack: str = ""  # text to hide needles in
    max_new_tokens: int = 0  # 0: the task's own
    run_code: bool = False  # may generated code be executed?


class Task(Protocol):
    """One kind of problem."""

    @property
    def name(self) -> str: ...  # as in --tasks
    @property
    def measures_answer(self) -> bool: ...  # whether log p(answer) under each arm is of interest

    def problems(self, options: TaskOptions, count_tokens: Callable[[str], int]) -> list[Problem]:
        """Raises ConfigError for files and options that cannot work, before any model runs."""
        ...

    def extract(self, text: str) -> str:
        """What of a generated text counts as the answer, in a normal form: equal answers vote together. "" is none."""
        ...

    def score(self, problem: Problem, text: str) -> float:
        """How right a generated text is, 0 to 1. Texts with equal `extract` score equally: a vote picks one of the texts."""
        ...
