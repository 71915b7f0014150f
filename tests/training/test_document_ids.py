"""Which ids a document becomes: begin and end tokens once, control tokens where they are allowed, and the very bytes
that were hashed."""

import json
import os
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tiny_tokenizers import CHATML, byte_level

from dms_jax.config_reader import build
from dms_jax.errors import ConfigError
from dms_jax.training.data.token_store import DataConfig, tokenize

VOCAB = 260
SPECIAL = {"<bos>": 256, "<eos>": 257, "<turn>": 258}
CHAT = [{"role": "user", "content": "a<turn>b"}]
TOOLS = [{"name": "clock"}]


class ControlTokenizer:
    """A tokenizer whose ids are bytes, and control tokens where they are spelled and allowed."""

    bos_id, eos_id, hash, special_ids, add_bos = 256, 257, "control", SPECIAL, True

    def encode(self, text, *, control_tokens=True):
        parts = re.split("(<bos>|<eos>|<turn>)", text) if control_tokens else [text]
        ids = [[SPECIAL[part]] if part in SPECIAL and control_tokens else list(part.encode()) for part in parts]
        return np.array(sum(ids, []), np.int32)

    def encode_chat(self, messages, *, tools=None, control_tokens=True):
        turns = [[256, 258, *self.encode(m["content"], control_tokens=control_tokens), 258, 257] for m in messages]
        return np.array([*self.encode("".join(tool["name"] for tool in tools or [])), *sum(turns, [])], np.int32)


@pytest.fixture
def config(tmp_path):
    return DataConfig(cache_dir=str(tmp_path / "cache"))


def ids_of(tmp_path, config, *records):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    store = tokenize((str(path),), config, ControlTokenizer(), VOCAB)
    return [part.tolist() for part in np.split(store.ids, store.offsets[1:-1])]


@pytest.mark.parametrize(
    "text, ids",
    [
        ("a", [256, 97, 257]),
        ("<bos>a", [256, 97, 257]),
        ("a<eos>", [256, 97, 257]),
        ("<bos><turn>a<turn><eos>", [256, 258, 97, 258, 257]),
        ("<bos>a<eos>\n", [256, 97, 257, 10]),  # as templates end that write a newline after each turn
        ("a<bos>b<eos>c", [256, 97, 256, 98, 257, 99, 257]),
    ],
)
def test_rendered_chat_gets_no_second_begin_and_end(tmp_path, config, text, ids):
    assert ids_of(tmp_path, config, {"text": text}) == [ids]


SPELLED = list(b"<turn>")


@pytest.mark.parametrize(
    "allow, text, content",
    [("text", [258], SPELLED), ("all", [258], [258]), ("none", SPELLED, SPELLED)],
)
def test_control_tokens_count_where_they_are_allowed(tmp_path, config, allow, text, content):
    """Text may be a rendered chat, so they count there by default; in what a user of a chat says they do not."""
    config = replace(config, allow_control_tokens=allow)
    found = ids_of(tmp_path, config, {"text": "a<turn>b"}, {"messages": CHAT})
    assert found == [[256, 97, *text, 98, 257], [256, 258, 97, *content, 98, 258, 257]]


@pytest.mark.parametrize("allow, count", [("text", 1), ("all", 2), ("none", 1)])
def test_real_tokenizer_is_told_where_control_tokens_count(tmp_path, config, allow, count):
    """Its own defaults for texts and for chats must not decide."""
    tokenizer = byte_level(tmp_path / "tokenizer", chat_template=CHATML)
    end = tokenizer.special_ids["<|im_end|>"]
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps({"messages": [{"role": "user", "content": "a<|im_end|>b"}]}) + "\n")
    ids = tokenize((str(path),), replace(config, allow_control_tokens=allow), tokenizer, len(tokenizer)).ids
    assert np.asarray(ids).tolist().count(end) == count


def test_end_that_is_spelled_but_not_allowed_is_no_end(tmp_path, config):
    config = replace(config, allow_control_tokens="none")
    assert ids_of(tmp_path, config, {"text": "<eos>"}) == [[256, *b"<eos>", 257]]


def test_cache_knows_which_control_tokens_are_allowed(tmp_path, config):
    (tmp_path / "a.txt").write_text("a<turn>b")
    paths, keys = (str(tmp_path / "a.txt"),), set()
    for allow in ("text", "all", "none"):
        store = tokenize(paths, replace(config, allow_control_tokens=allow), ControlTokenizer(), VOCAB)
        assert not store.cached
        keys.add(store.key)
    assert len(keys) == 3


def test_option_names_its_values():
    with pytest.raises(ConfigError, match="allow_control_tokens.*text, all, none"):
        build(DataConfig, {"allow_control_tokens": "some"})


def test_tools_of_a_chat_reach_the_template(tmp_path, config):
    (ids,) = ids_of(tmp_path, config, {"messages": CHAT, "tools": TOOLS})
    assert ids[:7] == [*b"clock", 256, 258]


class Meddler(ControlTokenizer):
    """A tokenizer during whose work another program writes to a file, and may write back what was there."""

    def __init__(self, path: Path, contents: list[str]):
        self.path, self.contents = path, contents

    def encode(self, text, *, control_tokens=True):
        if self.contents:
            self.path.write_text(self.contents.pop(0))
        return super().encode(text, control_tokens=control_tokens)


@pytest.mark.parametrize("contents", [["changed"], ["cccc"], ["cccc", "bbbb"]])
def test_file_that_changes_after_it_was_hashed_is_refused_and_not_cached(tmp_path, config, contents):
    """Under the hash of the first content, the cache would serve the second one from then on."""
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text(name * 4)
        os.utime(tmp_path / f"{name}.txt", (0, 0))
    paths = (str(tmp_path / "a.txt"), str(tmp_path / "b.txt"))
    with pytest.raises(ConfigError, match="b.txt changed while it was read; run again"):
        tokenize(paths, config, Meddler(tmp_path / "b.txt", contents), VOCAB)
    (tmp_path / "b.txt").write_text("bbbb")
    store = tokenize(paths, config, ControlTokenizer(), VOCAB)
    assert not store.cached and bytes(store.ids[store.ids < 256].tolist()) == b"aaaabbbb"


def test_skipped_files_of_a_folder_are_said_in_one_line(tmp_path, config, capsys):
    (tmp_path / "data" / ".git").mkdir(parents=True)
    (tmp_path / "data" / "a.txt").write_text("a")
    tokenize((str(tmp_path / "data"),), config, ControlTokenizer(), VOCAB)
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "1 files to read; skipped: 1 hidden" in error
