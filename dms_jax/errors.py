"""`ConfigError`, raised for every mistake that a user can fix, and helpers for the text of its messages.

This module imports nothing from the project.
"""

import contextlib
import difflib
import reprlib
from collections.abc import Callable, Iterable, Iterator

_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxother = 3, 80, 80
_full_tracebacks = False


class ConfigError(ValueError):
    """A mistake that a user can fix: in an option, a configuration or a file.

    The message is one line that says what is wrong, where, and what to do instead. IPython shows this line alone, also
    if another error caused it, until `full_tracebacks(True)`.
    """

    @property
    def _render_traceback_(self) -> Callable[..., list[str]]:
        """IPython calls this in place of its own traceback; without the attribute, it shows all frames."""
        if _full_tracebacks:
            raise AttributeError("_render_traceback_")
        return lambda *_: [f"{type(self).__name__}: {self}"]


def full_tracebacks(shown: bool) -> None:
    """Let IPython show all frames of a ConfigError (True), or its one line (False, as at the start)."""
    global _full_tracebacks
    _full_tracebacks = shown


def shown(value: object) -> str:
    """Return the repr of a value for a message, shortened if the value is large, deeply nested or contains itself."""
    try:
        return _SHORT.repr(value)
    except ValueError:  # an int with more digits than Python is willing to print
        return f"a {type(value).__name__} too large to print"


@contextlib.contextmanager
def naming(where: object) -> Iterator[None]:
    """Put `where`, the file or option being read, in front of the message of any ConfigError raised inside."""
    try:
        yield
    except ConfigError as why:
        raise ConfigError(f"{where}: {why}") from why


def suggestion(name: str, known: Iterable[str]) -> str:
    """Return "did you mean x?" if `name` is close to a known name, else "known: a, b, c": the end of a message."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {close[0]}?" if close else f"known: {', '.join(known)}"
