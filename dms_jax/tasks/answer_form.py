r"""The normal form of an answer: `0.5`, `\frac12` and `$\dfrac{1}{2}$` all become `1/2`.

Numbers become exact fractions. The spelling of LaTeX is unified, following Hendrycks et al. (arXiv:2103.03874), but its
algebra is not: `2\sqrt{3}` and `\sqrt{12}` remain different. In doubtful cases, answers remain different.
"""

import re
from fractions import Fraction

DECIMAL = r"(?:\d+(?:\.\d*)?|\.\d+)"
MAX_DIGITS = 100  # longer numbers remain text: no problem has them, and Python refuses to print very long integers
MAX_LENGTH = 1000  # a longer text is not an answer and remains as it is
TEXT = r"\\(?:text|textrm|textbf|textit|mbox)\s*\{([^{}]*)\}"
# \mathrm{i} may be a number.
UNIT = rf"(?<=[0-9A-Za-z}}\])])\s*(?:{TEXT}|\\mathrm\s*\{{([^{{}}]{{2,}})\}})(?:\^\{{?\d\}}?)?\s*$"
WORDS = r"(?!(?:sin|cos|tan|cot|sec|csc|log|exp|sqrt)\b)[A-Za-z]{3,}(?:\s[A-Za-z]+)*"
SIMPLE = r"\w|\\(?!sqrt)[A-Za-z]+"  # an argument that \frac takes without braces

SPELLINGS = (  # replacements, which apply in this order
    (r",\\!\s*", ","),  # 10,\!080
    (r"\\\$|\$|(?<!\\)\\[()\[\]]", ""),  # dollars and other delimiters of a formula; not the \\[ of a matrix
    (r"\\(?:left|right|displaystyle)(?![a-z])", ""),
    (r"\\!", ""),
    (r"(?<!\\)\\[,;: ]|\\q?quad(?![a-z])|~|\u2009|\u00a0", " "),
    (r"\^\s*(?:\{\s*\\circ\s*\}|\\circ)|\\degree(?![a-z])|°", ""),
    (r"\\?%", ""),
    (r"\\[dtc]frac(?![a-z])", r"\\frac"),
    ("\u2212", "-"),
)


def normal_form(answer: str) -> str:
    """Return one text for all spellings of an answer; "" for an empty answer."""
    text = answer.strip().strip("*").strip()
    if len(text) > MAX_LENGTH:
        return text
    for pattern, replacement in SPELLINGS:
        text = re.sub(pattern, replacement, text)
    text = text.strip().rstrip(".").strip()
    text = re.sub(UNIT, "", text).strip()
    text = re.sub(TEXT, r"\1", text).strip()
    if unit := re.fullmatch(rf"([-+]?[\d,]*{DECIMAL}(?:/\d+)?)\s+{WORDS}", text):
        text = unit[1]
    if (side := re.fullmatch(r"[A-Za-z]\w?\s*(?:=|\\in(?![a-z]))\s*([^=]+)", text)) is not None:
        text = side[1]  # x = 5
    if (number := as_fraction(text)) is not None:
        return str(number)
    parts = _outer_parts(text)
    if len(parts) > 1:  # solutions in any order
        return ",".join(sorted(normal_form(part) for part in parts))
    return _latex(text)


def as_fraction(text: str) -> Fraction | None:
    r"""Return the value of texts like 1,234.50, -3/4, 1\frac{4}{5} and 6.7 \times 10^{-5}; None for other texts."""
    text = _braced(text) if "," not in text else text.strip()  # the blank in "1, 200" separates two numbers
    if len(text) > MAX_DIGITS:
        return None
    if re.fullmatch(r"[-+]?\d{1,3}(?:,\d{3})+(?:\.\d*)?", text):
        text = text.replace(",", "")
    if found := re.fullmatch(rf"([-+]?{DECIMAL})(?:(?:\\times|\\cdot)10\^\{{?(-?\d{{1,2}})\}}?)?", text):
        return _decimal(found[1]) * Fraction(10) ** int(found[2] or 0)
    if (found := re.fullmatch(rf"([-+]?{DECIMAL})/({DECIMAL})", text)) and _decimal(found[2]):
        return _decimal(found[1]) / _decimal(found[2])
    if (found := re.fullmatch(r"([-+]?)(\d*)\\frac\{(-?\d+)\}\{(-?\d+)\}", text)) and int(found[4]):
        value = int(found[2] or 0) + Fraction(int(found[3]), int(found[4]))
        return -value if found[1] == "-" else value
    return None


def _decimal(text: str) -> Fraction:
    whole, _, rest = text.partition(".")
    return Fraction(int(f"{whole}{rest}" if whole.strip("+-") or rest else "0"), 10 ** len(rest))


def _latex(text: str) -> str:
    text = re.sub(r"(?:(?<![\w}])|(?<=matrix\}))(\d+)/(\d+)(?![\w{])", r"\\frac{\1}{\2}", _braced(text))
    text = re.sub(r"([\^_])\{(\w)\}", r"\1\2", text)
    if choice := re.fullmatch(r"\(([A-Za-z])\)", text):
        return choice[1]
    return text.lower() if re.fullmatch(r"[A-Za-z]{2,}", text) else text


def _braced(text: str) -> str:
    r"""Remove blanks, and add the braces that \frac12, \frac9{19} and \sqrt2 lack."""
    text = re.sub(r"\s+", "", text)
    text = re.sub(rf"\\frac({SIMPLE})", r"\\frac{\1}", text)
    text = re.sub(rf"(\\frac\{{[^{{}}]*\}})({SIMPLE})", r"\1{\2}", text)
    return re.sub(r"\\sqrt(\w)", r"\\sqrt{\1}", text)


def _outer_parts(text: str) -> list[str]:
    """Split at the commas that are outside all brackets."""
    parts, depth = [""], 0
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return [part for part in parts if part.strip()]
