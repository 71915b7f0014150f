"""The error for whatever a user can mend, and the helpers that its messages share. Imports nothing of the project."""

import contextlib
import difflib
import reprlib
from collections.abc import Iterable, Iterator


class ConfigError(ValueError):
    """A configuration that cannot work: what, where, and the way out, in one line."""


def shown(value: object) -> str:
    """A value for a message: its repr, but short however large, deep or self-containing it is."""
    try:
        return _SHORT.repr(value)
    except ValueError:  # an int of more digits than Python writes
        return f"a {type(value).__name__} too large to print"


_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxother = 3, 80, 80


@contextlib.contextmanager
def naming(where: object) -> Iterator[None]:
    """Errors of what is read inside begin with the file, or the option, that it came from."""
    try:
        yield
    except ConfigError as why:
        raise ConfigError(f"{where}: {why}") from why


def suggestion(name: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown name: "did you mean x?" where a known one is close, else "known: a, b, c"."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {close[0]}?" if close else f"known: {', '.join(known)}"
