"""Paragraphs of SQuAD with their questions, as used by the encyclopaedia, the chats and the hidden facts."""

import random
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from dms_jax.tasks.haystack import sentences_of

MAX_QUESTIONS = 5  # per paragraph


class Passage(NamedTuple):
    """A paragraph of an article."""

    title: str  # of the article
    text: str
    questions: list[tuple[str, str]]  # (question, answer), in the order of the file

    @property
    def sentences(self) -> list[str]:
        return sentences_of(self.text, self.title)


def passages_of(article: dict) -> list[Passage]:
    """Read an article of SQuAD's JSON. Questions without an answer are left out."""
    title = article["title"].replace("_", " ")
    found = []
    for paragraph in article["paragraphs"]:
        answered = [question for question in paragraph.get("qas", []) if question.get("answers")]
        questions = [(question["question"].strip(), question["answers"][0]["text"]) for question in answered]
        found.append(Passage(title, paragraph["context"], questions[:MAX_QUESTIONS]))
    return found


def encyclopaedia(articles: Sequence[Sequence[Passage]], seed: int) -> Iterator[str]:
    """Yield one document per article: its paragraphs, and after every one to four of them questions and answers.

    Most questions are about the paragraphs since the last questions, and some are about one of the eight before.
    """
    for passages in articles:
        rng = random.Random(f"{seed}/encyclopaedia/{passages[0].title if passages else ''}")
        blocks, first = [passages[0].title] if passages else [], 0
        unasked = [list(passage.questions) for passage in passages]
        while first < len(passages):
            end = min(first + rng.randint(1, 4), len(passages))
            blocks += [passage.text for passage in passages[first:end]]
            asked = [unasked[i].pop(0) for i in range(first, end) for _ in range(2) if unasked[i]]
            earlier = [i for i in range(max(0, first - 8), first) if unasked[i]]
            asked += [unasked[i].pop(0) for i in sorted(rng.sample(earlier, min(len(earlier), 3)))]
            if asked:
                blocks.append("\n".join(f"Question: {question}\nAnswer: {answer}" for question, answer in asked))
            first = end
        yield "\n\n".join(blocks)
