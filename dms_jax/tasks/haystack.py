"""The text in which needles are hidden: the sentences of --haystack from a random one on, starting over at the end."""

import random
import re
from collections.abc import Callable

from dms_jax.errors import ConfigError
from dms_jax.tasks.grid import fill

SENTENCE_END = r"(?:(?<=[.!?])|(?<=[.!?][\"'”’)\]]))\s+|\n\s*\n"
MAX_WORDS = 80  # longer sentences (tables, code) are split, so that prompts come close to their length


def sentences_of(text: str, name: str) -> list[str]:
    """Split a text into sentences and collapse white space. `name` is the task, for the error message."""
    found = []
    for sentence in re.split(SENTENCE_END, text):
        words = sentence.split()
        found += [" ".join(words[start : start + MAX_WORDS]) for start in range(0, len(words), MAX_WORDS)]
    if not found:
        raise ConfigError(
            f"--haystack must be a text in which {name} can hide its needles; "
            "give --haystack FILE (UTF-8, preferably longer than the longest prompt)"
        )
    return found


class Haystack:
    """An endless supply of sentences, from which a prompt takes as many as fit."""

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
        """Apply `frame` to a text in which each (depth, needle) is hidden, with a fraction `depth` of the sentences
        before the needle.

        Needles of equal depth keep their order. The prompt has at most `length` tokens. Raises ConfigError if not even
        the needles fit.
        """
        start = rng.randrange(len(self.sentences))

        def prompt_of(count: int) -> str:
            text = [self.sentences[(start + i) % len(self.sentences)] for i in range(count)]
            places = sorted((round(depth * count), order) for order, (depth, _) in enumerate(needles))
            for place, order in reversed(places):  # backwards, so that earlier places stay valid
                text.insert(place, needles[order][1])
            return frame(" ".join(text))

        return prompt_of(fill(prompt_of, length, count_tokens, self.name))
