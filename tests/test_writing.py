"""The rules of docs/writing.md that a program can check: openings of docstrings and words in messages."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
FOLDERS = ("dms_jax", "train", "infer", "benchmarks")
OPENING = re.compile(r"(Of|By|With|As|In|Per|Those|That|What|None|The same)(?=[\s,.:;])")
WORD = re.compile(r"\b(wants|stands twice|is none|is no(?! longer)|otherwise|said)\b")


def docstrings(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Yield the line and the text of each docstring."""
    for node in ast.walk(tree):
        documented = isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        if documented and (text := ast.get_docstring(node)):
            yield node.body[0].lineno, text


def messages(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Yield the line and the literal text of each message of a ConfigError and of a parser's error()."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if name in ("ConfigError", "error"):
                parts = [
                    part for part in ast.walk(node) if isinstance(part, ast.Constant) and isinstance(part.value, str)
                ]
                parts.sort(key=lambda part: (part.lineno, part.col_offset))
                yield node.lineno, "…".join(str(part.value) for part in parts)


def offenses(source: str, where: str) -> list[str]:
    tree = ast.parse(source)
    found = [(line, f"docstring begins with {m[0]!r}") for line, text in docstrings(tree) if (m := OPENING.match(text))]
    found += [(line, f"message contains {m[0]!r}") for line, text in messages(tree) if (m := WORD.search(text))]
    return [f"{where}:{line}: {what}" for line, what in sorted(found)]


def test_docstrings_and_messages_follow_the_rules():
    files = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]
    found = [text for path in files for text in offenses(path.read_text(), str(path.relative_to(ROOT)))]
    assert not found, f"{len(found)} offenses against docs/writing.md:\n" + "\n".join(found)


def test_planted_offenses_are_found():
    source = (
        'def f(x):\n    """Of this process."""\n    raise ConfigError(f"`{x}` wants a number")\n'
        'class C:\n    """The same for rows."""\n    parser.error("a " f"{x} is none; " "b")\n'
    )
    assert [text.split(": ")[0] for text in offenses(source, "x.py")] == ["x.py:2", "x.py:3", "x.py:5", "x.py:6"]
    fine = (
        '"""Inside, a whole sentence."""\nraise ConfigError("x is no longer supported, nor is none_such")\n'
        'log.info("x wants y")\n'
    )
    assert offenses(fine, "x.py") == []
