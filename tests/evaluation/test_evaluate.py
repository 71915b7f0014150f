"""`python -m infer.evaluate` on a golden model with a byte tokenizer: arms, resuming, what it prints and refuses."""

import json
import shutil

import jax
import numpy as np
import pytest
from test_generate_command import DENSE, DMS, model_folder

import dms_jax
from dms_jax.commands.evaluate import main
from dms_jax.core.eviction import live_counts
from dms_jax.errors import ConfigError
from dms_jax.evaluation.arms import Arm, parse_arms
from dms_jax.evaluation.results import ResultsFile, key_of, read_results
from dms_jax.evaluation.text_measure import held_by_position
from dms_jax.tasks.problem import TaskOptions
from dms_jax.tasks.registry import TASKS

WORDS = "the quick brown fox jumps over a lazy dog and then sleeps until it is morning again. "


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return model_folder(tmp_path_factory.mktemp("models") / "dms", DMS)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text("".join(f"{i} {WORDS}" for i in range(40)))
    return path


def evaluate(folder, text, output, *argv) -> None:
    main(
        [
            "--model",
            str(folder),
            "--text",
            f"words={text}",
            "--length",
            "64",
            "--rows",
            "3",
            "--batch",
            "2",
            "--calibration-rows",
            "1",
            "--output",
            str(output),
            *argv,
        ]
    )


def test_arms_at_equal_live_tokens_and_a_run_that_goes_on(folder, text, tmp_path, capsys):
    whole, resumed = tmp_path / "whole.jsonl", tmp_path / "resumed.jsonl"
    argv = ("--tasks", "text,greedy,kept", "--policies", "dense,dms,streaming_llm,tova", "--greedy-tokens", "16")
    evaluate(folder, text, whole, *argv)
    out = capsys.readouterr().out
    assert "words, 3 rows of 64" in out and "dms@trained" in out and f"python -m infer.report {whole} --output" in out
    results = read_results(whole)
    lives = {
        policy: [r["live_tokens"] for r in results.of("text") if r["policy"] == policy]
        for policy in ("dense", "dms", "tova", "streaming_llm")
    }
    assert lives["dense"] == [64] * 3 and lives["tova"] == lives["streaming_llm"] == [round(np.mean(lives["dms"]))] * 3
    dms = [r for r in results.of("text") if r["policy"] == "dms"]
    rows = read_rows(folder, text)
    model = dms_jax.load(folder)
    _, evict = model.hard(rows)
    policy = model.config.require_dms()
    want = np.asarray(live_counts(evict, policy.window_size, policy.decision_shift)).mean(axis=(0, 2))
    np.testing.assert_allclose([r["live_tokens"] for r in dms], want)
    np.testing.assert_allclose([r["realised_cr"] for r in dms], 64 / want)
    assert all(len(r["kl"]) == len(r["nll"]) == 63 for r in dms)
    greedy = {(r["policy"], r["unit"]): r for r in results.of("greedy")}
    assert greedy["dense", "words/0"]["match"] == 1 and greedy["dense", "words/0"]["divergence"] == 16
    kept = next(results.of("kept"))
    np.testing.assert_allclose(np.mean(kept["live_per_head"]), want[0])
    assert "".join(kept["pieces"]).startswith("0 the quick")

    # Killed in the middle of a line: the same command measures what is missing, and only that.
    lines = whole.read_text().splitlines(keepends=True)
    resumed.write_text("".join(lines[:6]) + lines[6][:40])
    evaluate(folder, text, resumed, *argv)
    again = read_results(resumed)
    assert resumed.read_text().startswith("".join(lines[:6]))
    assert sorted(map(key_of, again.records)) == sorted(map(key_of, results.records))
    by_key = {key_of(r): r for r in results.records}
    for record in again.of("text"):
        np.testing.assert_allclose(record["kl"], by_key[key_of(record)]["kl"], atol=1e-6)


def read_rows(folder, text) -> np.ndarray:
    ids = dms_jax.load_tokenizer(folder).encode(text.read_text())
    return ids[: 3 * 64].reshape(3, 64)


