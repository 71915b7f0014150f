"""The examples of docs/python.md run as they are printed."""

import re
from pathlib import Path

from golden_folders import DMS, model_folder

PAGE = Path(__file__).parent.parent / "docs" / "python.md"


def test_examples_that_need_no_network_run(tmp_path, capsys):
    folder = model_folder(tmp_path / "model", DMS)
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    names: dict[str, object] = {}
    for block in blocks[:2]:  # the third one loads a model from the hub
        exec(block.replace("runs/retrofit/export", str(folder)), names)
    assert float(capsys.readouterr().out.splitlines()[-1]) >= 1
