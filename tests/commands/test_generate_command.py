"""`python -m infer.generate` on a golden model with a tokenizer of 131 tokens: one prompt, and what its options do."""

import ast
import json
import re
import shlex
from pathlib import Path

import pytest
from generate_cases import DOOR, ROOT, learned_model, run

import dms_jax
from dms_jax.commands.generate import parse
from dms_jax.engine.stopwatch import covered


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return learned_model(tmp_path_factory)


def test_one_prompt_prints_the_continuation_and_the_table(folder, capsys):
    assert run(folder, "--prompt", "hello world", new=12) == 0
    out, err = capsys.readouterr()
    model, tokenizer = dms_jax.load(folder), dms_jax.load_tokenizer(folder)
    want = dms_jax.generate(model, "hello world", dms_jax.GenerationConfig(max_new_tokens=12), tokenizer=tokenizer)
    assert out == want.texts[0] + "\n"
    for part in (
        "prefill",
        "decode",
        "compile",
        "tokens/s",
        "CR",
        "nominal",
        "MiB allocated",
        "if dense",
        "forced evictions 0",
    ):
        assert part in err


def test_json_describes_one_prompt(folder, capsys):
    assert run(folder, "--prompt", "hello 😀", "--json", "--ignore-eos", new=20) == 0
    result = json.loads(capsys.readouterr().out)
    assert (
        result["prompt"] == "hello 😀"
        and result["finish_reason"] == "length"
        and result["new_tokens"] == len(result["tokens"]) == 20
    )
    costs = result["costs"]
    assert costs["prefill_tokens"] == result["prompt_tokens"] == 10 and costs["decode_tokens"] == 20
    assert costs["realised_cr"] == pytest.approx(30 / result["live_pairs"], rel=1e-3) and result["realised_cr"] >= 1
    assert (
        0 < costs["live_bytes"] <= costs["dense_bytes"] == 30 * 3 * 2 * 2 * 16 * 4
        and costs["allocated_bytes"] > costs["live_bytes"]
    )
    for name in ("allocated_bytes", "live_bytes", "dense_bytes", "seconds_to_first_token"):
        assert result[name] == costs[name] > 0
    assert (
        costs["prefill_s"] > 0
        and costs["decode_s"] > 0
        and costs["decode_tokens_per_s"] > 0
        and costs["forced_evictions"] == 0
    )


def test_dense_threshold_and_capacity_options_take_effect(folder, capsys):
    numbers = {}
    for name, argv in {
        "dense": ["--dense"],
        "never": ["--threshold", "1e9"],
        "always": ["--threshold=-1e9"],
        "budget": ["--threshold", "1e9", "--capacity", "16", "--overflow", "evict"],
        "grow": ["--threshold", "1e9", "--capacity", "16,16,24", "--overflow", "grow"],
        "lazy": ["--policy", "dms_budget:24"],
        "slots": ["--threshold", "1e9", "--cache", "slots"],
    }.items():
        assert run(folder, "--prompt", "hello world", "--json", "--ignore-eos", *argv, new=40) == 0
        numbers[name] = json.loads(capsys.readouterr().out)
    assert (
        numbers["dense"]["realised_cr"] == numbers["never"]["realised_cr"] == 1
        and numbers["dense"]["costs"]["nominal_cr"] is None
    )
    assert numbers["dense"]["text"] == numbers["never"]["text"] == numbers["grow"]["text"] == numbers["slots"]["text"]
    assert numbers["always"]["live_pairs"] == pytest.approx(9, abs=1) and numbers["always"]["realised_cr"] > 4
    assert numbers["lazy"]["live_pairs"] == 24 and numbers["lazy"]["forced_evictions"] == 0
    assert numbers["lazy"]["costs"]["nominal_cr"] is None
    assert numbers["budget"]["live_pairs"] == 16 and numbers["budget"]["forced_evictions"] == 3 * 2 * (51 - 16)


def test_samples_depend_on_the_seed_only(folder, capsys):
    texts = []
    for seed in (1, 1, 2):
        assert (
            run(
                folder,
                "--prompt",
                "hello",
                "--temperature",
                "1",
                "--top-k",
                "40",
                "--top-p",
                ".95",
                "--min-p",
                ".01",
                "--seed",
                seed,
                new=16,
            )
            == 0
        )
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]


def test_answer_ends_before_the_stop_text(folder, capsys):
    assert run(folder, "--prompt", "hello", "--json", "--ignore-eos", new=30) == 0
    text = json.loads(capsys.readouterr().out)["text"]
    stop = text[10:12]
    assert run(folder, "--prompt", "hello", "--ignore-eos", "--stop", stop, "--stop", "no such text", new=30) == 0
    assert capsys.readouterr().out == text[: text.find(stop)] + "\n"


def test_adapter_brings_the_policy(folder, tmp_path, capsys):
    dms_jax.save_adapter(dms_jax.load(folder), tmp_path / "adapter.safetensors")
    assert run(folder, "--adapter", tmp_path / "adapter.safetensors", "--prompt", "hello", "--json") == 0
    assert json.loads(capsys.readouterr().out)["costs"]["nominal_cr"] is not None


def test_compile_time_is_the_union_of_intervals():
    assert covered([(0, 4), (1, 2), (3, 6), (8, 9)], 2) == 5 and covered([], 0) == 0


def test_commands_in_pages_and_help_parse():
    for path, minimum in (("README.md", 1), ("docs/generate.md", 3), ("infer/generate.py", 3)):
        text = (ROOT / path).read_text(encoding="utf-8")
        if path.endswith(".py"):  # what the reader of the docstring sees: its escapes resolved
            text = ast.get_docstring(ast.parse(text))
        lines = re.findall(rf"^ *python -m {re.escape(DOOR)} ((?:.*\\\n)*.*)", text, re.M)
        assert len(lines) >= minimum, path
        for line in lines:
            options = parse(shlex.split(line.replace("\\\n", " "), comments=True))
            assert options.model
