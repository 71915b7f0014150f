"""Run what the tokenizer files of a folder say, with the library `tokenizers`: text to ids and back, chats to text.

`tokenizer.json` is the law. transformers replaces its rules by those of the class that `tokenizer_config.json` names,
which gives other ids for many published models; it is used for the chat template, for the names of special tokens, and
for folders without a `tokenizer.json`. This code runs in a process of its own (`tokenizer_process`), because files from
the internet decide how long it takes. Errors are whatever the libraries raise.
"""

import functools
import hashlib
import json
import os
import re
from collections.abc import Iterator
from typing import Any

from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from dms_jax.hf.byte_fallback import REPLACEMENT, whole_characters

# Spaces, line breaks, digits, accents in both normal forms, contractions, scripts, emoji, an unassigned code point: if
# the rules cannot read this text, for example because the unknown token is missing, the tokenizer is refused at once.
PROBE = (
    "  a\n\n\t 12345 caf\u00e9 cafe\u0301 \u212b don't \u4f60\u597d \U0001f600\r\n\u00a0x_y  \U0010fffd<|im_end|></s>  "
)
FIRST_ALIAS = 0xF0000  # private characters that stand for the control tokens of a template
MARK = "\uf8ff"  # a private character that breaks control tokens in what a user says


class TokenizerRules:
    """The tokenizer of one folder."""

    def __init__(self, folder: str):
        from transformers import AutoTokenizer, PreTrainedTokenizerFast

        path = os.path.join(folder, "tokenizer.json")
        self.declared_add_bos: bool | None = None
        # The generic class needs no library beyond `tokenizers`, and knows nothing about families of models.
        kind = PreTrainedTokenizerFast if os.path.exists(path) else AutoTokenizer
        inner: Any = kind.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        self.inner = inner
        if os.path.exists(path):
            self.backend: Any = Backend.from_file(path)
            settings = _add_declared(self.backend, folder)
            self.declared_add_bos = settings.get("add_bos_token")
        else:
            self.backend = getattr(inner, "backend_tokenizer", None)
            if self.backend is None:
                raise ValueError(
                    f"{type(inner).__name__} runs in Python; save it with a tokenizer.json (save_pretrained)"
                )
        self.backend.no_truncation()
        self.backend.no_padding()
        # Fail if the template contains half of a surrogate pair, written as a JSON escape, which is not valid text.
        f"{inner.chat_template}".encode()
        self.added = self.backend.get_added_tokens_decoder()
        self.special = {token.content: id_ for id_, token in self.added.items() if token.special and token.content}
        named = (self.backend.token_to_id(token) for token in inner.all_special_tokens)
        self.hidden = {*self.special.values(), *(id_ for id_ in named if id_ is not None)}  # not part of a decoded text
        self.pattern = re.compile("|".join(re.escape(t) for t in sorted(self.special, key=len, reverse=True)) or "(?!)")
        self.plain: Backend | None = None  # reads control tokens as text, and aliases as control tokens
        self.aliases: dict[str, str] = {}
        self.ids_of_aliases: dict[int, int] = {}

    def facts(self) -> dict:
        """Return what does not depend on a text, as JSON values."""
        self.backend.encode(PROBE)
        named = {name: token for name in ("bos_token", "eos_token") if (token := getattr(self.inner, name)) is not None}
        ids = {name: self.backend.token_to_id(token) for name, token in named.items()}
        bos, eos = ids.get("bos_token"), ids.get("eos_token")
        add_bos = bos is not None and self.backend.encode("a").ids[:1] == [bos]
        notes = [
            f"it has no token {token!r}, its {name}; it counts as none"
            for name, token in named.items()
            if ids[name] is None
        ]
        if self.declared_add_bos not in (None, add_bos):
            notes.append(
                f"add_bos_token in tokenizer_config.json is {self.declared_add_bos}, but tokenizer.json says "
                f"{add_bos}, which counts"
            )
        template = self.inner.chat_template
        return {
            "size": self.backend.get_vocab_size(),
            "bos_id": bos,
            "eos_id": eos,
            "add_bos": add_bos,
            "special_ids": self.special,
            "notes": notes,
            "has_chat_template": template is not None,
            "hash": hashlib.sha256(f"{self.backend.to_str()}\n{template}".encode()).hexdigest(),
        }

    def encode(self, text: str, control_tokens: bool) -> list[int]:
        ids = self.backend.encode(text, add_special_tokens=False).ids
        if control_tokens or set(self.special.values()).isdisjoint(ids):
            return ids
        return self._plain().encode(self._without_private(text), add_special_tokens=False).ids

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        if skip_special_tokens:
            ids = [id_ for id_ in ids if id_ not in self.hidden]
        text = self.backend.decode(ids, skip_special_tokens=False)
        return whole_characters(self.backend, ids, text) if REPLACEMENT in text else text

    def render(self, messages: list[dict], reply: bool, tools: list | None) -> str:
        apply = functools.partial(self.inner.apply_chat_template, tokenize=False, add_generation_prompt=reply)
        text = apply(messages, tools=tools)
        if tools and text == apply(messages):
            raise ValueError("it does not show tools to the model; leave them out, or use a model made for tools")
        if any(message.get("tool_calls") for message in messages):
            without = [{key: value for key, value in m.items() if key != "tool_calls"} for m in messages]
            if text == apply(without, tools=tools):
                raise ValueError("it drops tool_calls; write the calls as content, or use a model made for tools")
        return text

    def encode_chat(self, messages: list[dict], reply: bool, tools: list | None, control_tokens: bool) -> list[int]:
        """Return the ids of a rendered chat.

        Without `control_tokens`, those that the template writes are ids, and those that somebody spelled in a message
        or a tool are text. The text is the same in both cases.
        """
        text = self.render(messages, reply, tools)
        spelled = [] if control_tokens else [t for t in _strings([messages, tools]) if self._spells(t)]
        if not spelled:
            return self.backend.encode(text, add_special_tokens=False).ids
        self._without_private("".join([text, *spelled]))
        # Break what the user spelled by a mark, let the template write its own around it, and replace these by aliases.
        broken = _mapped([messages, tools], lambda t: self.pattern.sub(lambda m: m[0][0] + MARK + m[0][1:], t))
        marked = self.render(broken[0], reply, broken[1])
        if marked.replace(MARK, "") != text or any(map(self._spells, _strings(broken))):
            raise ValueError(
                "it changes the control tokens that the messages spell; remove them, or give --allow-control-tokens"
            )
        plain = self._plain()
        ids = plain.encode(
            self.pattern.sub(lambda m: self.aliases[m[0]], marked).replace(MARK, ""), add_special_tokens=False
        ).ids
        return [self.ids_of_aliases.get(id_, id_) for id_ in ids]

    def _spells(self, text: str) -> bool:
        """Return whether a text, as it is or once it is normalized, contains a control token."""
        if self.pattern.search(text):
            return True
        ids = self.backend.encode(text, add_special_tokens=False).ids
        return not set(self.special.values()).isdisjoint(ids)

    def _plain(self) -> Backend:
        if self.plain is None:
            plain = Backend.from_str(self.backend.to_str())
            plain.encode_special_tokens = True
            for number, (content, id_) in enumerate(self.special.items()):
                alias, flags = chr(FIRST_ALIAS + number), self.added[id_]
                names = ("single_word", "lstrip", "rstrip", "normalized")
                plain.add_tokens([AddedToken(alias, special=False, **{name: getattr(flags, name) for name in names})])
                self.aliases[content] = alias
                self.ids_of_aliases[plain.encode(alias, add_special_tokens=False).ids[0]] = id_
            self.plain = plain
        return self.plain

    def _without_private(self, text: str) -> str:
        if MARK in text or any(FIRST_ALIAS <= ord(c) < FIRST_ALIAS + len(self.special) for c in text):
            raise ValueError("beside control tokens, a text must not contain characters for private use")
        return text