def test_a_calibrated_ratio_is_met(folder, text, tmp_path):
    evaluate(folder, text, tmp_path / "r.jsonl", "--policies", "dms,immediate_eviction,knorm", "--budgets", "cr1.5,32")
    for record in read_results(tmp_path / "r.jsonl").records:
        budget = 32 if record["budget"] == "32" else round(64 / 1.5)
        if record["policy"] == "knorm":
            assert record["live_tokens"] == budget
        else:  # calibrated on another row of the text
            assert abs(record["live_tokens"] / budget - 1) < 0.25


def test_answers_are_scored_as_the_full_sequence_scores_them(folder, tmp_path, capsys):
    output = tmp_path / "r.jsonl"
    grid = ["--lengths", "220", "--depths", "0.5", "--count", "2"]
    argv = ["--model", str(folder), "--tasks", "recall", *grid, "--batch", "2", "--output", str(output)]
    main(
        [
            *argv,
            "--policies",
            "dense,dms,tova,prompt:tova",
            "--budgets",
            "cr2",
            "--chains",
            "2",
            "--temperature",
            "1.0",
            "--json",
        ]
    )
    lines = {line["arm"]: line for line in map(json.loads, capsys.readouterr().out.splitlines())}
    assert (
        lines["tova@cr2"]["problems"] == 2
        and lines["tova@cr2"]["chains"] == 2
        and lines["dense"]["pass@2"] >= lines["dense"]["pass@1"]
    )
    records = list(read_results(output).of("recall"))
    assert len(records) == 4 * 2 * 2 and len({key_of(r) for r in records}) == 16
    model, tokenizer = dms_jax.load(folder), dms_jax.load_tokenizer(folder)
    count = lambda text: len(tokenizer.encode(text))
    problems = {p.unit: p for p in TASKS["recall"].problems(TaskOptions(count=2, lengths=(220,), depths=(0.5,)), count)}
    for record in records:
        problem = problems[record["problem"]]
        prompt, answer = tokenizer.encode(problem.prompt), tokenizer.encode(problem.answer)
        assert record["prompt_tokens"] == len(prompt) and record["score"] == TASKS["recall"].score(
            problem, record["text"]
        )
        ids = np.concatenate([prompt, answer])[None]
        if record["policy"] == "dense":
            seen = [len(prompt) + 1 + i for i in range(record["new_tokens"])]
            np.testing.assert_allclose(record["kv_reads"], sum(seen), rtol=1e-6)
            assert record["realised_cr"] == 1
        elif record["policy"] == "tova":
            dms = [r["live_tokens"] for r in records if r["policy"] == "dms" and r["groups"] == record["groups"]]
            assert record["live_tokens"] == round(np.mean(dms))
        elif record["policy"] == "prompt:tova":
            assert record["peak_live"] >= len(prompt) > record["live_tokens"]
        if record["policy"] in ("dense", "dms"):
            logits = (
                model.dense(ids) if record["policy"] == "dense" else model.hard(ids, threshold=record["threshold"])[0]
            )
            logprobs = np.asarray(jax.nn.log_softmax(logits[0, len(prompt) - 1 : -1]))
            np.testing.assert_allclose(
                record["answer_logprob"], logprobs[np.arange(len(answer)), answer].sum(), rtol=1e-4
            )


def test_held_by_position_is_the_cache_of_each_prefix(rng):
    for shift in (0, 1):
        evict = rng.random((2, 3, 20)) < 0.6
        held = held_by_position(evict, 4, shift)
        for t in range(20):
            # The last decision of a prefix under shift 1 is about the pair before it, so a prefix of the decisions is all there is.
            want = np.asarray(live_counts(evict[:, None, :, : t + 1], 4, shift))
            np.testing.assert_allclose(held.live_by_position[t], want.mean())
        np.testing.assert_array_equal(held.live_per_head, want[:, 0])
        np.testing.assert_allclose(held.kept.sum(), want.mean())


