"""What commands say where only the wheel is installed, and the defaults of a plan for small models."""

import json
import sys

import jax
import pytest
from cases import GOLDEN
from synthetic_results import records, write

from dms_jax.command import DOORS
from dms_jax.commands import evaluate, generate, hyperscale, inspect, plan, report, retrofit
from dms_jax.errors import ConfigError
from dms_jax.reporting.report_page import build

COMMANDS = {"evaluate": evaluate, "generate": generate, "hyperscale": hyperscale, "plan": plan, "report": report}
COMMANDS |= {"retrofit": retrofit, "inspect": inspect}


@pytest.mark.parametrize("name", DOORS)
def test_help_of_an_installed_command_names_nothing_that_a_wheel_lacks(name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["/usr/bin/dms-jax"])
    with pytest.raises(SystemExit):
        COMMANDS[name].parse(["--help"])
    printed = capsys.readouterr().out
    assert "configs/" not in printed and "python -m" not in printed and f"dms-jax {name}" in printed


def test_report_names_the_command_as_the_user_types_it(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["/usr/bin/dms-jax"])
    lines = [line for line in records(length=64, rows=1, repeats=1, layers=2, heads=2) if line["task"] == "greedy"]
    page = build([str(write(tmp_path / "r.jsonl", lines))], "t")["report.html"].decode()
    assert "<code>dms-jax evaluate --model" in page and "python -m infer" not in page
    with pytest.raises(ConfigError, match="dms-jax evaluate"):
        build([str(write(tmp_path / "empty.jsonl", []))], "t")


@pytest.mark.parametrize(
    "argv, key, default", [([], "length", 4096), (["--inference"], "context", 32768)], ids=["retrofit", "server"]
)
def test_default_of_a_plan_is_at_most_the_limit_of_the_model(argv, key, default, capsys):
    assert jax.device_count() > 1  # start the devices of conftest.py first
    small = GOLDEN / "llama3_rope_scaled"  # a context of 512
    for model, expected in ((small, 512), ("configs/models/qwen3-8b.json", default)):
        plan.main(["--model", str(model), "--hardware", "h100x1", "--analytic", "--json", *argv])
        assert json.loads(capsys.readouterr().out)[key] == expected
    with pytest.raises(ConfigError, match="513.*512|512.*513"):
        plan.main(["--model", str(small), "--hardware", "h100x1", "--analytic", f"--{key}", "513", *argv])
    with pytest.raises(ConfigError, match=f"--{key}.*got 1"):
        plan.main(["--model", str(small), "--hardware", "h100x1", f"--{key}", "1", *argv])
