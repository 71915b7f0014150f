"""Text to hide needles in: sentences of --haystack, from a random one on, again from the start where it ends."""

import random
import re
from collections.abc import Callable

from dms_jax.errors import ConfigError
from dms_jax.tasks.grid import fill

SENTENCE_END = r"(?:(?<=[.!?])|(?<=[.!?][\"'”’)\]]))\s+|\n\s*\n"
MAX_WORDS = 80  # a longer sentence (a table, code) is cut, so that prompts come close to their length


def sentences_of(text: str, name: str) -> list[str]:
    """The sentences of a text, white space as single blanks. Raises ConfigError."""
    found = []
    for sentence in re.split(SENTENCE_END, text):
        words = sentence.split()
        found += [" ".join(words[start : start + MAX_WORDS]) for start in range(0, len(words), MAX_WORDS)]
    if not found:
        raise ConfigError(
            f"{name} hides its needles in a text; give one with --haystack FILE (UTF-8, best longer than the longest prompt)"
        )
    return found


class Haystack:
    """Endless sentences; prompts of a length take as many as fit."""

    def __init__(self, text: str, name: str):
        self.sentences, self.name = sentences_of(text, name), name

    def prompt(
        self,
        needles: list[tuple[float, str]],
        frame: Callable[[str], str],
        length: int,
        count_tokens: Callable[[str], int],
        rng: random.Random,
    ) -> str:
        """`frame` around a text with each (depth, needle) in it: at depth d, a share d of the sentences stands before it.

        Needles of equal depth keep their order. The prompt has at most `length` tokens. Raises ConfigError.
        """
        start = rng.randrange(len(self.sentences))

        def prompt_of(count: int) -> str:
            text = [self.sentences[(start + i) % len(self.sentences)] for i in range(count)]
            places = sorted((round(depth * count), order) for order, (depth, _) in enumerate(needles))
            for place, order in reversed(places):  # from the end on, so that the places before it stay
                text.insert(place, needles[order][1])
            return frame(" ".join(text))

        return prompt_of(fill(prompt_of, length, count_tokens, self.name))
