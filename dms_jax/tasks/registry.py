"""The tasks that have answers, under their names in --tasks.

To add one, write a class like those of this folder, in a file of its own, and put an instance of it here.
"""

from dms_jax.tasks.humaneval import HumanEval
from dms_jax.tasks.key_recall import Recall
from dms_jax.tasks.live_code import LiveCode
from dms_jax.tasks.math_problems import MathProblems
from dms_jax.tasks.multiple_choice import MultipleChoice
from dms_jax.tasks.needles import Needles
from dms_jax.tasks.problem import Task
from dms_jax.tasks.variables import Variables
from dms_jax.tasks.word_copy import Copy

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
RUN_CODE = tuple(task.name for task in _ALL if isinstance(task, HumanEval | LiveCode))  # tasks that need --run-code
