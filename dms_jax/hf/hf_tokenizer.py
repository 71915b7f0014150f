"""Text to token ids and back, for a model folder, hub id or GGUF file."""

import functools
import hashlib
import os
import tempfile
from typing import Any

import numpy as np

from dms_jax.errors import ConfigError
from dms_jax.hf import gguf_file
from dms_jax.hf.folder import resolve

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")


class Tokenizer:
    """transformers' tokenizer behind the few calls that are used here. Ids are int32."""

    def __init__(self, tokenizer, where: str):
        self.inner, self.where = tokenizer, where

    def encode(self, text: str) -> np.ndarray:
        """Ids [T] of the text alone; `add_bos` says whether the model expects `bos_id` before a document."""
        return np.asarray(self.inner(text, add_special_tokens=False, verbose=False)["input_ids"], np.int32)

    def encode_chat(self, messages: list[dict], *, reply: bool = False) -> np.ndarray:
        """Ids [T] of `[{"role": ..., "content": ...}, ...]` under the chat template; `reply` opens the assistant's turn."""
        return self.encode(self.chat_text(messages, reply=reply))

    def chat_text(self, messages: list[dict], *, reply: bool = False) -> str:
        """The text that `encode_chat` encodes."""
        if not self.has_chat_template:
            raise ConfigError(f"{self.where} has no chat template; use plain text")
        try:
            return self.inner.apply_chat_template(messages, tokenize=False, add_generation_prompt=reply)
        except Exception as why:  # a template raises whatever its author wrote
            raise ConfigError(
                f"the chat template of {self.where} refuses these messages: {' '.join(str(why).split())}"
            ) from why

    def decode(self, ids, *, skip_special_tokens: bool = True) -> str:
        return self.inner.decode(np.asarray(ids).tolist(), skip_special_tokens=skip_special_tokens)

    def __len__(self) -> int:
        """How many ids it can produce; the model's vocabulary may be padded beyond it."""
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
        """Whether this tokenizer begins a text with a BOS by itself (Llama 3 does, Qwen and SmolLM2 do not)."""
        return self.bos_id is not None and self.inner("a")["input_ids"][:1] == [self.bos_id]

    @functools.cached_property
    def hash(self) -> str:
        """sha256 of vocabulary, merges, rules and chat template: equal hashes make equal ids."""
        backend = getattr(self.inner, "backend_tokenizer", None)
        rules = backend.to_str() if backend is not None else repr(sorted(self.inner.get_vocab().items()))
        return hashlib.sha256(f"{rules}\n{getattr(self.inner, 'chat_template', None)}".encode()).hexdigest()


def prompt_ids(tokenizer: Tokenizer, text: str) -> np.ndarray:
    """Ids [T] of a text that begins a row: bos first, where the model expects it before a document."""
    begin = [tokenizer.bos_id] if tokenizer.add_bos else []
    return np.concatenate([np.array(begin, np.int32), tokenizer.encode(text)])


def load_tokenizer(path: str | os.PathLike[str]) -> Tokenizer:
    """The tokenizer of a model. A local path is read locally, and no remote code is run."""
    path = resolve(path)
    if os.path.isfile(path):
        with tempfile.TemporaryDirectory() as folder:
            gguf_file.write_tokenizer(path, folder)
            return Tokenizer(_read(folder, path), path)
    return Tokenizer(_read(path, path), path)


def _read(folder: str, where: str):
    if not any(os.path.exists(os.path.join(folder, name)) for name in TOKENIZER_FILES):
        raise ConfigError(
            f"{where} has no tokenizer ({', '.join(TOKENIZER_FILES)}); copy the tokenizer files of the base model there"
        )
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # it would lament that torch is not installed
    from transformers import AutoTokenizer

    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        tokenizer(
            "a \U0010fffd"
        )  # what no vocabulary holds: an unknown token that is itself unknown is found now, not in the millionth line
        f"{tokenizer.chat_template}".encode()  # JSON can spell half a surrogate pair, which no text may hold
        return tokenizer
    except Exception as why:  # damaged JSON, missing sentencepiece, unknown class: many types
        raise ConfigError(f"cannot read the tokenizer in {where}: {' '.join(str(why).split())[:300]}") from why
