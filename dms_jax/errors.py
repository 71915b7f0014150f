"""The error for everything that a user can fix, and the helpers that its messages share.

Imports nothing of the project.
"""

import contextlib
import difflib
import reprlib
from collections.abc import Iterable, Iterator


class ConfigError(ValueError):
    """The error for everything that a user can fix.

    Its message is one line: what is wrong, where, and what to do instead.
    """


def shown(value: object) -> str:
    """The repr of a value for a message, shortened if the value is large, deep or contains itself."""
    try:
        return _SHORT.repr(value)
    except ValueError:  # an int with more digits than Python is willing to print
        return f"a {type(value).__name__} too large to print"


_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxother = 3, 80, 80


@contextlib.contextmanager
def naming(where: object) -> Iterator[None]:
    """Let the message of a ConfigError inside begin with the file or option that was being read."""
    try:
        yield
    except ConfigError as why:
        raise ConfigError(f"{where}: {why}") from why


def suggestion(name: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown name: "did you mean x?" if a known name is close, else "known: a, b, c"."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {close[0]}?" if close else f"known: {', '.join(known)}"
