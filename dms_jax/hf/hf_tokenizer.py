"""Tokenizers: text to token ids and back, for a model folder, a hub id or a GGUF file."""

import functools
import os
import tempfile
import warnings
import weakref
from typing import Any

import numpy as np

from dms_jax.errors import ConfigError
from dms_jax.hf.folder import SIDE_FILES, resolve, template_files
from dms_jax.hf.folder_files import member
from dms_jax.hf.gguf.gguf_tokenizer import write_tokenizer
from dms_jax.hf.tokenizer_process import PROCESS, ProcessError

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")


class Tokenizer:
    """The tokenizer of a folder, which runs in a process of its own (`tokenizer_process`). Ids are int32.

    Control tokens are the tokens that the file calls special, such as "<|im_end|>". Every method raises ConfigError, in
    one line, also if the files make it run for too long or use too much memory.
    """

    def __init__(self, folder: str, where: str, keep: object = None):
        """`where` names the tokenizer in messages. `keep` is an object that `folder` needs in order to exist."""
        self.folder, self.where, self._keep = folder, where, keep
        self._number = PROCESS.new_number()
        weakref.finalize(self, PROCESS.forget, self._number)
        self._facts: dict[str, Any] = self._call("read", "facts")
        for note in self._facts["notes"]:
            warnings.warn(f"the tokenizer in {where}: {note}", stacklevel=2)

    def encode(self, text: str, *, control_tokens: bool = True) -> np.ndarray:
        """Return the ids [T] of a text, without `bos_id`, which the model expects before a document if `add_bos`.

        `control_tokens=False`: a control token that the text spells is text, too.
        """
        return np.asarray(self._call("encode this text with", "encode", text=text, control_tokens=control_tokens))

    def encode_chat(
        self, messages: list[dict], *, reply: bool = False, tools: list | None = None, control_tokens: bool = False
    ) -> np.ndarray:
        """Return the ids [T] of `[{"role": ..., "content": ...}, ...]` in the chat template; `reply` opens the
        answer.

        `tools` are JSON schemas for the template. Control tokens of the template are ids, and those that a message or a
        tool spells are text, unless `control_tokens` is true.
        """
        arguments = {"messages": messages, "reply": reply, "tools": tools, "control_tokens": control_tokens}
        return np.asarray(self._in_template("encode_chat", arguments))

    def chat_text(self, messages: list[dict], *, reply: bool = False, tools: list | None = None) -> str:
        """Return the text that `encode_chat` encodes."""
        return self._in_template("render", {"messages": messages, "reply": reply, "tools": tools})

    def decode(self, ids, *, skip_special_tokens: bool = True) -> str:
        ids = np.asarray(ids).tolist()
        return self._call("decode with", "decode", ids=ids, skip_special_tokens=skip_special_tokens)

    def __len__(self) -> int:
        """The number of ids that the tokenizer can produce. The model's vocabulary may be padded beyond it."""
        return self._facts["size"]

    @property
    def has_chat_template(self) -> bool:
        return self._facts["has_chat_template"]

    @property
    def bos_id(self) -> int | None:
        return self._facts["bos_id"]

    @property
    def eos_id(self) -> int | None:
        return self._facts["eos_id"]

    @property
    def add_bos(self) -> bool:
        """Whether the tokenizer begins a text with a BOS by default (Llama 3 does, Qwen and SmolLM2 do not)."""
        return self._facts["add_bos"]

    @property
    def special_ids(self) -> dict[str, int]:
        """The id of each control token."""
        return self._facts["special_ids"]

    @property
    def hash(self) -> str:
        """The sha256 of vocabulary, merges, rules and chat template. Tokenizers with equal hashes produce equal ids."""
        return self._facts["hash"]

    @functools.cached_property
    def inner(self) -> Any:
        """The tokenizer that transformers makes of the same files. Its ids may differ from those of `encode`."""
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.folder, local_files_only=True, trust_remote_code=False)

    def _in_template(self, method: str, arguments: dict) -> Any:
        if not self.has_chat_template:
            raise ConfigError(f"{self.where} has no chat template; use plain text")
        return self._call("use the chat template of", method, **arguments)

    def _call(self, what: str, method: str, **arguments) -> Any:
        try:
            return PROCESS.call(self._number, self.folder, method, **arguments)
        except ProcessError as why:
            raise ConfigError(
                f"cannot {what} the tokenizer in {self.where}: {' '.join(str(why).split())[:300]}"
            ) from why


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
    if not os.path.isfile(path):
        _check_files(path, path)
        return Tokenizer(os.path.abspath(path), path)
    folder = tempfile.TemporaryDirectory()
    write_tokenizer(path, folder.name)
    _check_files(folder.name, path)
    return Tokenizer(folder.name, path, keep=folder)


def _check_files(folder: str, where: str) -> None:
    if not any(os.path.exists(os.path.join(folder, name)) for name in TOKENIZER_FILES):
        raise ConfigError(
            f"{where} has no tokenizer ({', '.join(TOKENIZER_FILES)}); copy the tokenizer files of the base model there"
        )
    for name in sorted(SIDE_FILES & set(os.listdir(folder))):
        member(folder, name)  # the library would follow a link out of the folder, and wait for a pipe
    template_files(folder)
