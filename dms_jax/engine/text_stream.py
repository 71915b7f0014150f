"""Text from tokens that come a few at a time."""

from collections.abc import Sequence

from dms_jax.engine.generation_config import find_stop

REPLACEMENT = "\ufffd"  # what a decoder shows for bytes that are no whole character, or not yet


class TextStream:
    """Turns the growing tokens of a row into pieces of text that, joined, are the text of all of them.

    A piece ends with a whole character: bytes of one that is still coming wait for the rest. With stop strings, whatever may
    become one waits too, and nothing from the first one on comes out.
    """

    def __init__(self, decode, stops: Sequence[str] = ()):
        self.decode, self.stops = decode, tuple(stops)
        self.read, self.context = (
            0,
            0,
        )  # tokens turned into text; where the last piece began, without which a next one may lack its space
        self.waiting, self.stopped = "", False

    def push(self, tokens, last: bool = False) -> str:
        """The new text of all `tokens` so far; `last` lets go of what still waits."""
        if self.stopped:
            return ""
        before, now = self.decode(tokens[self.context : self.read]), self.decode(tokens[self.context :])
        if last or not now.endswith(REPLACEMENT):
            self.waiting += now[len(before) :]
            if len(tokens) > self.read:
                self.context, self.read = self.read, len(tokens)
        cut = find_stop(self.waiting, self.stops)
        if cut is not None:
            self.stopped, ready = True, self.waiting[:cut]
        else:
            held = 0 if last else _held(self.waiting, self.stops)
            ready, self.waiting = self.waiting[: len(self.waiting) - held], self.waiting[len(self.waiting) - held :]
        return ready


def _held(text: str, stops: Sequence[str]) -> int:
    """The length of the longest end of `text` with which a stop string begins."""
    longest = max(map(len, stops), default=1) - 1
    return next(
        (n for n in range(min(longest, len(text)), 0, -1) if any(stop.startswith(text[-n:]) for stop in stops)), 0
    )
