"""Run `python -m infer.evaluate` on a golden model with a byte tokenizer: methods, resuming, output and refusals."""

import dataclasses
import json
import math
import re
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from cases import pair_flags
from golden_folders import DENSE, DMS, model_folder

import dms_jax
from dms_jax.commands.evaluate import main
from dms_jax.core.eviction import live_counts
from dms_jax.core.visibility import NEVER
from dms_jax.errors import ConfigError
from dms_jax.evaluation.methods import Method, parse_methods
from dms_jax.evaluation.result_records import AnswerRecord
from dms_jax.evaluation.results import ResultsFile, read_results
from dms_jax.evaluation.text_tasks import retention
from dms_jax.tasks.problem import TaskOptions
from dms_jax.tasks.registry import TASKS

ROOT = Path(__file__).parents[2]
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


def test_methods_have_equal_live_tokens_and_a_stopped_run_continues(folder, text, tmp_path, capsys):
    whole, resumed = tmp_path / "whole.jsonl", tmp_path / "resumed.jsonl"
    argv = (
        "--tasks",
        "text,greedy,kept",
        "--policies",
        "dense,dms,dms_budget,streaming_llm,tova",
        "--greedy-tokens",
        "16",
    )
    evaluate(folder, text, whole, *argv)
    out = capsys.readouterr().out
    assert "words, 3 rows of 64" in out and "dms@trained" in out and f"python -m infer.report {whole} --output" in out
    results = read_results(whole)
    lives = {
        policy: [r.live_tokens for r in results.of_task("text") if r.policy == policy]
        for policy in ("dense", "dms", "dms_budget", "tova", "streaming_llm")
    }
    equal = [round(np.mean(lives["dms"]))] * 3
    assert lives["dense"] == [64] * 3 and lives["tova"] == lives["streaming_llm"] == lives["dms_budget"] == equal
    lazy = [r for r in results.of_task("text") if r.policy == "dms_budget"]
    assert all(r.nominal_cr == r.realised_cr == 64 / equal[0] and r.pairs_read == equal[0] for r in lazy)
    dms = [r for r in results.of_task("text") if r.policy == "dms"]
    rows = read_rows(folder, text)
    model = dms_jax.load(folder)
    _, evict = model.hard(rows)
    policy = model.config.require_dms()
    want = np.asarray(live_counts(evict, policy.window_size, policy.decision_shift)).mean(axis=(0, 2))
    np.testing.assert_allclose([r.live_tokens for r in dms], want)
    np.testing.assert_allclose([r.realised_cr for r in dms], 64 / want)
    assert all(len(r.kl) == len(r.nll) == 63 for r in dms)
    greedy = {(r.policy, r.unit): r for r in results.of_task("greedy")}
    assert greedy["dense", "words/0"].match == 1 and greedy["dense", "words/0"].divergence == 16
    kept, lazy_kept = results.of_task("kept")
    assert np.mean(lazy_kept.live_per_head) == lazy_kept.live_by_position[-1] == equal[0]
    assert np.std(lazy_kept.live_per_head) > 0, "calibration must give the heads different budgets"
    assert np.diff(lazy_kept.live_by_position).min() >= 0, "no more pairs leave than are added"
    np.testing.assert_allclose(np.mean(kept.live_per_head), want[0])
    assert "".join(kept.pieces).startswith("0 the quick")

    # After a run was killed in the middle of a line, the same command measures only what is missing.
    lines = whole.read_text().splitlines(keepends=True)
    resumed.write_text("".join(lines[:6]) + lines[6][:40])
    evaluate(folder, text, resumed, *argv)
    again = read_results(resumed)
    assert resumed.read_text().startswith("".join(lines[:6]))
    assert sorted(r.key for r in again.records) == sorted(r.key for r in results.records)
    by_key = {r.key: r for r in results.records}
    for record in again.of_task("text"):
        np.testing.assert_allclose(record.kl, by_key[record.key].kl, atol=1e-6)


def read_rows(folder, text) -> np.ndarray:
    ids = dms_jax.load_tokenizer(folder).encode(text.read_text())
    return ids[: 3 * 64].reshape(3, 64)


def test_calibration_meets_the_ratio(folder, text, tmp_path):
    evaluate(folder, text, tmp_path / "r.jsonl", "--policies", "dms,immediate_eviction,knorm", "--budgets", "cr1.5,32")
    for record in read_results(tmp_path / "r.jsonl").records:
        budget = 32 if record.budget == "32" else round(64 / 1.5)
        if record.policy == "knorm":
            assert record.live_tokens == budget
        else:  # calibrated on another row of the text
            assert abs(record.live_tokens / budget - 1) < 0.25


