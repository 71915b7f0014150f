"""Text of tokens that arrive a few at a time, and stop strings."""

from collections.abc import Sequence

REPLACEMENT = "\ufffd"  # a decoder shows this for bytes that do not form a character, or do not form one yet


def find_stop(text: str, stops: Sequence[str]) -> int | None:
    """Return where the first stop string begins; None if the text has none."""
    return min((at for stop in stops if (at := text.find(stop)) >= 0), default=None)


def trim_at_stop(text: str, stops: Sequence[str]) -> str:
    """Return the text before its first stop string."""
    return text[: find_stop(text, stops)]


class TextStream:
    """Turns the growing tokens of a row into pieces of text, which together are the text of all tokens.

    A piece ends with a complete character; the bytes of an incomplete one are held back. Text that may be the beginning
    of a stop string is held back, too. Nothing from the first stop string on is returned.
    """

    def __init__(self, decode, stops: Sequence[str] = ()):
        self.decode, self.stops = decode, tuple(stops)
        self.num_read = 0  # tokens whose text has been read
        self.context = 0  # where the previous piece began; decoded again, because a tokenizer may drop a leading space
        self.waiting, self.stopped = "", False

    def push(self, tokens, last: bool = False) -> str:
        """Return the new text, given all `tokens` of the row so far; `last` also returns the text held back."""
        if self.stopped:
            return ""
        before, now = self.decode(tokens[self.context : self.num_read]), self.decode(tokens[self.context :])
        if last or not now.endswith(REPLACEMENT):
            self.waiting += now[len(before) :]
            if len(tokens) > self.num_read:
                self.context, self.num_read = self.num_read, len(tokens)
        if find_stop(self.waiting, self.stops) is not None:
            self.stopped = True
            return trim_at_stop(self.waiting, self.stops)
        ready = len(self.waiting) - (0 if last else _partial_stop(self.waiting, self.stops))
        text, self.waiting = self.waiting[:ready], self.waiting[ready:]
        return text


def _partial_stop(text: str, stops: Sequence[str]) -> int:
    """Return the length of the longest suffix of `text` that begins a stop string."""
    longest = min(max(map(len, stops), default=1) - 1, len(text))
    return next((n for n in range(longest, 0, -1) if any(stop.startswith(text[-n:]) for stop in stops)), 0)
