"""Text to hide needles in: the sentences of --haystack, beginning with a random one, and from the start again at its
end."""

import random
import re
from collections.abc import Callable

from dms_jax.errors import ConfigError
from dms_jax.tasks.grid import fill

SENTENCE_END = r"(?:(?<=[.!?])|(?<=[.!?][\"'”’)\]]))\s+|\n\s*\n"
MAX_WORDS = 80  # longer sentences (a table, code) are cut, so that prompts come close to their length


def sentences_of(text: str, name: str) -> list[str]:
    """Split a text into sentences, with single blanks for white space. `name` is the task that needs them."""
    found = []
    for sentence in re.split(SENTENCE_END, text):
        words = sentence.split()
        found += [" ".join(words[start : start + MAX_WORDS]) for start in range(0, len(words), MAX_WORDS)]
    if not found:
        raise ConfigError(
            f"{name} hides its needles in a text; "
            "give one with --haystack FILE (UTF-8, preferably longer than the longest prompt)"
        )
    return found


class Haystack:
    """An endless supply of sentences, of which a prompt takes as many as fit."""

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
        """Apply `frame` to a text in which each (depth, needle) is hidden: a fraction `depth` of the sentences precedes
        the needle.

        Needles of equal depth keep their order. The prompt has at most `length` tokens. Raises ConfigError if nothing
        fits.
        """
        start = rng.randrange(len(self.sentences))

        def prompt_of(count: int) -> str:
            text = [self.sentences[(start + i) % len(self.sentences)] for i in range(count)]
            places = sorted((round(depth * count), order) for order, (depth, _) in enumerate(needles))
            for place, order in reversed(places):  # from the end, so that earlier places stay valid
                text.insert(place, needles[order][1])
            return frame(" ".join(text))

        return prompt_of(fill(prompt_of, length, count_tokens, self.name))