def test_answers_score_as_on_the_full_sequence(folder, tmp_path, capsys):
    output = tmp_path / "r.jsonl"
    grid = ["--lengths", "220", "--depths", "0.5", "--count", "2"]
    argv = ["--model", str(folder), "--tasks", "recall", *grid, "--batch", "2", "--output", str(output)]
    main(
        [
            *argv,
            "--policies",
            "dense,dms,dms_budget,tova,prompt:tova",
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
    records = list(read_results(output).of_task("recall"))
    assert len(records) == 5 * 2 * 2 and len({r.key for r in records}) == 20
    model, tokenizer = dms_jax.load(folder), dms_jax.load_tokenizer(folder)
    count = lambda text: len(tokenizer.encode(text))
    problems = {p.unit: p for p in TASKS["recall"].problems(TaskOptions(count=2, lengths=(220,), depths=(0.5,)), count)}
    for record in records:
        problem = problems[record.problem]
        prompt, answer = tokenizer.encode(problem.prompt), tokenizer.encode(problem.answer)
        assert record.prompt_tokens == len(prompt) and record.score == TASKS["recall"].score(problem, record.text)
        ids = np.concatenate([prompt, answer])[None]
        if record.policy == "dense":
            seen = [len(prompt) + 1 + i for i in range(record.new_tokens)]
            np.testing.assert_allclose(record.kv_reads, sum(seen), rtol=1e-6)
            assert record.realised_cr == 1
        elif record.policy in ("tova", "dms_budget"):
            dms = [r.live_tokens for r in records if r.policy == "dms" and r.groups == record.groups]
            assert record.live_tokens == round(np.mean(dms))
        elif record.policy == "prompt:tova":
            assert record.peak_live >= len(prompt) > record.live_tokens
        if record.policy in ("dense", "dms"):
            logits = model.dense(ids) if record.policy == "dense" else model.hard(ids, threshold=record.threshold)[0]
            logprobs = np.asarray(jax.nn.log_softmax(logits[0, len(prompt) - 1 : -1]))
            np.testing.assert_allclose(record.answer_logprob, logprobs[np.arange(len(answer)), answer].sum(), rtol=1e-4)


def test_retention_equals_the_cache_after_each_prefix(rng):
    for shift in (0, 1):
        evict = rng.random((2, 3, 20)) < 0.6
        marked = np.apply_along_axis(pair_flags, -1, evict, shift)
        retained = retention(np.where(marked, np.arange(20) + 4, NEVER))
        for t in range(20):
            # With shift 1 the last decision of a prefix is about the pair before it, so a prefix has all its decisions.
            want = np.asarray(live_counts(evict[:, None, :, : t + 1], 4, shift))
            np.testing.assert_allclose(retained.live_by_position[t], want.mean())
        np.testing.assert_array_equal(retained.live_per_head, want[:, 0])
        np.testing.assert_allclose(retained.fraction.sum(), want.mean())


def test_methods_are_parsed_from_policies_and_budgets():
    assert parse_methods("tova, dms ,dense", "256,cr4") == [
        Method("dense", ""),
        Method("dms", "256"),
        Method("tova", "256"),
        Method("dms", "cr4"),
        Method("tova", "cr4"),
    ]
    assert (
        Method("tova", "cr4").pairs(1024) == 256
        and Method("tova", "cr2.5").pairs(1000) == 400
        and Method("tova", "256").pairs(9) == 256
    )
    for policies, budgets, *named in [
        ("tovva", "", "--policies", "'tovva'", "tova"),
        ("tova", "", "--policies", "dms"),
        ("tova", "cr0.5", "--budgets", "'cr0.5'"),
        ("tova", "much", "--budgets", "'much'"),
        ("tova", "0", "--budgets", "'0'"),
        ("prompt:dms", "cr2", "--policies", "dms"),
        ("prompt:quest", "64", "--policies", "quest"),
        ("dms", "crx", "--budgets", "'crx'"),
    ]:
        with pytest.raises(ConfigError) as refusal:
            parse_methods(policies, budgets)
        assert all(name in str(refusal.value) for name in named), refusal.value


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["--tasks", "txt"], ["--tasks", "'txt'", "text"]),
        (["--length", "40"], ["--length", "--chunk 16", "40", "--length 32"]),
        (["--rows", "500"], ["words", "500 rows of 64", "32064", r"--rows \d+"]),
        (["--rows", "0"], ["--rows", "got 0"]),
        (["--calibration-rows", "-1"], ["--calibration-rows", "got -1"]),
        (["--text", "words=other.txt"], ["--text", "'words'"]),
        (["--policies", "prompt:tova", "--budgets", "8"], ["--policies prompt:tova", "--tasks text"]),
        (
            ["--budgets", "cr40", "--policies", "dms"],
            ["dms@cr40", r"window of \d+", "64 tokens", r"at least \d+ pairs"],
        ),
        (["--budgets", "cr3000", "--policies", "dms"], ["--budgets cr3000", "0 pairs", "1 to 64", "cr1 to cr64"]),
        (["--budgets", "100", "--policies", "tova"], ["--budgets 100", "100 pairs", "64 tokens"]),
        (["--budgets", "3", "--policies", "streaming_llm"], ["StreamingLLM", "4 sinks", "got 3"]),
        (["--greedy-tokens", "64", "--tasks", "greedy"], ["--greedy-tokens", "--length 64", "got 64"]),
        (["--temperature", "nan"], ["temperature", "nan"]),
        (["--top-p", "0"], ["--top-p", "got 0"]),
        (["--length", "4096"], ["--length", "4096", "512"]),
        (["--policies", ","], ["--policies"]),
        (["--policies", "quest", "--budgets", "32", "--chunk", "32"], ["quest@32", "--chunk 16"]),
        (["--budgets", "cr2", "--calibration-rows", "0"], ["@cr2", "--calibration-rows 1"]),
        (["--policies", "dms,dms_budget", "--calibration-rows", "0"], ["dms_budget@trained", "--calibration-rows 1"]),
        (["--policies", "dms_budget", "--budgets", "3"], ["dms_budget:3", r"window_size \+ 1 = \d+"]),
        (["--chains", "4"], ["4 ", "--temperature 0.7"]),
        (["--lengths", "x"], ["--lengths", "'x'"]),
        (["--data", "test.jsonl"], ["--data", "'test'", "--tasks text", "--data TASK=FILE"]),
    ],
)
def test_options_that_cannot_work_are_named(folder, text, tmp_path, argv, named):
    with pytest.raises(ConfigError) as refusal:
        evaluate(folder, text, tmp_path / "r.jsonl", *argv)
    message = str(refusal.value)
    assert "\n" not in message and all(re.search(name, message) for name in named), message
    assert not (tmp_path / "r.jsonl").exists()


