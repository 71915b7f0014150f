"""Results files: where they are, who writes to them, and measurements that they hold twice."""

import dataclasses
import json
import math
import os

import pytest
from golden_folders import DENSE, model_folder

from dms_jax.commands import evaluate, hyperscale
from dms_jax.errors import ConfigError
from dms_jax.evaluation.result_records import AnswerRecord
from dms_jax.evaluation.results import ResultsFile, read_results
from dms_jax.writer_lock import only_writer

ANSWER = AnswerRecord(
    task="t", policy="p", budget="", unit="0", score=0.5, live_tokens=1.0, peak_live=2.0, realised_cr=1.0, kv_reads=3.0
)


def written(path, *records) -> None:
    lines = [{"header": {}, "options": {}}, *map(dataclasses.asdict, records)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.mark.parametrize(
    "changes, differing",
    [
        ({}, False),
        ({"decode_seconds": 9.0, "prefill_seconds": 8.0}, False),  # two measurements never take equally long
        ({"score": 1.0}, True),
        ({"text": "other", "decode_seconds": 9.0}, True),
    ],
)
def test_measurement_that_is_there_twice_counts_once(tmp_path, capsys, changes, differing):
    path = tmp_path / "r.jsonl"
    first = dataclasses.replace(ANSWER, answer_logprob=math.nan)
    other = dataclasses.replace(ANSWER, unit="1")
    written(path, first, other, dataclasses.replace(first, **changes), other)
    results = read_results(path)
    assert repr(results.records) == repr([first, other])
    assert results.places == [f"{path}, line 2", f"{path}, line 3"]
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and f"{path}: 2 measurements" in said
    assert (f"1 have other values than the first, e.g. {path}, line 4" in said) == differing
    content = path.read_text()
    file = ResultsFile(path, {}, {}, ())
    assert len(file.records) == 2 and path.read_text() == content
    assert capsys.readouterr().err.count("\n") == 1


def test_results_without_doubles_are_read_silently(tmp_path, capsys):
    written(tmp_path / "r.jsonl", ANSWER, dataclasses.replace(ANSWER, unit="1"))
    assert len(read_results(tmp_path / "r.jsonl").records) == 2 and capsys.readouterr().err == ""


def test_default_output_is_beside_the_model_and_an_earlier_file_in_it_is_continued(tmp_path, monkeypatch, capsys):
    model = tmp_path / "export"
    model.mkdir()
    (tmp_path / "m.gguf").touch()
    default = evaluate.default_output
    assert default(str(model)) == default(f"{model}/") == f"{model}.evaluation.jsonl"
    assert default(str(tmp_path / "m.gguf")) == str(tmp_path / "m.gguf.evaluation.jsonl")
    assert default("owner/name") == "evaluation.jsonl"
    monkeypatch.chdir(model)
    assert default(".") == f"{model}.evaluation.jsonl" and capsys.readouterr().err == ""
    (model / "evaluation.jsonl").write_text("of an earlier version")
    assert default(str(model)) == str(model / "evaluation.jsonl")
    assert f"{model}.evaluation.jsonl" in capsys.readouterr().err
    (tmp_path / "export.evaluation.jsonl").touch()
    assert default(str(model)) == f"{model}.evaluation.jsonl"


@pytest.mark.parametrize("command", [evaluate, hyperscale])
def test_second_measurement_into_one_file_is_refused_before_anything_is_loaded(tmp_path, command):
    output = tmp_path / "r.jsonl"
    written(output, ANSWER)
    content = output.read_text()
    task = ["--tasks", "recall"] if command is evaluate else ["--task", "recall"]
    with only_writer(output, ""):
        with pytest.raises(ConfigError, match=f"{output}.* process {os.getpid()} on .*--output"):
            command.main(["--model", "nowhere", *task, "--output", str(output)])  # another refusal if it were loaded
        assert len(read_results(output).records) == 1  # readers need no lock
    assert output.read_text() == content and [p.name for p in tmp_path.iterdir()] == ["r.jsonl"]


def test_ratio_that_no_cache_can_have_is_refused_before_the_dense_model_is_measured(tmp_path):
    folder, output = model_folder(tmp_path / "model", DENSE), tmp_path / "s.jsonl"
    argv = ["--model", str(folder), "--task", "recall", "--lengths", "220", "--count", "1", "--policies", "tova"]
    with pytest.raises(ConfigError, match=r"cr5000"):
        hyperscale.main([*argv, "--configs", "1-8-1,1-8-5000", "--output", str(output)])
    assert not output.exists()
