"""Tokenizers and templates that loop, explode or panic end in one line, and the next one works."""

import contextlib
import json
import os
import signal
import threading

import pytest
from hf.hf_cases import write_tokenizer

import dms_jax
from dms_jax.errors import ConfigError
from dms_jax.hf import tokenizer_process
from dms_jax.hf.tokenizer_process import PROCESS

CHAT = [{"role": "user", "content": "hello world"}]


@contextlib.contextmanager
def refused(name: str):
    """Expect one line that names the folder, with two seconds for a call."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizer_process, "CALL_SECONDS", 2.0)
        with pytest.raises(ConfigError, match=name) as refusal:
            yield
    assert "\n" not in str(refusal.value)


def with_rules(folder, **parts):
    """Write a tokenizer of the words "hello" and "world" with other parts of its pipeline."""
    write_tokenizer(folder)
    raw = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps(raw | parts))
    return folder


HOSTILE_TEMPLATES = {
    "nested loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}x",
    "range without end": "{% for i in range(1000000000000) %}{% endfor %}",
    "repeated text": "{{ 'a' * 10000000000 }}",
    "500 MB": "{{ 'hello ' * 80000000 }}",
    "doubled": "{% set n = namespace(s='aa') %}{% for i in range(60) %}{% set n.s = n.s ~ n.s %}{% endfor %}{{ n.s }}",
    "power tower": "{{ 9**(9**9) }}",
    "format width": "{{ '%5000000000d' % 1 }}",
    "macro recursion": "{% macro f(n) %}{{ f(n+1) }}{% endmacro %}{{ f(0) }}",
    "surrogate": "{{ '\\ud800' }}",
    "include": "{% include '/etc/passwd' %}",
    "attributes": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
}


@pytest.mark.parametrize("name", HOSTILE_TEMPLATES)
def test_hostile_template_ends_in_one_line(tmp_path, name):
    tokenizer = dms_jax.load_tokenizer(write_tokenizer(tmp_path / "evil", template=HOSTILE_TEMPLATES[name]))
    with refused("evil"):
        tokenizer.encode_chat(CHAT)
    good = dms_jax.load_tokenizer(write_tokenizer(tmp_path / "good"))
    assert good.encode_chat(CHAT).tolist() == [1, 1, 2]


def replace_ten(count: int) -> list[dict]:
    return [{"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 10}] * count


HOSTILE_RULES = {
    "10^12 letters": {"normalizer": {"type": "Sequence", "normalizers": replace_ten(12)}},
    "10^12 letters from any text": {
        "normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "a"}, *replace_ten(12)]}
    },
    "pattern that backtracks": {
        "pre_tokenizer": {
            "type": "Split",
            "pattern": {"Regex": "^(([a-z])+.)+[A-Z]([a-z])+$"},
            "behavior": "Isolated",
            "invert": False,
        }
    },
    "unknown token in the template": {
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "[x]", "type_id": 0}}],
            "pair": [],
            "special_tokens": {},
        }
    },
}


@pytest.mark.parametrize("name", HOSTILE_RULES)
def test_hostile_rules_end_in_one_line(tmp_path, name, monkeypatch):
    monkeypatch.setattr(tokenizer_process, "LOAD_SECONDS", 15.0)
    with refused("evil"):
        dms_jax.load_tokenizer(with_rules(tmp_path / "evil", **HOSTILE_RULES[name])).encode("a" * 40 + "!")
    assert dms_jax.load_tokenizer(write_tokenizer(tmp_path / "good")).encode("world").tolist() == [2]


def test_decoder_that_explodes_ends_in_one_line(tmp_path):
    decoders = [{"type": "Replace", "pattern": {"String": "h"}, "content": "h" * 10}] * 12
    tokenizer = dms_jax.load_tokenizer(with_rules(tmp_path, decoder={"type": "Sequence", "decoders": decoders}))
    assert tokenizer.encode("hello").tolist() == [1]
    with refused(str(tmp_path)):
        tokenizer.decode([1])


def test_killed_process_is_started_again(tmp_path):
    tokenizer = dms_jax.load_tokenizer(write_tokenizer(tmp_path))
    os.kill(PROCESS._process.pid, signal.SIGKILL)
    PROCESS._process.wait()
    assert tokenizer.encode("hello").tolist() == [1]


def test_garbage_collected_in_the_middle_of_a_call_does_not_block(tmp_path, monkeypatch):
    tokenizer = dms_jax.load_tokenizer(write_tokenizer(tmp_path))
    exchange = PROCESS._exchange

    def collecting(*arguments):
        PROCESS.forget(10**9)  # as the finalizer of an unreachable tokenizer
        return exchange(*arguments)

    monkeypatch.setattr(PROCESS, "_exchange", collecting)
    assert tokenizer.encode("hello").tolist() == [1]


def test_new_tokenizer_of_a_folder_reads_its_new_files(tmp_path):
    before = dms_jax.load_tokenizer(write_tokenizer(tmp_path))
    after = dms_jax.load_tokenizer(
        write_tokenizer(tmp_path, vocabulary={"[unk]": 0, "hello": 2, "world": 1, "</s>": 3})
    )
    assert before.encode("hello").tolist() == [1] and after.encode("hello").tolist() == [2]


def test_threads_share_the_process(tmp_path):
    folders = [
        write_tokenizer(tmp_path / name, vocabulary={"[unk]": 0, "hello": i, "</s>": 4})
        for i, name in enumerate("abc", 1)
    ]
    tokenizers = [dms_jax.load_tokenizer(folder) for folder in folders]
    found = {i: set() for i in (1, 2, 3)}

    def work(number):
        for _ in range(50):
            found[number].add(tokenizers[number - 1].encode("hello hello").tobytes())

    threads = [threading.Thread(target=work, args=(number,)) for number in found]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(len(ids) == 1 for ids in found.values())


def test_files_that_are_no_files_are_refused(tmp_path):
    folder = write_tokenizer(tmp_path)
    (folder / "tokenizer_config.json").unlink()
    os.mkfifo(folder / "tokenizer_config.json")
    with pytest.raises(ConfigError, match="pipe"):
        dms_jax.load_tokenizer(folder)
