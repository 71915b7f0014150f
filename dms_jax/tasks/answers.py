r"""Find the answer in a text that reasons: \boxed{...}, `#### N`, `the answer is N`, else the last number.

"Half of 84 is 42, plus 6 is 48.\n#### 48"  ->  "48"
"""

import re

from dms_jax.tasks.answer_form import DECIMAL, normal_form

NUMBER = rf"(?:(?<![\w)])-)?\\?\$?(?:\d{{1,3}}(?:,\d{{3}})+(?:\.\d+)?(?!\d)|{DECIMAL})(?:/\d+)?"
ANSWER_IS = r"(?i)\banswer\s*(?:is\s*:?|:|=)[\s*]*(?=\S)"


def after_thinking(text: str) -> str:
    """The part of a text that follows a reasoning model's thoughts."""
    return text.rpartition("</think>")[2]


def math_answer(text: str) -> str:
    """The answer of a text in its normal form; "" if there is none."""
    text = after_thinking(text)
    boxed = last_boxed(text)
    if boxed is not None:
        return normal_form(boxed)
    if marked := re.findall(r"####[ \t]*(\S.*)", text):
        return normal_form(marked[-1])
    if stated := re.split(ANSWER_IS, text)[1:]:
        return normal_form(_formula(stated[-1].split("\n")[0]))
    numbers = re.findall(NUMBER, text)
    return normal_form(numbers[-1]) if numbers else ""


def last_boxed(text: str) -> str | None:
    r"""The content of the last \boxed{...} that is not empty and whose braces close; None without one."""
    for start in reversed([found.end() for found in re.finditer(r"\\f?boxed\s*\{", text)]):
        inside = _until_closed(text[start:])
        if inside.strip():
            return inside
    return None


def _until_closed(text: str) -> str:
    """The text before the brace that closes an outer one; "" if no brace does."""
    depth = 1
    for found in re.finditer(r"\\.|[{}]", text, re.DOTALL):  # \{ is not a brace
        depth += {"{": 1, "}": -1}.get(found.group(), 0)
        if depth == 0:
            return text[: found.start()]
    return ""


def _formula(line: str) -> str:
    """The answer at the beginning of the rest of a line: a formula in dollars, a number before words, or a sentence."""
    if formula := re.match(
        r"\$\$?((?:\\.|[^$\\])*[^$\s])\$(?!\d)|\\\((.+?)\\\)", line
    ):  # in "$5 and $6" no dollar ends a formula
        return formula[1] or formula[2]
    if number := re.match(rf"({NUMBER})(?:\*\*)?(?:,?\s+[A-Za-z]{{2,}}.*|[.,;!]?\s*|[.;!]\s.*)$", line):
        return number[1]
    return re.split(r"[.;]\s|\.$", line, maxsplit=1)[0]