def _add_declared(backend: Backend, folder: str) -> dict:
    """Add the tokens that only the other files declare, as transformers does for fine-tunes that grew a vocabulary.

    Returns the settings of tokenizer_config.json.
    """
    declared: dict[int, AddedToken] = {}
    settings: dict = {}
    for name in ("added_tokens.json", "tokenizer_config.json"):
        path = os.path.join(folder, name)
        if not os.path.exists(path):
            continue
        with open(path, encoding="utf-8") as file:
            raw = json.load(file)
        if name == "added_tokens.json":
            declared |= {id_: AddedToken(content, normalized=False) for content, id_ in raw.items()}
        else:
            settings = raw
            flags = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")
            for id_, token in (raw.get("added_tokens_decoder") or {}).items():
                declared[int(id_)] = AddedToken(**{key: token[key] for key in flags if key in token})
    for id_, token in sorted(declared.items()):
        if backend.token_to_id(token.content) is None and backend.id_to_token(id_) is None:
            backend.add_tokens([token])
            if backend.token_to_id(token.content) != id_:
                raise ValueError(
                    f"{token.content!r} must be token {id_}, but tokenizer.json has {backend.get_vocab_size() - 1} "
                    "tokens; copy the tokenizer files of one model"
                )
    return settings


def _strings(value: Any) -> Iterator[str]:
    """Yield every text in nested lists and dictionaries, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _strings(key)
            yield from _strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)


def _mapped(value: Any, change) -> Any:
    """Return nested lists and dictionaries with every text changed, but for keys."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {key: _mapped(item, change) for key, item in value.items()}
    return [_mapped(item, change) for item in value] if isinstance(value, list) else value
