"""`infer.generate --prompts`: files of prompts, and how a prompt is encoded."""

import json
from pathlib import Path

import numpy as np
import pytest
from generate_cases import learned_model, run

import dms_jax
from dms_jax.engine.prompts import Encoder, Prompt
from dms_jax.errors import ConfigError


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return learned_model(tmp_path_factory)


def test_text_file_gives_one_prompt_per_line(folder, tmp_path, capsys):
    text = tmp_path / "prompts.txt"
    text.write_bytes("\ufeffone\r\n\r\na second prompt\r\n😀\n".encode())
    assert run(folder, "--prompts", text, "--batch", 2) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["input"] for line in lines] == ["one", "a second prompt", "😀"] and [
        line["index"] for line in lines
    ] == [0, 1, 2]
    for line in lines:  # each row equals its prompt alone; the last batch is filled up
        assert run(folder, "--prompt", line["input"], "--json") == 0
        alone = json.loads(capsys.readouterr().out)
        assert all(alone[key] == line[key] for key in ("text", "tokens", "finish_reason", "live_pairs", "realised_cr"))


def test_jsonl_prompts_go_to_the_output_file(folder, tmp_path, capsys):
    prompts, output = tmp_path / "prompts.jsonl", tmp_path / "new" / "results.jsonl"
    records = [{"prompt": "one\ntwo", "id": 7}, {"messages": [{"role": "user", "content": "hi"}]}]
    prompts.write_text("\ufeff" + "\n".join(map(json.dumps, records)))
    assert run(folder, "--prompts", prompts, "--output", output, "--json") == 0
    out, err = capsys.readouterr()
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert out == "" and [line["input"] for line in lines] == records and json.loads(err)["prompts"] == 2
    chat_ids = dms_jax.load_tokenizer(folder).encode_chat(records[1]["messages"], reply=True)
    assert lines[1]["prompt_tokens"] == len(chat_ids)
    with pytest.raises(ConfigError, match="exists; .*--overwrite"):
        run(folder, "--prompts", prompts, "--output", output)
    assert run(folder, "--prompts", prompts, "--output", output, "--overwrite") == 0


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.txt", b" \n\n", r"a\.txt .*at least one prompt"),
        ("a.txt", b"fine\n\xff\n", "line 2: not UTF-8"),
        ("a.jsonl", b'{"prompt": "fine"}\n{"prompt": "\xff"}\n', "line 2: not UTF-8"),
        ("a.jsonl", b'{"prompt": "a", "prompt": "b"}', "line 1 .*duplicate key 'prompt'"),
        (
            "a.txt",
            b"fine\n" + b"x" * 600,
            "line 2: .* 504 tokens .*--max-new-tokens 8, got 600; shorten it by 96",
        ),
        ("a.jsonl", b'{"prompt": "a"}\n{"prompt": \n', "line 2 is not valid JSON"),
        ("a.jsonl", b'["a"]', "line 1: .*prompt.*messages"),
        ("a.jsonl", b'{"prompts": "a"}', "line 1: .*prompt.*messages"),
        ("a.jsonl", b'{"prompt": "a", "messages": []}', "line 1: .*prompt.*messages"),
        ("a.jsonl", b'{"prompt": ""}', "line 1: .*prompt.*empty"),
        ("a.jsonl", b'{"prompt": [1]}', "line 1"),
        ("a.jsonl", b'{"messages": "a"}', "line 1: .*messages.* list"),
        ("a.jsonl", b'{"messages": []}', "line 1: .*messages.* list"),
        ("a.jsonl", b'{"messages": [{"role": "user"}]}', "line 1: .*messages.* list"),
        ("a.jsonl", b'{"prompt": "\\ud800"}', "line 1 .*UTF-8"),
    ],
)
def test_prompt_files_that_cannot_work_are_refused(folder, tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=message) as why:
        run(folder, "--prompts", tmp_path / name)
    assert "\n" not in str(why.value)


def test_begin_of_text_comes_once():
    class Llama:
        bos_id, eos_id, add_bos = 9, 0, True

        has_chat_template, special_ids = False, {}

        def encode(self, text, *, control_tokens=True):
            return np.arange(len(text), dtype=np.int32)

    assert Encoder(Llama())(Prompt("ab", "")).tolist() == [9, 0, 1]
    assert Encoder(Llama(), continues=True)(Prompt("ab", "")).tolist() == [0, 1]
