"""Read prompts from files, and encode them as token ids. Imports no JAX until a prompt is encoded.

Errors are `ConfigError`.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from dms_jax.chat_records import Chat, prompt_of
from dms_jax.errors import ConfigError
from dms_jax.files import RECORD_KINDS, kind_of, kinds_allowed, read_records, read_text

if TYPE_CHECKING:  # it loads JAX
    from dms_jax.hf.hf_tokenizer import Tokenizer

REPLY = "\ue000reply\ue000"  # placeholder for an answer whose tokens are already in the cache


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
            ".txt (a prompt on each line) or .jsonl (an object with prompt or messages on each line), .ndjson, .json"
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

    def __call__(self, prompt: Prompt) -> np.ndarray:
        """Return ids [T], T >= 1."""
        check_text(prompt)
        ids = self._ids(prompt.content)
        if not ids.size:
            raise ConfigError(f"{prompt.where}: the prompt is empty; give at least one token")
        return ids

    def _ids(self, content: str | list[dict]) -> np.ndarray:
        if isinstance(content, str) and not self.as_chat:
            from dms_jax.hf.hf_tokenizer import prompt_ids  # imports JAX, which is not loaded yet when files are read

            return self.tokenizer.encode(content) if self.continues else prompt_ids(self.tokenizer, content)
        messages = [{"role": "user", "content": content}] if isinstance(content, str) else content
        if self.continues:
            return next_turn(self.tokenizer, self.system, messages)
        return self.tokenizer.encode_chat(with_system(self.system, messages), reply=True)


def next_turn(tokenizer, system: str | None, messages: list[dict], ended_by: int | None = None) -> np.ndarray:
    """Return the ids that bring a cache from the end of one answer to the beginning of the next.

    The chat template is applied to a conversation with a placeholder for the answer, and the text after the placeholder
    is encoded. The answer thus stays in the cache exactly as the model generated it. `ended_by` is the id that ended
    the answer and that is therefore already in the cache; None means a loaded cache, whose last answer ended at the
    end-of-text id.
    """
    text = tokenizer.chat_text(
        [*with_system(system, [{"role": "user", "content": "x"}]), {"role": "assistant", "content": REPLY}, *messages],
        reply=True,
    )
    _, found, rest = text.rpartition(REPLY)
    if not found:
        raise ConfigError(
            f"the chat template of {tokenizer.where} must repeat earlier answers to continue a conversation, but it "
            "does not; start a new conversation"
        )
    ids = tokenizer.encode(rest)
    ended_by = tokenizer.eos_id if ended_by is None else ended_by
    return ids[1:] if ids.size and ids[0] == ended_by else ids


def with_system(system: str | None, messages: list[dict]) -> list[dict]:
    return messages if system is None else [{"role": "system", "content": system}, *messages]


def check_text(prompt: Prompt) -> None:
    """Refuse lone surrogates, which no tokenizer can encode.

    A shell passes bytes that are not UTF-8 as lone surrogates, and JSON can spell them.
    """
    for text in [prompt.content] if isinstance(prompt.content, str) else [m["content"] for m in prompt.content]:
        try:
            text.encode()
        except UnicodeEncodeError as why:
            raise ConfigError(f"{prompt.where} is not valid UTF-8 at character {why.start}") from why
