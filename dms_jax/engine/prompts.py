"""Prompts: out of files, and as token ids."""

import codecs
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dms_jax.errors import ConfigError

REPLY = "\ue000reply\ue000"  # stands for an answer whose tokens the cache already holds


@dataclass(frozen=True)
class Prompt:
    """One prompt, and where it came from for messages about it."""

    content: str | list[dict]  # text, or chat messages
    where: str
    record: object = None  # the line it came from, to be written next to the result


def read_prompts(path: str) -> list[Prompt]:
    """The prompts in a file: .txt has one on each line, .jsonl an object with "prompt" or "messages". Blank lines are left out.

    Raises ConfigError, naming the line.
    """
    kind = Path(path).suffix.lower()
    if kind not in (".txt", ".jsonl"):
        raise ConfigError(
            f"--prompts {path}: the name must end in .txt (a prompt a line) or .jsonl (an object with prompt or messages a line)"
        )
    try:
        content = Path(path).read_bytes().removeprefix(codecs.BOM_UTF8)
    except OSError as why:
        raise ConfigError(f"cannot read {path}: {why.strerror or why}") from why
    prompts = []
    for number, line in enumerate(content.splitlines(), start=1):
        where = f"{path}, line {number}"
        try:
            text = line.decode()
        except UnicodeDecodeError as why:
            raise ConfigError(f"{where} is not UTF-8: {why.reason} at byte {why.start}; convert the file") from why
        if text.strip():
            prompts.append(Prompt(text, where, text) if kind == ".txt" else _from_json(text, where))
    if not prompts:
        raise ConfigError(f"{path} holds no prompt")
    return prompts


def _from_json(line: str, where: str) -> Prompt:
    try:
        record = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as why:
        raise ConfigError(f"{where} is not valid JSON: {why}") from why
    if not isinstance(record, dict) or len({"prompt", "messages"} & record.keys()) != 1:
        raise ConfigError(f'{where}: give an object with either "prompt" (text) or "messages" (a chat)')
    content = record.get("prompt", record.get("messages"))
    if isinstance(content, list):
        right = all(
            isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str)
            for m in content
        )
        if "messages" not in record or not content or not right:
            raise ConfigError(
                f'{where}: "messages" must be a list of {{"role": ..., "content": ...}} with text, at least one'
            )
    elif not isinstance(content, str) or "prompt" not in record or not content:
        raise ConfigError(
            f'{where}: "{"prompt" if "prompt" in record else "messages"}" must be '
            + ("text that is not empty" if "prompt" in record else "a list")
        )
    return Prompt(content, where, record)


class Encoder:
    """Prompts to token ids, for a new cache or one that `continues`."""

    def __init__(self, tokenizer, system: str | None = None, as_chat: bool = False, continues: bool = False):
        self.tokenizer, self.system, self.as_chat, self.continues = tokenizer, system, as_chat, continues

    def __call__(self, prompt: Prompt) -> np.ndarray:
        """Ids [T], T >= 1. Raises ConfigError."""
        check_text(prompt)
        ids = self._ids(prompt.content)
        if not ids.size:
            raise ConfigError(f"{prompt.where}: the prompt is empty; give at least one token")
        return ids

    def _ids(self, content) -> np.ndarray:
        if isinstance(content, str) and not self.as_chat:
            from dms_jax.hf.hf_tokenizer import prompt_ids  # with JAX, which is not there yet when files are read

            return self.tokenizer.encode(content) if self.continues else prompt_ids(self.tokenizer, content)
        messages = [{"role": "user", "content": content}] if isinstance(content, str) else content
        if self.continues:
            return next_turn(self.tokenizer, self.system, messages)
        return self.tokenizer.encode_chat(with_system(self.system, messages), reply=True)


def next_turn(tokenizer, system: str | None, messages: list[dict], ended_by: int | None = None) -> np.ndarray:
    """Ids that bring a cache from the end of an answer to the beginning of the next one.

    The template is applied to a conversation with a stand-in for the answer, and what follows the stand-in is taken: the answer
    stays in the cache as the model gave it. `ended_by`: the id that ended it, which is then not given again; None: a loaded
    cache, whose last answer is taken to be complete.
    """
    text = tokenizer.chat_text(
        [*with_system(system, [{"role": "user", "content": "x"}]), {"role": "assistant", "content": REPLY}, *messages],
        reply=True,
    )
    _, found, rest = text.rpartition(REPLY)
    if not found:
        raise ConfigError(
            f"the chat template of {tokenizer.where} does not repeat an earlier answer, so this conversation cannot go on; start anew"
        )
    ids = tokenizer.encode(rest)
    ended_by = tokenizer.eos_id if ended_by is None else ended_by
    return ids[1:] if ids.size and ids[0] == ended_by else ids


def with_system(system: str | None, messages: list[dict]) -> list[dict]:
    return messages if system is None else [{"role": "system", "content": system}, *messages]


def check_text(prompt: Prompt) -> None:
    """Refuse text that no tokenizer can take: a shell passes bytes that are no UTF-8 as lone surrogates, JSON can spell them."""
    for text in [prompt.content] if isinstance(prompt.content, str) else [m["content"] for m in prompt.content]:
        try:
            text.encode()
        except UnicodeEncodeError as why:
            raise ConfigError(f"{prompt.where} holds what is not valid UTF-8, at character {why.start}") from why
