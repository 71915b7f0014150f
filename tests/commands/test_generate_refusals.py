"""`infer.generate` refuses what cannot work, in one line and with exit code 2."""

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from generate_cases import DOOR, ROOT, chat, command, learned_model, plain_model, run

from dms_jax.commands.generate import main
from dms_jax.errors import ConfigError
from dms_jax.writer_lock import only_writer


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return learned_model(tmp_path_factory)


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    return plain_model(tmp_path_factory)


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
        (["--model", "x", "--prompt", "a", "--dense", "--policy", "tova:9"], "--policy .*--dense"),
        (["--model", "x", "--prompt", "a", "--load-cache", "y", "--policy", "tova:9"], "--policy .*--load-cache"),
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
        (["--policy", "dms_budget:3"], r"'dms_budget:3'.*window_size \+ 1"),
        (["--policy", "tova:32", "--threshold", "1"], "--threshold .*--policy tova:32"),
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
        (["--policy", "dms_budget:32"], "'dms_budget:32'.*no evict head"),
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


@pytest.mark.parametrize("option", ["--output", "--save-cache"])
def test_file_of_the_model_is_never_overwritten(folder, tmp_path, option):
    prompts = tmp_path / "p.txt"
    prompts.write_text("hi\n")
    before = (folder / "model.safetensors").read_bytes()
    source = ["--prompts", prompts] if option == "--output" else ["--prompt", "hi"]
    with pytest.raises(ConfigError, match=f"{option} .* is a file of the model"):
        run(folder, *source, option, folder / "model.safetensors", "--overwrite")
    assert (folder / "model.safetensors").read_bytes() == before


def test_output_that_another_process_writes_is_refused(folder, tmp_path):
    prompts = tmp_path / "p.txt"
    prompts.write_text("hi\n")
    with only_writer(tmp_path / "out.jsonl", ""), pytest.raises(ConfigError, match="process"):
        run(folder, "--prompts", prompts, "--output", tmp_path / "out.jsonl")


def test_second_system_message_is_refused(folder, tmp_path):
    prompts = tmp_path / "p.jsonl"
    prompts.write_text('{"messages": [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}]}\n')
    with pytest.raises(ConfigError, match="--system"):
        run(folder, "--prompts", prompts, "--system", "c")
