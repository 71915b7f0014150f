"""Tokenizers: text to token ids and back, for a model folder, a hub id or a GGUF file."""

import functools
import hashlib
import os
import tempfile
from typing import Any

import numpy as np

from dms_jax.errors import ConfigError
from dms_jax.hf.byte_fallback import REPLACEMENT, whole_characters
from dms_jax.hf.folder import resolve
from dms_jax.hf.gguf.gguf_tokenizer import write_tokenizer

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")


class Tokenizer:
    """A wrapper with the few methods that this package needs around a tokenizer of transformers. Ids are int32."""

    def __init__(self, tokenizer, where: str):
        self.inner, self.where = tokenizer, where

    def encode(self, text: str, *, control_tokens: bool = True) -> np.ndarray:
        """Return the ids [T] of a text, without `bos_id`, which the model expects before a document if `add_bos`."""
        out = self.inner(text, add_special_tokens=False, verbose=False, split_special_tokens=not control_tokens)
        return np.asarray(out["input_ids"], np.int32)

    def encode_chat(
        self, messages: list[dict], *, reply: bool = False, tools: list | None = None, control_tokens: bool = True
    ) -> np.ndarray:
        """Return the ids [T] of `[{"role": ..., "content": ...}, ...]` in the chat template; `reply` opens the
        answer."""
        return self.encode(self.chat_text(messages, reply=reply, tools=tools))

    @functools.cached_property
    def special_ids(self) -> dict[str, int]:
        return {token.content: id_ for id_, token in self.inner.added_tokens_decoder.items() if token.special}

    def chat_text(self, messages: list[dict], *, reply: bool = False, tools: list | None = None) -> str:
        """Return the text that `encode_chat` encodes."""
        if not self.has_chat_template:
            raise ConfigError(f"{self.where} has no chat template; use plain text")
        try:
            return self.inner.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=reply)
        except Exception as why:  # a template may raise anything
            raise ConfigError(
                f"the chat template of {self.where} refuses these messages: {' '.join(str(why).split())}"
            ) from why

    def decode(self, ids, *, skip_special_tokens: bool = True) -> str:
        ids = np.asarray(ids).tolist()
        text = self.inner.decode(ids, skip_special_tokens=skip_special_tokens)
        return whole_characters(self.inner, ids, text, skip_special_tokens) if REPLACEMENT in text else text

    def __len__(self) -> int:
        """The number of ids that the tokenizer can produce. The model's vocabulary may be padded beyond it."""
        return len(self.inner)

    @property
    def has_chat_template(self) -> bool:
        return getattr(self.inner, "chat_template", None) is not None

    @property
    def bos_id(self) -> int | None:
        return self.inner.bos_token_id

    @property
    def eos_id(self) -> int | None:
        return self.inner.eos_token_id

    @functools.cached_property
    def add_bos(self) -> bool:
        """Whether the tokenizer begins a text with a BOS by default (Llama 3 does, Qwen and SmolLM2 do not)."""
        return self.bos_id is not None and self.inner("a")["input_ids"][:1] == [self.bos_id]

    @functools.cached_property
    def hash(self) -> str:
        """The sha256 of vocabulary, merges, rules and chat template. Tokenizers with equal hashes produce equal ids."""
        backend = getattr(self.inner, "backend_tokenizer", None)
        rules = backend.to_str() if backend is not None else repr(sorted(self.inner.get_vocab().items()))
        return hashlib.sha256(f"{rules}\n{getattr(self.inner, 'chat_template', None)}".encode()).hexdigest()


def prompt_ids(tokenizer: Tokenizer, text: str, *, control_tokens: bool = True) -> np.ndarray:
    """Return the ids [T] of a text that begins a row, after `bos_id` if the model expects it before a document.

    A text that already begins with `bos_id`, as a rendered chat does, gets no second one.
    """
    ids = tokenizer.encode(text, control_tokens=control_tokens)
    begins = not tokenizer.add_bos or (ids.size and ids[0] == tokenizer.bos_id)
    return ids if begins else np.concatenate([np.array([tokenizer.bos_id], np.int32), ids])


def load_tokenizer(path: str | os.PathLike[str]) -> Tokenizer:
    """Load the tokenizer of a model folder, hub id or GGUF file.

    No remote code is run, and a local path needs no network.
    """
    path = resolve(path)
    if os.path.isfile(path):
        with tempfile.TemporaryDirectory() as folder:
            write_tokenizer(path, folder)
            return Tokenizer(_read(folder, path), path)
    return Tokenizer(_read(path, path), path)


def _read(folder: str, where: str):
    if not any(os.path.exists(os.path.join(folder, name)) for name in TOKENIZER_FILES):
        raise ConfigError(
            f"{where} has no tokenizer ({', '.join(TOKENIZER_FILES)}); copy the tokenizer files of the base model there"
        )
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # no advice about torch not being installed
    from transformers import AutoTokenizer

    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        # No vocabulary contains this character. If the unknown token is missing, fail now, not in the millionth line.
        tokenizer("a \U0010fffd")
        # Fail if the template contains half of a surrogate pair, written as a JSON escape, which is not valid text.
        f"{tokenizer.chat_template}".encode()
        return tokenizer
    except Exception as why:  # damaged JSON, missing sentencepiece, unknown class: the library raises many types
        raise ConfigError(f"cannot read the tokenizer in {where}: {' '.join(str(why).split())[:300]}") from why
