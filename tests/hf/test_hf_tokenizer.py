"""The tokenizer wrapper on a tiny tokenizer made here."""

import contextlib
import json
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

import dms_jax
from dms_jax.errors import ConfigError

TEMPLATE = "{% for m in messages %}{% if m['role'] == 'villain' %}{{ raise_exception('no\nvillains') }}{% endif %}hello {{ m['content'] }} {% endfor %}{% if add_generation_prompt %}reply{% endif %}"
VOCABULARY = {"[unk]": 0, "hello": 1, "world": 2, "reply": 3, "</s>": 4}


def write(folder: Path, template: str | None = TEMPLATE, vocabulary: dict = VOCABULARY) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[unk]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>", "unk_token": "[unk]"}
    settings |= {"chat_template": template} if template else {}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def test_text_to_ids_and_back(tmp_path):
    tokenizer = dms_jax.load_tokenizer(write(tmp_path))
    ids = tokenizer.encode("hello world")
    assert ids.dtype == np.int32 and ids.tolist() == [1, 2]
    assert tokenizer.decode(ids) == "hello world" and tokenizer.decode([1, 4]) == "hello"
    assert tokenizer.encode("").shape == (0,)
    assert (len(tokenizer), tokenizer.eos_id, tokenizer.bos_id, tokenizer.add_bos) == (5, 4, None, False)


def test_chat(tmp_path):
    tokenizer = dms_jax.load_tokenizer(write(tmp_path))
    assert tokenizer.encode_chat([{"role": "user", "content": "world"}], reply=True).tolist() == [1, 2, 3]
    assert tokenizer.encode_chat([{"role": "user", "content": "world"}]).tolist() == [1, 2]
    with pytest.raises(ConfigError, match="refuses these messages: no villains"):
        tokenizer.encode_chat([{"role": "villain", "content": "world"}])
    plain = dms_jax.load_tokenizer(write(tmp_path / "plain", template=None))
    with pytest.raises(ConfigError, match="no chat template"):
        plain.encode_chat([{"role": "user", "content": "world"}])


def test_the_hash_follows_what_makes_ids(tmp_path):
    first, same = dms_jax.load_tokenizer(write(tmp_path / "a")), dms_jax.load_tokenizer(write(tmp_path / "b"))
    swapped = dms_jax.load_tokenizer(write(tmp_path / "c", vocabulary=VOCABULARY | {"hello": 2, "world": 1}))
    silent = dms_jax.load_tokenizer(write(tmp_path / "d", template=None))
    assert first.hash == same.hash and len({first.hash, swapped.hash, silent.hash}) == 3


def test_missing_and_damaged_files_are_one_line(tmp_path):
    with pytest.raises(ConfigError, match=r"has no tokenizer \(tokenizer\.json"):
        dms_jax.load_tokenizer(tmp_path)
    folder = write(tmp_path / "broken")
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(ConfigError, match="cannot read the tokenizer in .*broken") as refusal:
        dms_jax.load_tokenizer(folder)
    assert "\n" not in str(refusal.value)
    with pytest.raises(ConfigError, match="no such folder"):
        dms_jax.load_tokenizer(tmp_path / "nowhere")


def test_remote_code_is_not_run(tmp_path):
    folder = write(tmp_path)
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\nclass Evil: pass\n")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(
        json.dumps(settings | {"auto_map": {"AutoTokenizer": ["evil.Evil", None]}})
    )
    with contextlib.suppress(ConfigError):
        dms_jax.load_tokenizer(folder)
    assert not (tmp_path / "ran").exists()
