"""Tests of benchmarks.scale: its tables show the plans, and plans that are already in the file are not compiled
again."""

import json
import subprocess

import pytest

from benchmarks import scale
from dms_jax.commands import plan
from dms_jax.errors import ConfigError
from dms_jax.training.planning.plan_text import step_json


@pytest.fixture(scope="module")
def line():
    options = plan.parse([*scale.PARTS["scale"][0].split(), "--analytic"])
    return {"part": "scale", "arguments": scale.PARTS["scale"][0], **step_json(plan.retrofit_plan(options))}


def test_tables_show_the_plan_and_the_cost_of_the_reference(line, tmp_path, capsys):
    file = tmp_path / "scale.jsonl"
    file.write_text(json.dumps(line) + "\n")
    assert scale.main(["--output", str(file), "--table"]) == 0
    printed = capsys.readouterr().out
    hours = 8 * 7 * 34 * line["seconds_per_step"] / 3600
    assert f"| {hours:.1f} | 1 |" in printed and f"`python -m train.plan {line['arguments']}`" in printed
    assert f"{32 / hours:.1f} times cheaper" in printed
    assert f"{238 * line['flops_per_step'] / (32 * 3600 * 989e12):.1%} of the peak " in printed
    assert "| 1.00 |" in printed.splitlines()[-1], "the ratio of an estimate to itself"


def test_plans_in_the_file_are_not_compiled_again(line, tmp_path, monkeypatch, capsys):
    file, asked = tmp_path / "scale.jsonl", []
    file.write_text(json.dumps(line) + "\n")

    def run(command, **_):
        asked.append(" ".join(command[3:-1]))
        return subprocess.CompletedProcess(command, 1, "")

    monkeypatch.setattr(subprocess, "run", run)
    assert scale.main(["--output", str(file), "--part", "scale"]) == 1
    assert asked == list(scale.PARTS["scale"][1:])
    assert len(scale.read(file)) == 1 and "failed: train.plan" in capsys.readouterr().err


def test_foreign_files_are_refused(tmp_path):
    (tmp_path / "other.jsonl").write_text('{"kernel": "copy"}\n')
    with pytest.raises(ConfigError, match="other.jsonl, line 1: .*benchmarks.scale"):
        scale.main(["--output", str(tmp_path / "other.jsonl"), "--table"])
    with pytest.raises(ConfigError, match="--output .*nowhere"):
        scale.main(["--output", str(tmp_path / "nowhere" / "x.jsonl"), "--table"])
