"""Thresholds and budgets of heads for tasks with answers come from problems that are not measured."""

import json

import pytest
from golden_folders import DMS, model_folder

from dms_jax.commands import evaluate, hyperscale
from dms_jax.errors import ConfigError
from dms_jax.evaluation.answer_measure import CALIBRATION_PROBLEMS, other_problems
from dms_jax.evaluation.results import read_results
from dms_jax.tasks.problem import TaskOptions
from dms_jax.tasks.registry import TASKS

COUNT, TOTAL = 2, 2 + CALIBRATION_PROBLEMS


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return model_folder(tmp_path_factory.mktemp("models") / "dms", DMS)


def record(number, letters="a quick brown fox"):
    return {"question": f"Problem {number}: {letters * 4}", "answer": f"It is #### {number + 10}"}


def written(path, records):
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return str(path)


def measure(folder, data, output, *argv):
    """Measure two problems, by default with dms at CR 2; return the threshold and the numbers of the problems."""
    options = ["--max-new-tokens", "4", "--policies", "dms", "--budgets", "cr2", "--count", str(COUNT)]
    argv = [*options, "--data", f"gsm8k={data}", "--batch", "2", "--output", str(output), *argv]
    evaluate.main(["--model", str(folder), "--tasks", "gsm8k", *argv])
    records = list(read_results(output).of_task("gsm8k"))
    (threshold,) = {r.threshold for r in records}
    return threshold, [int(r.problem) for r in records]


def test_measured_problems_decide_no_threshold(folder, tmp_path):
    records = [record(i) for i in range(TOTAL)]
    threshold, measured = measure(folder, written(tmp_path / "a.jsonl", records), tmp_path / "a.results.jsonl")
    assert len(measured) == COUNT
    for name, changes_measured in (("b", True), ("c", False)):
        other = [
            record(i, "ZEBRAS, 9 jackals") if (i + 1 in measured) == changes_measured else r
            for i, r in enumerate(records)
        ]
        now, _ = measure(folder, written(tmp_path / f"{name}.jsonl", other), tmp_path / f"{name}.results.jsonl")
        assert (now == threshold) == changes_measured


def test_without_other_problems_a_file_of_them_is_needed(folder, tmp_path):
    data = written(tmp_path / "a.jsonl", [record(i) for i in range(COUNT)])
    with pytest.raises(ConfigError, match=r"^dms@cr2 .*gsm8k.*smaller --count.*--calibration-data gsm8k=FILE$"):
        measure(folder, data, tmp_path / "r.jsonl")
    with pytest.raises(ConfigError, match="smaller --count.*--calibration-data FILE$"):
        argv = ["--policies", "dms_budget", "--configs", "1-4-2", "--count", str(COUNT), "--data", data]
        hyperscale.main(["--model", str(folder), *argv, "--output", str(tmp_path / "r.jsonl")])
    assert not (tmp_path / "r.jsonl").exists()
    others = written(tmp_path / "b.jsonl", [record(i) for i in range(20, 30)])
    assert measure(folder, data, tmp_path / "r.jsonl", "--calibration-data", f"gsm8k={others}")[0] != 0


def test_only_methods_that_calibrate_need_other_problems(folder, tmp_path):
    data = written(tmp_path / "a.jsonl", [record(i) for i in range(COUNT)])
    policies = ["--policies", "dense,dms,tova", "--budgets", "trained"]
    assert measure(folder, data, tmp_path / "r.jsonl", *policies)[0] == 0


def test_other_problems_are_of_every_length_and_not_measured():
    task, options = TASKS["recall"], TaskOptions(count=1, lengths=(220, 300), depths=(0.0, 1.0))
    problems = task.problems(options, len)
    others = other_problems(task, options, "", len, problems)
    assert len(others) == CALIBRATION_PROBLEMS * len(problems)
    assert not {problem.prompt for problem in problems} & {problem.prompt for problem in others}
    assert {problem.groups["length"] for problem in others} == {220, 300}
