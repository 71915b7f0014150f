"""The tasks by the names that --tasks knows."""

from infer.tasks.humaneval import HumanEval
from infer.tasks.key_recall import Recall
from infer.tasks.live_code import LiveCode
from infer.tasks.math_problems import MathProblems
from infer.tasks.multiple_choice import MultipleChoice
from infer.tasks.needles import Needles
from infer.tasks.problem import Task
from infer.tasks.variables import Variables
from infer.tasks.word_copy import Copy

_ALL: tuple[Task, ...] = (
    Needles("needle_single"),
    Needles("needle_multikey", num_keys=4),
    Needles("needle_multivalue", num_values=4),
    Variables(),
    Copy(),
    Recall(),
    MathProblems("gsm8k", "hf:openai/gsm8k:main:test", max_new_tokens=512, question_key="question", answer_mark="####"),
    MathProblems("math500", "hf:HuggingFaceH4/MATH-500:test", max_new_tokens=2048),
    MathProblems("aime24", "hf:HuggingFaceH4/aime_2024:train", max_new_tokens=8192),
    MathProblems("aime25", "hf:math-ai/aime25:test", max_new_tokens=8192),
    MultipleChoice(),
    HumanEval(),
    LiveCode(),
)
TASKS: dict[str, Task] = {task.name: task for task in _ALL}
