"""Text of tokens that arrive a few at a time, and stop strings."""

from collections.abc import Callable, Sequence

REPLACEMENT = "\ufffd"  # a decoder shows this for bytes that do not form a character, or do not form one yet


def find_stop(text: str, stops: Sequence[str]) -> int | None:
    """Return where the first stop string begins; None if the text has none."""
    return min((at for stop in stops if (at := text.find(stop)) >= 0), default=None)


def trim_at_stop(text: str, stops: Sequence[str]) -> str:
    """Return the text before its first stop string."""
    return text[: find_stop(text, stops)]


def text_of(decode: Callable, tokens) -> str:
    """Return the text of all `tokens`; an incomplete character at the end leaves the characters before it whole.

    A decoder with byte fallback (SentencePiece) turns every byte next to an incomplete character into U+FFFD, also
    those of whole characters. `TextStream` decodes them one after the other.
    """
    text = decode(tokens)
    return TextStream(decode).push(tokens, last=True) if REPLACEMENT in text else text


class TextStream:
    """Turns the growing tokens of a row into pieces of text, which together are the text of all tokens.

    A piece ends with a complete character; the bytes of an incomplete one are held back. Text that may be the beginning
    of a stop string is held back, too. Nothing from the first stop string on is returned.
    """

    def __init__(self, decode: Callable, stops: Sequence[str] = ()):
        self.decode, self.stops = decode, tuple(stops)
        self.num_read = 0  # tokens whose text has been read
        self.num_tried = 0  # tokens at which that was tried; the text after `num_read` ended in an incomplete character
        self.context = 0  # where the previous piece began; decoded again, because a tokenizer may drop a leading space
        self.waiting, self.stopped = "", False

    def push(self, tokens, last: bool = False) -> str:
        """Return the new text, given all `tokens` of the row so far; `last` also returns the text held back."""
        if self.stopped:
            return ""
        for until in range(self.num_tried + 1, len(tokens) + 1):  # one by one: pieces do not depend on the calls
            self._read(tokens[:until])
        if last and self.num_read < len(tokens):
            self._read(tokens, last)
        if find_stop(self.waiting, self.stops) is not None:
            self.stopped = True
            return trim_at_stop(self.waiting, self.stops)
        ready = len(self.waiting) - (0 if last else _partial_stop(self.waiting, self.stops))
        text, self.waiting = self.waiting[:ready], self.waiting[ready:]
        return text

    def _read(self, tokens, last: bool = False) -> None:
        """Read the text of the tokens that are not read yet, if it ends with a complete character or is the `last`."""
        self.num_tried = len(tokens)
        before, now = self.decode(tokens[self.context : self.num_read]), self.decode(tokens[self.context :])
        if not now.startswith(before):  # an incomplete character has spoiled whole ones
            before, now = "", self.decode(tokens[self.num_read :])
        if last or not now.endswith(REPLACEMENT):
            self.waiting += now[len(before) :]
            self.context, self.num_read = self.num_read, len(tokens)


def _partial_stop(text: str, stops: Sequence[str]) -> int:
    """Return the length of the longest suffix of `text` that begins a stop string."""
    longest = min(max(map(len, stops), default=1) - 1, len(text))
    return next((n for n in range(longest, 0, -1) if any(stop.startswith(text[-n:]) for stop in stops)), 0)
