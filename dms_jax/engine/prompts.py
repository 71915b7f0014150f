"""Prompts: read from files, and encoded as token ids. Imports no JAX until a prompt is encoded. Errors are
`ConfigError`."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dms_jax.errors import ConfigError
from dms_jax.files import read_jsonl, read_text

if TYPE_CHECKING:  # it loads JAX
    from dms_jax.hf.hf_tokenizer import Tokenizer

REPLY = "\ue000reply\ue000"  # stands for an answer whose tokens the cache already holds


@dataclass(frozen=True)
class Prompt:
    """One prompt, and where it came from for messages about it."""

    content: str | list[dict]  # text, or chat messages
    where: str
    record: object = None  # the line it came from, to be written next to the result


def read_prompts(path: str) -> list[Prompt]:
    """Read a file of prompts: a .txt file has one on each line, a .jsonl file an object with "prompt" or "messages" on
    each line. Blank lines are skipped."""
    kind = Path(path).suffix.lower()
    if kind not in (".txt", ".jsonl"):
        raise ConfigError(
            "--prompts must be a .txt file (a prompt on each line) or a .jsonl file "
            f"(an object with prompt or messages on each line), got {path}"
        )
    if kind == ".jsonl":
        prompts = [_from_record(record, where) for where, record in read_jsonl(path)]
    else:
        lines = enumerate(read_text(path).removeprefix("\ufeff").split("\n"), start=1)
        prompts = [Prompt(line, f"{path}, line {number}", line) for number, line in lines if line.strip()]
    if not prompts:
        raise ConfigError(f"{path} must hold at least one prompt, got none")
    return prompts


def _from_record(record: object, where: str) -> Prompt:
    if not isinstance(record, dict) or len({"prompt", "messages"} & record.keys()) != 1:
        raise ConfigError(f'{where}: a line must be an object with either "prompt" (text) or "messages" (a chat)')
    if "prompt" in record:
        if not isinstance(record["prompt"], str) or not record["prompt"]:
            raise ConfigError(f'{where}: "prompt" must be non-empty text')
        return Prompt(record["prompt"], where, record)
    messages = record["messages"]
    if not isinstance(messages, list) or not messages or not all(map(_is_message, messages)):
        raise ConfigError(
            f'{where}: "messages" must be a list of at least one {{"role": ..., "content": ...}}, both of them text'
        )
    return Prompt(messages, where, record)


def _is_message(message: object) -> bool:
    return isinstance(message, dict) and all(isinstance(message.get(key), str) for key in ("role", "content"))


@dataclass(frozen=True)
class Encoder:
    """Turns prompts into token ids, for a new cache or one that `continues`."""

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

    The chat template is applied to a conversation with a stand-in for the answer; the ids are those of the text after
    the stand-in. So the answer stays in the cache as the model gave it. `ended_by` is the id that ended the answer and
    is therefore in the cache already; None means a loaded cache, whose last answer is taken to be complete.
    """
    text = tokenizer.chat_text(
        [*with_system(system, [{"role": "user", "content": "x"}]), {"role": "assistant", "content": REPLY}, *messages],
        reply=True,
    )
    _, found, rest = text.rpartition(REPLY)
    if not found:
        raise ConfigError(
            f"the chat template of {tokenizer.where} does not repeat earlier answers, so this conversation cannot be "
            "continued; start a new one"
        )
    ids = tokenizer.encode(rest)
    ended_by = tokenizer.eos_id if ended_by is None else ended_by
    return ids[1:] if ids.size and ids[0] == ended_by else ids


def with_system(system: str | None, messages: list[dict]) -> list[dict]:
    return messages if system is None else [{"role": "system", "content": system}, *messages]


def check_text(prompt: Prompt) -> None:
    """Refuse text that no tokenizer can take: a shell passes bytes that are not UTF-8 as lone surrogates, and JSON can
    spell them."""
    for text in [prompt.content] if isinstance(prompt.content, str) else [m["content"] for m in prompt.content]:
        try:
            text.encode()
        except UnicodeEncodeError as why:
            raise ConfigError(f"{prompt.where} is not valid UTF-8 at character {why.start}") from why
