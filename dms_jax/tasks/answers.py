r"""Find the answer in a text that reasons: \boxed{...}, `#### N`, `the answer is N`, else the last number.

"Half of 84 is 42, plus 6 is 48.\n#### 48"  ->  "48"
"""

import re

from dms_jax.tasks.answer_form import DECIMAL, normal_form

NUMBER = rf"(?:(?<![\w)])-)?\\?\$?(?:\d{{1,3}}(?:,\d{{3}})+(?:\.\d+)?(?!\d)|{DECIMAL})(?:/\d+)?"
ANSWER_IS = r"(?i)\banswer\s*(?:is\s*:?|:|=)[\s*]*(?=\S)"


def after_thinking(text: str) -> str:
    """Return the part of a text that follows the thoughts of a reasoning model."""
    return text.rpartition("</think>")[2]


def math_answer(text: str) -> str:
    """Return the answer of a text in its normal form; "" if the text has no answer."""
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
    r"""Return the content of the last \boxed{...} that is closed and not empty; None if there is none."""
    for start in reversed([found.end() for found in re.finditer(r"\\f?boxed\s*\{", text)]):
        inside = _until_closed(text[start:])
        if inside.strip():
            return inside
    return None


def _until_closed(text: str) -> str:
    """Return the text before the brace that closes the one in front of it; "" if it is not closed."""
    depth = 1
    for found in re.finditer(r"\\.|[{}]", text, re.DOTALL):  # \{ is not a brace
        depth += {"{": 1, "}": -1}.get(found.group(), 0)
        if depth == 0:
            return text[: found.start()]
    return ""


def _formula(line: str) -> str:
    """Return the answer with which a line begins: a formula in dollar signs, a number before words, or a sentence."""
    # A dollar sign before a digit does not end a formula, as in "$5 and $6".
    if formula := re.match(r"\$\$?((?:\\.|[^$\\])*[^$\s])\$(?!\d)|\\\((.+?)\\\)", line):
        return formula[1] or formula[2]
    if number := re.match(rf"({NUMBER})(?:\*\*)?(?:,?\s+[A-Za-z]{{2,}}.*|[.,;!]?\s*|[.;!]\s.*)$", line):
        return number[1]
    return re.split(r"[.;]\s|\.$", line, maxsplit=1)[0]
