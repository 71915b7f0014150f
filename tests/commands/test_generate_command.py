"""`python -m infer.generate` on a golden model with a tokenizer of 131 tokens: its three modes, and what it refuses."""

import ast
import json
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from golden_folders import DENSE, DMS, model_folder

import dms_jax
from dms_jax.command import DOORS
from dms_jax.commands.generate import NAME, main, parse
from dms_jax.engine.prompts import Encoder, Prompt, next_turn
from dms_jax.engine.stopwatch import covered
from dms_jax.engine.text_stream import TextStream, trim_at_stop
from dms_jax.errors import ConfigError

ROOT = Path(__file__).parents[2]
DOOR = DOORS[NAME]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return model_folder(tmp_path_factory.mktemp("models") / "modèle", DMS)  # a path that is not ASCII


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    return model_folder(tmp_path_factory.mktemp("models") / "plain", DENSE, template=None)


def run(folder, *argv, new: int = 8) -> int:
    return main(["--model", str(folder), "--max-new-tokens", str(new), *map(str, argv)])


def chat(folder, lines: str, *argv) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", DOOR, "--model", str(folder), "--chat", "--max-new-tokens", "6", *map(str, argv)]
    return subprocess.run(command, cwd=ROOT, input=lines.encode(), capture_output=True, timeout=300)


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
        and costs["cache_bytes"] > costs["live_bytes"]
    )
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
    }.items():
        assert run(folder, "--prompt", "hello world", "--json", "--ignore-eos", *argv, new=40) == 0
        numbers[name] = json.loads(capsys.readouterr().out)
    assert (
        numbers["dense"]["realised_cr"] == numbers["never"]["realised_cr"] == 1
        and numbers["dense"]["costs"]["nominal_cr"] is None
    )
    assert numbers["dense"]["text"] == numbers["never"]["text"] == numbers["grow"]["text"]
    assert numbers["always"]["live_pairs"] == pytest.approx(9, abs=1) and numbers["always"]["realised_cr"] > 4
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


def test_answer_ends_before_the_stop_text(folder, capsys):
    assert run(folder, "--prompt", "hello", "--json", "--ignore-eos", new=30) == 0
    text = json.loads(capsys.readouterr().out)["text"]
    stop = text[10:12]
    assert run(folder, "--prompt", "hello", "--ignore-eos", "--stop", stop, "--stop", "no such text", new=30) == 0
    assert capsys.readouterr().out == text[: text.find(stop)] + "\n"


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


def test_adapter_brings_the_policy(folder, tmp_path, capsys):
    dms_jax.save_adapter(dms_jax.load(folder), tmp_path / "adapter.safetensors")
    assert run(folder, "--adapter", tmp_path / "adapter.safetensors", "--prompt", "hello", "--json") == 0
    assert json.loads(capsys.readouterr().out)["costs"]["nominal_cr"] is not None


def test_stream_shows_whole_characters_only():
    folder_text = "a😀b\ufffd😀"
    ids = np.frombuffer(folder_text.encode(), np.uint8)
    decode = lambda part: bytes(bytearray(part)).decode("utf-8", "replace")
    for step in (1, 2, 3):
        stream, pieces = TextStream(decode), []
        for n in range(step, len(ids) + step, step):
            pieces.append(stream.push(ids[:n]))
            assert folder_text.startswith("".join(pieces))
        pieces.append(stream.push(ids, last=True))
        assert "".join(pieces) == folder_text
    torn = TextStream(decode)
    assert torn.push(ids[:1]) == "a" and torn.push(ids[:3]) == "" and torn.push(ids[:3], last=True) == decode(ids[1:3])


def test_stream_holds_back_a_possible_stop_text():
    decode = "".join
    stream = TextStream(decode, ("END", "\n\n"))
    assert [stream.push(list("one E"[:n])) for n in range(1, 6)] == ["o", "n", "e", " ", ""]
    assert stream.push(list("one ExENDtwo")) == "Ex" and stream.push(list("one ExENDtwo more"), last=True) == ""
    free = TextStream(decode, ("END",))
    assert free.push(list("EN")) == "" and free.push(list("EN"), last=True) == "EN"


def test_text_is_trimmed_at_the_first_stop_string():
    assert trim_at_stop("one END two STOP", ("STOP", "END")) == "one " and trim_at_stop("one", ("END",)) == "one"


def test_compile_time_is_the_union_of_intervals():
    assert covered([(0, 4), (1, 2), (3, 6), (8, 9)], 2) == 5 and covered([], 0) == 0


