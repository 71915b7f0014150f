"""`infer.generate`: conversations, and caches that are saved and continued."""

import json
from pathlib import Path

import numpy as np
import pytest
from generate_cases import chat, learned_model, run

import dms_jax
from dms_jax.engine.prompts import next_turn
from dms_jax.errors import ConfigError


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return learned_model(tmp_path_factory)


def test_chat_keeps_one_cache(folder):
    done = chat(folder, "hello\n/stats\n\nand now?\n/nonsense\n/reset\nhello\n", "--ignore-eos", "--json")
    assert done.returncode == 0, done.stderr.decode()
    tokenizer, model = dms_jax.load_tokenizer(folder), dms_jax.load(folder)
    config = dms_jax.GenerationConfig(max_new_tokens=6, stop_ids=())
    first = dms_jax.generate(model, [tokenizer.encode_chat([{"role": "user", "content": "hello"}], reply=True)], config)
    turn = tokenizer.encode("<|end|><|start|>user and now?<|end|><|start|>assistant ")
    second = dms_jax.generate(
        model,
        [turn],
        config,
        cache=dms_jax.generate(
            model,
            [np.concatenate([tokenizer.encode_chat([{"role": "user", "content": "hello"}], reply=True)])],
            dms_jax.GenerationConfig(max_new_tokens=6, stop_ids=(), capacity=64, overflow="grow"),
        ).cache,
    )
    answers = [tokenizer.decode(result.tokens[0]) for result in (first, second, first)]
    assert done.stdout.decode() == "".join(answer + "\n" for answer in answers)
    stats, *_, final = (json.loads(line) for line in done.stderr.decode().splitlines() if line.startswith("{"))
    assert stats["prompts"] == 1 and final["prompts"] == 3 and final["decode_tokens"] == 18
    assert "unknown command /nonsense" in done.stderr.decode() and "/reset" in done.stderr.decode()


def test_chat_refuses_a_line_beyond_the_context_and_continues(folder):
    done = chat(folder, f"{'x' * 600}\nhello\n")
    assert done.returncode == 0 and "no room for" in done.stderr.decode() and "Traceback" not in done.stderr.decode()
    assert len(done.stdout.decode().splitlines()) >= 1


def test_next_turn_follows_the_chat_template(folder):
    tokenizer = dms_jax.load_tokenizer(folder)
    user = [{"role": "user", "content": "b"}]
    whole = tokenizer.encode_chat(
        [{"role": "user", "content": "a"}, {"role": "assistant", "content": "reply"}, *user], reply=True
    ).tolist()
    so_far = tokenizer.encode("<|start|>user a<|end|><|start|>assistant reply").tolist()
    assert so_far + next_turn(tokenizer, None, user, ended_by=-1).tolist() == whole
    assert [*so_far, 0] + next_turn(tokenizer, None, user, ended_by=0).tolist() == whole
    assert next_turn(tokenizer, "be kind", user).tolist() == next_turn(tokenizer, None, user, ended_by=0).tolist()


def test_saved_cache_is_continued(folder, tmp_path, capsys):
    saved = tmp_path / "kept.safetensors"
    assert run(folder, "--prompt", "hello", "--json", "--ignore-eos", "--save-cache", saved) == 0
    first = json.loads(capsys.readouterr().out)
    assert run(folder, "--prompt", " more", "--json", "--ignore-eos", "--load-cache", saved) == 0
    second = json.loads(capsys.readouterr().out)
    model, tokenizer = dms_jax.load(folder), dms_jax.load_tokenizer(folder)
    config = dms_jax.GenerationConfig(max_new_tokens=8, stop_ids=())
    whole = np.concatenate([tokenizer.encode("hello"), np.array(first["tokens"], np.int32), tokenizer.encode(" more")])
    assert second["tokens"] == dms_jax.generate(model, [whole], config).tokens[0].tolist()
    questions = tmp_path / "questions.txt"
    questions.write_text(" more\n less\n")
    assert run(folder, "--prompts", questions, "--batch", "2", "--ignore-eos", "--load-cache", saved) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[0])["tokens"] == second["tokens"]
    with pytest.raises(ConfigError, match="exists; .*--overwrite"):
        run(folder, "--prompt", "x", "--save-cache", saved)
    saved.write_bytes(saved.read_bytes()[:-100])
    with pytest.raises(ConfigError):
        run(folder, "--prompt", "x", "--load-cache", saved)