def test_how_arms_are_named():
    assert parse_arms("tova, dms ,dense", "256,cr4") == [
        Arm("dense", ""),
        Arm("dms", "256"),
        Arm("tova", "256"),
        Arm("dms", "cr4"),
        Arm("tova", "cr4"),
    ]
    assert (
        Arm("tova", "cr4").pairs(1024) == 256
        and Arm("tova", "cr2.5").pairs(1000) == 400
        and Arm("tova", "256").pairs(9) == 256
    )
    for policies, budgets, message in [
        ("tovva", "", "unknown policy 'tovva'; did you mean tova"),
        ("tova", "", "add dms to --policies"),
        ("tova", "cr0.5", "'cr0.5' is none"),
        ("tova", "much", "'much' is none"),
        ("tova", "0", "'0' is none"),
        ("prompt:dms", "cr2", "does not rank pairs"),
        ("dms", "crx", "'crx' is none"),
    ]:
        with pytest.raises(ConfigError, match=message):
            parse_arms(policies, budgets)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--tasks", "txt"], "unknown task 'txt'; did you mean text"),
        (["--length", "40"], "no multiple of --chunk 16; use --length 32"),
        (
            ["--rows", "500"],
            r"the text words has \d+ tokens, 500 rows of 64 and 1 to calibrate on take 32064; use --rows \d+, or give more text",
        ),
        (["--rows", "0"], "--rows must be at least 1"),
        (["--text", "words=other.txt"], "names 'words' twice"),
        (["--policies", "prompt:tova", "--budgets", "8"], "it does not apply to --tasks text"),
        (
            ["--budgets", "cr40", "--policies", "dms"],
            "under a window of .* reach at most .*; use longer rows, or a budget of",
        ),
        (
            ["--budgets", "cr3000", "--policies", "dms"],
            "--budgets cr3000 is 0 pairs of rows of 64 tokens; give 1 to 64, or cr1 to cr64",
        ),
        (["--budgets", "100", "--policies", "tova"], "--budgets 100 is 100 pairs of rows of 64 tokens"),
        (
            ["--budgets", "3", "--policies", "streaming_llm"],
            "a sliding window of 3 pairs has no room beside 4 sinks; use a budget > 4",
        ),
        (["--greedy-tokens", "64", "--tasks", "greedy"], "leaves nothing of rows of 64"),
        (["--temperature", "nan"], "temperature must be a finite number"),
        (["--length", "4096"], "beyond this model's"),
        (["--policies", ","], "--policies is empty"),
        (["--policies", "quest", "--budgets", "32", "--chunk", "32"], "use --chunk 16 or less"),
        (["--budgets", "cr2", "--calibration-rows", "0"], "needs --calibration-rows 1 or more"),
        (["--chains", "4"], "use e.g. --temperature 0.7"),
        (["--lengths", "x"], "--lengths wants numbers"),
        (["--data", "test.jsonl"], "--data names 'test', which is not among --tasks text; write --data TASK=FILE"),
    ],
)
def test_what_is_refused(folder, text, tmp_path, argv, message):
    with pytest.raises(ConfigError, match=message):
        evaluate(folder, text, tmp_path / "r.jsonl", *argv)


def test_another_model_or_another_text_needs_another_file(folder, text, tmp_path):
    output = tmp_path / "r.jsonl"
    evaluate(folder, text, output, "--policies", "dense")
    other = shutil.copy(text, tmp_path / "other.txt")
    with open(other, "a") as file:
        file.write("more")
    with pytest.raises(ConfigError, match=r"measured otherwise \(text:words: .* give another --output"):
        evaluate(folder, other, output, "--policies", "dense")
    plain = model_folder(tmp_path / "plain", DENSE)
    with pytest.raises(ConfigError, match="base_sha256"):
        evaluate(plain, text, output, "--policies", "dense")
    with pytest.raises(ConfigError, match="has no eviction policy"):
        evaluate(plain, text, tmp_path / "n.jsonl")
    with pytest.raises(ConfigError, match="has no eviction policy"):
        evaluate(plain, text, tmp_path / "n.jsonl", "--policies", "dms")


def test_a_damaged_file_of_results_is_named_and_kept(tmp_path):
    path = tmp_path / "r.jsonl"
    for content, message in [
        ('{"a": 1}\n', "does not begin with the header"),
        ('{"header": {}}\n{"x": 1}\n', "line 2: no result"),
        ('{"header": {}}\nnonsense\n', "line 2: no result"),
    ]:
        path.write_text(content)
        with pytest.raises(ConfigError, match=message):
            ResultsFile(path, {}, {}, ())
        assert path.read_text() == content
    path.write_text("")
    file = ResultsFile(path, {"jax": "1"}, {}, ())
    file.append({"task": "t", "policy": "p", "budget": "", "unit": "0", "score": np.float32(0.5)})
    assert json.loads(path.read_text().splitlines()[1])["score"] == 0.5