@pytest.mark.parametrize(
    "argv, message",
    [
        ([], "--model"),
        (["--model", "x"], "--prompt .*--prompts .*--chat"),
        (["--model", "x", "--prompt", "a", "--chat"], "--prompt .*--prompts .*--chat"),
        (["--model", "x", "--prompt", ""], "--prompt .*empty"),
        (["--model", "x", "--chat", "--output", "y"], "--output .*--chat"),
        (["--model", "x", "--prompt", "a", "--batch", "2"], "--batch .*--prompt"),
        (["--model", "x", "--prompts", "a", "--batch", "0"], "--batch .*got 0"),
        (["--model", "x", "--prompts", "a", "--save-cache", "y"], "--save-cache .*--prompts"),
        (["--model", "x", "--prompt", "a", "--system", "y"], "--system .*--prompt .*--as-chat"),
        (["--model", "x", "--prompt", "a", "--load-cache", "y", "--capacity", "9"], "--capacity .*--load-cache"),
        (["--model", "x", "--prompt", "a", "--dense", "--threshold", "1"], "--threshold .*--dense"),
        (["--model", "no_such_folder", "--prompt", "a"], "no_such_folder: no such folder or file"),
        (["--model", "x", "--prompt", "a\udcff"], "--prompt .*UTF-8 at character 1"),
        (["--model", "x", "--prompt", "a", "--stop", "\udcff"], "--stop .*UTF-8 at character 0"),
        (["--model", "x", "--prompts", "a.csv"], r"\.txt .*\.jsonl .*a\.csv"),
        (["--model", "x", "--prompts", "no_such.txt"], r"cannot read no_such\.txt"),
    ],
)
def test_options_that_cannot_work_are_refused(argv, message):
    with pytest.raises(ConfigError, match=message) as why:
        main(argv)
    assert "\n" not in str(why.value)


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--max-new-tokens", "0"], "max_new_tokens .*got 0"),
        (["--temperature", "-1"], "temperature .*got -1"),
        (["--temperature", "inf"], "temperature .*got inf"),
        (["--top-p", "0"], "top_p .*got 0"),
        (["--top-k", "-1"], "top_k .*got -1"),
        (["--min-p", "1"], "min_p .*got 1"),
        (["--repetition-penalty", "0"], "repetition_penalty .*got 0"),
        (["--seed", "-1"], "seed .*got -1"),
        (["--stop", ""], "stop_strings .*got"),
        (["--threshold", "nan"], "threshold .*got nan"),
        (["--chunk-size", "0"], "chunk_size .*got 0"),
        (["--capacity", "many"], "--capacity .*got 'many'"),
        (["--capacity", "0"], "--capacity .*got '0'"),
        (["--capacity", "64,64"], r"capacity .*\(3\), got 2"),
        (["--capacity", "4"], "capacity 4 .*>= 64"),
        (
            ["--overflow", "raise", "--threshold", "1e9", "--capacity", "16", "--max-new-tokens", "40"],
            "cache overflow at layer",
        ),
        (["--max-new-tokens", "600"], "512 tokens, .*max_position_embeddings, got .*shorten it by"),
        (["--adapter", "no_such"], "no such adapter file"),
        (["--load-cache", "no_such"], "no such cache file"),
    ],
)
def test_settings_that_cannot_work_are_refused(folder, argv, message):
    with pytest.raises(ConfigError, match=message) as why:
        run(folder, "--prompt", "hello", "--ignore-eos", *argv)
    assert "\n" not in str(why.value)


def test_plain_model_is_dense_and_refuses_policy_options(plain, capsys):
    assert run(plain, "--prompt", "hello", "--json") == 0
    assert json.loads(capsys.readouterr().out)["costs"]["nominal_cr"] is None
    for argv, message in [
        (["--threshold", "1"], "--threshold .*no eviction policy"),
        (["--as-chat"], "has no chat template; use plain text"),
    ]:
        with pytest.raises(ConfigError, match=message):
            run(plain, "--prompt", "hello", *argv)
    done = chat(plain, "hello\n")
    assert (
        done.returncode == 2
        and "has no chat template" in done.stderr.decode()
        and "Traceback" not in done.stderr.decode()
    )


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


def command(*argv: str, **variables) -> subprocess.CompletedProcess:
    import os

    return subprocess.run(
        [sys.executable, "-m", DOOR, *argv],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ | variables,
        timeout=300,
    )


def test_help_imports_no_accelerator_library():
    start = time.perf_counter()
    done = command("--help", PYTHONPROFILEIMPORTTIME="1")
    assert done.returncode == 0 and "--save-cache" in done.stdout and time.perf_counter() - start < 30
    assert not re.search(r"\| +(jax|flax|transformers|numpy)\n", done.stderr)


@pytest.mark.parametrize(
    "argv, message",
    [
        ([], "infer.generate: --model"),
        (["--modle", "x"], "unknown option --modle; did you mean --model?"),
        (
            ["--model", "x", "--prompt", "a", "--temperature", "warm"],
            "argument --temperature: invalid float value: 'warm'",
        ),
    ],
)
def test_user_errors_are_one_line_and_exit_2(argv, message):
    done = command(*argv)
    assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1 and done.stdout == ""


def test_missing_backend_is_one_line_and_exit_2(folder):
    done = command("--model", str(folder), "--prompt", "a", JAX_PLATFORMS="tpu")
    assert done.returncode == 2 and "JAX found no usable device" in done.stderr and "Traceback" not in done.stderr


def test_closed_stdout_ends_quietly_with_exit_141(folder):
    process = subprocess.Popen(
        [sys.executable, "-m", DOOR, "--model", str(folder), "--prompt", "hello", "--ignore-eos"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    process.stdout.close()  # nobody reads on, as after `| head -1`
    stderr = process.stderr.read().decode()
    assert process.wait(timeout=300) == 141 and "Traceback" not in stderr


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
