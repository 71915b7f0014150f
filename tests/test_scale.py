"""benchmarks.scale: the tables say what the plans say, and what is in the file is not made again."""

import json
import subprocess

import pytest

from benchmarks import scale
from dms_jax.commands import plan
from dms_jax.errors import ConfigError


@pytest.fixture(scope="module")
def line():
    options = plan.parse([*scale.PARTS["scale"][0].split(), "--analytic"])
    return {"part": "scale", "arguments": scale.PARTS["scale"][0], **plan.retrofit_plan(options)}


def test_the_tables_hold_the_plan_and_the_references_cost(line, tmp_path, capsys):
    file = tmp_path / "scale.jsonl"
    file.write_text(json.dumps(line) + "\n")
    assert scale.main(["--output", str(file), "--table"]) == 0
    said = capsys.readouterr().out
    hours = 8 * 7 * 34 * line["seconds_per_step"] / 3600
    assert f"| {hours:.1f} | 1 |" in said and f"`python -m train.plan {line['arguments']}`" in said
    assert f"{32 / hours:.1f} times cheaper" in said
    assert f"{238 * line['flops_per_step'] / (32 * 3600 * 989e12):.1%} of the peak by the same count" in said
    assert "| 1.00 |" in said.splitlines()[-1], "an estimate is as large as itself"


def test_what_is_known_is_not_compiled_again(line, tmp_path, monkeypatch, capsys):
    file, asked = tmp_path / "scale.jsonl", []
    file.write_text(json.dumps(line) + "\n")

    def run(command, **_):
        asked.append(" ".join(command[3:-1]))
        return subprocess.CompletedProcess(command, 1, "")

    monkeypatch.setattr(subprocess, "run", run)
    assert scale.main(["--output", str(file), "--part", "scale"]) == 1
    assert asked == list(scale.PARTS["scale"][1:])
    assert len(scale.read(file)) == 1 and "failed: train.plan" in capsys.readouterr().err


def test_another_file_is_refused(tmp_path):
    (tmp_path / "other.jsonl").write_text('{"kernel": "copy"}\n')
    with pytest.raises(ConfigError, match="holds no lines of benchmarks.scale"):
        scale.main(["--output", str(tmp_path / "other.jsonl"), "--table"])
    with pytest.raises(ConfigError, match="no file in a folder that exists"):
        scale.main(["--output", str(tmp_path / "nowhere" / "x.jsonl"), "--table"])
