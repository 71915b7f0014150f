"""Read prompts from files, and encode them as token ids. Imports no JAX until a prompt is encoded.

Errors are `ConfigError`.
"""

import bisect
import functools
import itertools
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from dms_jax.chat_records import Chat, prompt_of
from dms_jax.errors import ConfigError
from dms_jax.files import RECORD_KINDS, kind_of, kinds_allowed, read_records, read_text

if TYPE_CHECKING:  # it loads JAX
    from dms_jax.hf.hf_tokenizer import Tokenizer

NOT_ENDED = -1  # not a token id: the last answer in a cache has no end yet, so the next turn must supply it


@dataclass(frozen=True)
class Prompt:
    """One prompt, and where it came from, for messages about it."""

    content: str | list[dict]  # text, or chat messages
    where: str
    record: object = None  # the input line, which is written next to the result
    tools: list | None = None  # the tools of a chat, for the template


def read_prompts(path: str) -> list[Prompt]:
    """Read a file of prompts, skipping blank lines.

    A .txt file has one prompt per line; a .jsonl, .ndjson or .json file has records of the shapes that
    `chat_records.prompt_of` reads. Each may be packed (.gz, .zst).
    """
    kind = kind_of(path, (".txt", *RECORD_KINDS))
    if not kind:
        kinds = (
            ".txt (a prompt on each line) or .jsonl (an object with prompt or messages on each line), .ndjson, .json, "
            "each also packed (.gz, .zst)"
        )
        raise ConfigError(f"--prompts {kinds_allowed(path, kinds)}")
    if kind == ".txt":
        lines = enumerate(read_text(path).removeprefix("\ufeff").split("\n"), start=1)
        prompts = [Prompt(line, f"{path}, line {number}", line) for number, line in lines if line.strip()]
    else:
        found = [(prompt_of(record, where), where, record) for where, record in read_records(path)]
        prompts = [Prompt(*one, tools=one[0].tools if isinstance(one[0], Chat) else None) for one in found]
    if not prompts:
        raise ConfigError(f"{path} must hold at least one prompt, got none")
    return prompts


@dataclass(frozen=True)
class Encoder:
    """Turns prompts into token ids, for a new cache, or for a cache with an earlier turn if `continues` is set."""

    tokenizer: "Tokenizer"
    system: str | None = None  # the system message of a chat
    as_chat: bool = False  # put plain prompts into the chat template
    continues: bool = False
    ended_by: int | None = None  # of the earlier turn, as in `next_turn`
    control_tokens: bool = False  # read control tokens in the text of a user as such, not as text

    def __call__(self, prompt: Prompt) -> np.ndarray:
        """Return ids [T], T >= 1."""
        check_text(prompt)
        ids = self._ids(prompt)
        if not ids.size:
            raise ConfigError(f"{prompt.where}: the prompt is empty; give at least one token")
        return ids

    def _ids(self, prompt: Prompt) -> np.ndarray:
        content = prompt.content
        if isinstance(content, str) and not self.as_chat:
            from dms_jax.hf.hf_tokenizer import prompt_ids  # imports JAX, which is not loaded yet when files are read

            as_such = self.control_tokens or rendered_by(self.tokenizer, content) is not None
            encode = self.tokenizer.encode if self.continues else functools.partial(prompt_ids, self.tokenizer)
            return encode(content, control_tokens=as_such)
        messages = [{"role": "user", "content": content}] if isinstance(content, str) else content
        if self.continues:
            return next_turn(
                self.tokenizer,
                self.system,
                messages,
                self.ended_by,
                tools=prompt.tools,
                control_tokens=self.control_tokens,
            )
        return self.tokenizer.encode_chat(
            with_system(self.system, messages), reply=True, tools=prompt.tools, control_tokens=self.control_tokens
        )

    def notice(self, prompt: Prompt) -> str:
        """Return a sentence about how the control tokens in a prompt are read; "" if it spells none."""
        texts = [prompt.content] if isinstance(prompt.content, str) else [m.get("content") for m in prompt.content]
        found = [
            token
            for token in self.tokenizer.special_ids
            if token and any(token in text for text in texts if isinstance(text, str))
        ]
        if not found or self.control_tokens:
            return ""
        if isinstance(prompt.content, str) and not self.as_chat and rendered_by(self.tokenizer, prompt.content):
            return f"{prompt.where} begins like a rendered chat, so its control tokens are read as such"
        return (
            f"{prompt.where} spells control tokens ({', '.join(found[:3])}), which are read as text; "
            "give --allow-control-tokens to read them as such"
        )