def test_another_model_or_text_needs_another_file(folder, text, tmp_path):
    output = tmp_path / "r.jsonl"
    evaluate(folder, text, output, "--policies", "dense")
    other = shutil.copy(text, tmp_path / "other.txt")
    with open(other, "a") as file:
        file.write("more")
    with pytest.raises(ConfigError, match=r"text:words: \w+ -> \w+.*--output"):
        evaluate(folder, other, output, "--policies", "dense")
    plain = model_folder(tmp_path / "plain", DENSE)
    with pytest.raises(ConfigError, match="base_sha256"):
        evaluate(plain, text, output, "--policies", "dense")
    for argv in ([], ["--policies", "dms"]):
        with pytest.raises(ConfigError, match=f"{plain}.*--adapter FILE"):
            evaluate(plain, text, tmp_path / "n.jsonl", *argv)


def test_damaged_results_file_is_refused_and_left_unchanged(tmp_path):
    path = tmp_path / "r.jsonl"
    identity = '"task": "text", "policy": "tova", "budget": "256"'
    for content, named in [
        ('{"a": 1}\n', ["header"]),
        ("not a file of ours", ["header"]),
        ('{"header": 3}\n', ["line 1", "`header`"]),
        ('{"header": {}}\n{"x": 1}\n', ["line 2", "task, policy, budget, unit"]),
        (f'{{"header": {{}}}}\n{{{identity}}}\n', ["line 2", "missing keys: unit"]),
        (f'{{"header": {{}}}}\n{{{identity}, "unit": "a/0"}}\n', ["line 2", "text of tova@256", "kl", "domain"]),
        ('{"header": {}}\nnonsense\n', ["line 2", "JSON"]),
        ('{"header": {}, "header": {}}\n', ["line 1", "'header'"]),
    ]:
        path.write_text(content)
        with pytest.raises(ConfigError) as refusal:
            ResultsFile(path, {}, {}, ())
        assert all(name in str(refusal.value) for name in named), refusal.value
        assert path.read_text() == content


ANSWER = AnswerRecord(
    task="t", policy="p", budget="", unit="0", score=0.5, live_tokens=1.0, peak_live=2.0, realised_cr=1.0, kv_reads=3.0
)


def test_records_are_read_back_as_they_were_written(tmp_path):
    path = tmp_path / "r.jsonl"
    path.write_text("")
    file = ResultsFile(path, {"jax": "1"}, {}, ())
    diverged = dataclasses.replace(ANSWER, unit="1", answer_logprob=math.nan, live_tokens=math.inf)
    for record in (ANSWER, diverged):
        file.append(record)
    assert json.loads(path.read_text().splitlines()[1]) == dataclasses.asdict(ANSWER)
    assert repr(read_results(path).records) == repr(
        [ANSWER, diverged]
    )  # compared as text, because nan differs from itself
    with open(path, "a") as other:  # a key of a later version, and a line that was not finished
        other.write(json.dumps(dataclasses.asdict(ANSWER) | {"unit": "2", "new_key": 1}) + '\n{"task": "t", "pol')
    assert [record.unit for record in ResultsFile(path, {"jax": "1"}, {}, ()).records] == ["0", "1", "2"]
    assert path.read_text().endswith("}\n")
