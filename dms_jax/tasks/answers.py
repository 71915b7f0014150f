r"""Find the answer in a text that reasons: \boxed{...}, `#### N`, `the answer is N`, else the last number.

"Half of 84 is 42, plus 6 is 48.\n#### 48"  ->  "48"
"""

import re

from dms_jax.tasks.answer_form import DECIMAL, normal_form

NUMBER = rf"(?:(?<![\w)])-)?\\?\$?(?:\d{{1,3}}(?:,\d{{3}})+(?:\.\d+)?(?!\d)|{DECIMAL})(?:/\d+)?"
# Possessive quantifiers keep the time linear: the text comes from a model, and a run of blanks has many divisions.
ANSWER_IS = r"(?i)\banswer\s*+(?:is\s*+:?|:|=)[\s*]*(?=\S)"


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
    starts = [found.end() for found in re.finditer(r"\\f?boxed\s*\{", text)]
    ends = _ends(text) if starts else {}
    inside = (text[start : ends[start]] for start in reversed(starts) if start in ends)
    return next((content for content in inside if content.strip()), None)


def _ends(text: str) -> dict[int, int]:
    """Return the position of the brace that closes each brace, by the position after the opening one."""
    ends, open_braces = {}, []
    for found in re.finditer(r"\\.|[{}]", text, re.DOTALL):  # \{ is not a brace
        if found.group() == "{":
            open_braces.append(found.end())
        elif found.group() == "}" and open_braces:
            ends[open_braces.pop()] = found.start()
    return ends


def _formula(line: str) -> str:
    """Return the answer with which a line begins: a formula in dollar signs, a number before words, or a sentence."""
    # A dollar sign before a digit does not end a formula, as in "$5 and $6".
    if formula := re.match(r"\$\$?((?:\\.|[^$\\])*[^$\s])\$(?!\d)|\\\((.+?)\\\)", line):
        return formula[1] or formula[2]
    if number := re.match(rf"({NUMBER})(?:\*\*)?(?:,?\s+[A-Za-z]{{2,}}.*|[.,;!]?\s*|[.;!]\s.*)$", line):
        return number[1]
    return re.split(r"[.;]\s|\.$", line, maxsplit=1)[0]