def rendered_by(tokenizer: "Tokenizer", text: str) -> str | None:
    """Return the control token with which `text` begins if a rendered chat begins with it, too; else None.

    That is the token that begins every text, or the one with which the chat template begins.
    """
    first = next((token for token in tokenizer.special_ids if token and text.startswith(token)), None)
    if first is None or tokenizer.special_ids[first] == tokenizer.bos_id or not tokenizer.has_chat_template:
        return first if first is not None and tokenizer.special_ids[first] == tokenizer.bos_id else None
    try:
        return first if tokenizer.chat_text([{"role": "user", "content": "x"}]).startswith(first) else None
    except ConfigError:  # the template refuses this chat, so it cannot say
        return None


def next_turn(
    tokenizer: "Tokenizer",
    system: str | None,
    messages: list[dict],
    ended_by: int | None = None,
    *,
    tools: list | None = None,
    control_tokens: bool = True,
) -> np.ndarray:
    """Return the ids that bring a cache of unknown text from the end of an answer to the beginning of the next one.

    The chat template is applied to a conversation with a placeholder for the answer; the ids after the placeholder are
    those that do not depend on it. `ended_by` is the id that ended the answer in the cache, NOT_ENDED if it has no end
    yet, and None if that is unknown: then it is the end-of-text id.
    """
    question = with_system(system, [{"role": "user", "content": "x"}])
    one, other = (
        tokenizer.encode_chat(
            [*question, {"role": "assistant", "content": answer}, *messages],
            reply=True,
            tools=tools,
            control_tokens=control_tokens,
        )
        for answer in _two_words(tokenizer)
    )
    if np.array_equal(one, other):
        raise ConfigError(
            f"the chat template of {tokenizer.where} must repeat earlier answers to continue a conversation, but it "
            "does not; start a new conversation"
        )
    length = min(len(one), len(other))
    ids = one[len(one) - int(np.argmin(np.append(one[::-1][:length] == other[::-1][:length], False))) :]
    ends = np.flatnonzero(ids == (tokenizer.eos_id if ended_by is None else ended_by))
    # Some templates put a space or a line break in front of the end of an answer.
    if ends.size and not tokenizer.decode(ids[: ends[0]], skip_special_tokens=False).strip():
        return ids[ends[0] + 1 :]
    return ids


def _two_words(tokenizer: "Tokenizer") -> tuple[str, str]:
    """Return two words of which the last ids differ."""
    words = itertools.chain("ab01", (tokenizer.decode([i]).strip() for i in range(len(tokenizer))))
    first = None  # a word, and its last id
    for word in words:
        if word.isalnum() and (ids := tokenizer.encode(word)).size:
            first = first or (word, ids[-1])
            if ids[-1] != first[1]:
                return first[0], word
    raise ConfigError(f"{tokenizer.where} must have at least two words in its vocabulary to continue a conversation")


def continuation(tokenizer: "Tokenizer", seen: np.ndarray, whole: np.ndarray) -> np.ndarray | None:
    """Return the ids of a conversation `whole` that follow those that a cache has `seen`; None if it is another one.

    A model may spell its answer with other ids than the tokenizer does. The cache then keeps the ids of the model, and
    the texts are compared.
    """
    if np.array_equal(whole[: len(seen)], seen):
        return whole[len(seen) :]
    text = functools.partial(tokenizer.decode, skip_special_tokens=False)
    wanted = text(seen)
    number = bisect.bisect_left(range(len(whole)), len(wanted), key=lambda number: len(text(whole[:number])))
    return whole[number:] if text(whole[:number]) == wanted else None


def with_system(system: str | None, messages: list[dict]) -> list[dict]:
    if system is None:
        return messages
    if messages and messages[0].get("role") == "system":
        raise ConfigError("--system must not be given for a chat that begins with a system message; leave one out")
    return [{"role": "system", "content": system}, *messages]


def check_text(prompt: Prompt) -> None:
    """Refuse lone surrogates, which no tokenizer can encode.

    A shell passes bytes that are not UTF-8 as lone surrogates, and JSON can spell them.
    """
    whole = json.dumps([prompt.record, prompt.content], ensure_ascii=False)  # the record is written, too
    for text in [prompt.content if isinstance(prompt.content, str) else "", whole]:
        try:
            text.encode()
        except UnicodeEncodeError as why:
            raise ConfigError(f"{prompt.where} is not valid UTF-8 at character {why.start}") from why
