"""The tokenizer wrapper, around a tiny tokenizer that the test writes."""

import contextlib
import json

import numpy as np
import pytest
from hf.hf_cases import VOCABULARY, write_tokenizer

import dms_jax
from dms_jax.errors import ConfigError


def test_text_round_trips_through_ids(tmp_path):
    tokenizer = dms_jax.load_tokenizer(write_tokenizer(tmp_path))
    ids = tokenizer.encode("hello world")
    assert ids.dtype == np.int32 and ids.tolist() == [1, 2]
    assert tokenizer.decode(ids) == "hello world" and tokenizer.decode([1, 4]) == "hello"
    assert tokenizer.encode("").shape == (0,)
    assert (len(tokenizer), tokenizer.eos_id, tokenizer.bos_id, tokenizer.add_bos) == (5, 4, None, False)


def test_chat_template_is_applied_and_its_refusals_are_one_line(tmp_path):
    tokenizer = dms_jax.load_tokenizer(write_tokenizer(tmp_path))
    assert tokenizer.encode_chat([{"role": "user", "content": "world"}], reply=True).tolist() == [1, 2, 3]
    assert tokenizer.encode_chat([{"role": "user", "content": "world"}]).tolist() == [1, 2]
    with pytest.raises(ConfigError, match="no villains"):
        tokenizer.encode_chat([{"role": "villain", "content": "world"}])
    plain = dms_jax.load_tokenizer(write_tokenizer(tmp_path / "plain", template=None))
    with pytest.raises(ConfigError, match="no chat template"):
        plain.encode_chat([{"role": "user", "content": "world"}])


def test_hash_depends_on_vocabulary_and_template_only(tmp_path):
    first, same = (
        dms_jax.load_tokenizer(write_tokenizer(tmp_path / "a")),
        dms_jax.load_tokenizer(write_tokenizer(tmp_path / "b")),
    )
    swapped = dms_jax.load_tokenizer(write_tokenizer(tmp_path / "c", vocabulary=VOCABULARY | {"hello": 2, "world": 1}))
    silent = dms_jax.load_tokenizer(write_tokenizer(tmp_path / "d", template=None))
    assert first.hash == same.hash and len({first.hash, swapped.hash, silent.hash}) == 3


def test_missing_and_damaged_files_give_one_line(tmp_path):
    with pytest.raises(ConfigError, match=r"tokenizer\.json"):
        dms_jax.load_tokenizer(tmp_path)
    folder = write_tokenizer(tmp_path / "broken")
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(ConfigError, match="broken") as refusal:
        dms_jax.load_tokenizer(folder)
    assert "\n" not in str(refusal.value)
    with pytest.raises(ConfigError, match="nowhere"):
        dms_jax.load_tokenizer(tmp_path / "nowhere")


def test_remote_code_is_not_run(tmp_path):
    folder = write_tokenizer(tmp_path)
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\nclass Evil: pass\n")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(
        json.dumps(settings | {"auto_map": {"AutoTokenizer": ["evil.Evil", None]}})
    )
    with contextlib.suppress(ConfigError):
        dms_jax.load_tokenizer(folder)
    assert not (tmp_path / "ran").exists()


def test_end_token_that_the_vocabulary_lacks_is_said(tmp_path):
    folder = write_tokenizer(tmp_path)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"eos_token": "<|nowhere|>"}))
    with pytest.warns(UserWarning, match=r"no token '<\|nowhere\|>', its eos_token"):
        assert dms_jax.load_tokenizer(folder).eos_id is None
