"""The examples of docs/python.md and docs/policies.md run as they are printed."""

import re
from pathlib import Path

from golden_folders import DMS, model_folder

DOCS = Path(__file__).parent.parent / "docs"


def examples(page: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", (DOCS / page).read_text(), re.MULTILINE | re.DOTALL)


def test_examples_that_need_no_network_run(tmp_path, capsys):
    folder = model_folder(tmp_path / "model", DMS)
    blocks = examples("python.md")
    names: dict[str, object] = {}
    for block in blocks[:2]:  # the third one loads a model from the hub
        exec(block.replace("runs/retrofit/export", str(folder)), names)
    assert float(capsys.readouterr().out.splitlines()[-1]) >= 1


def test_example_of_an_own_policy_runs(tmp_path):
    folder, names = model_folder(tmp_path / "model", DMS), {}
    (block,) = (block for block in examples("policies.md") if "class KeepOld" in block)
    assert len([line for line in block.splitlines() if line]) <= 12
    exec(block.replace("runs/retrofit/export", str(folder)), names)
    assert len(names["result"].tokens[0]) and names["result"].cache.policy == names["KeepOld"](64)
