"""Saving over a model folder replaces our files by name, keeps everything else, and survives being killed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from golden_folders import GOLDEN

import dms_jax
from dms_jax.config import DMSConfig
from dms_jax.errors import ConfigError
from dms_jax.hf import folder_swap

ROOT = Path(__file__).parents[2]
PLAIN = GOLDEN / "llama3_rope_scaled"
INDEX = "model.safetensors.index.json"
SHARD = 60_000  # bytes, so that the weights of the golden model need several files


@pytest.fixture(scope="module")
def model():
    return dms_jax.load(PLAIN)


def add_own_files(folder: Path) -> dict[str, tuple[int, str]]:
    """Put files of a user into a model folder. Returns their inodes and contents by name."""
    (folder / "evaluation.jsonl").write_text("hours of results")
    (folder / "README.md").write_text("model card")
    (folder / "model-00009-of-00009.safetensors").write_text("not in the index")
    (folder / "sub").mkdir()
    (folder / "sub" / "x").write_text("1")
    (folder / "link").symlink_to("README.md")
    return own_files(folder)


def own_files(folder: Path) -> dict[str, tuple[int, str]]:
    names = ("evaluation.jsonl", "README.md", "model-00009-of-00009.safetensors", "sub", "sub/x", "link")
    places = {name: folder / name for name in names if os.path.lexists(folder / name)}
    return {name: (p.lstat().st_ino, "" if p.is_dir() else p.read_text()) for name, p in places.items()}


def ours(folder: Path) -> set[str]:
    return {p.name for p in folder.iterdir()} - {name.split("/")[0] for name in own_files(folder)}


@pytest.fixture(params=["exchange", "two renames", "no hard links"])
def system(request, monkeypatch):
    """Linux with hard links; a system that cannot exchange folders; a file system without hard links."""
    if request.param == "two renames":
        monkeypatch.setattr(folder_swap.sys, "platform", "another")
    if request.param == "no hard links":

        def refused(*_, **__):
            raise OSError(1, "Operation not permitted")

        monkeypatch.setattr(os, "link", refused)
    return request.param


@pytest.mark.parametrize("before, after", [(SHARD, 10**9), (10**9, SHARD), (SHARD, 2 * SHARD), (10**9, 10**9)])
def test_overwriting_keeps_the_files_of_others_and_removes_the_weights_of_before(
    model, tmp_path, system, before, after
):
    out = tmp_path / "out"
    dms_jax.save(model, out, shard_bytes=before)
    out.chmod(0o750)
    kept = add_own_files(out)
    dms_jax.save(dms_jax.load(PLAIN, dms=DMSConfig()), out, overwrite=True, shard_bytes=after)
    assert own_files(out) == kept and out.stat().st_mode & 0o777 == 0o750
    dms_jax.save(dms_jax.load(PLAIN, dms=DMSConfig()), tmp_path / "new", shard_bytes=after)
    assert ours(out) == {p.name for p in (tmp_path / "new").iterdir()}
    (out / "model-00009-of-00009.safetensors").unlink()
    assert dms_jax.load(out).config.dms == DMSConfig()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["new", "out"]


def test_failed_save_changes_nothing(model, tmp_path, system, monkeypatch):
    out = tmp_path / "out"
    dms_jax.save(model, out)
    kept, names = add_own_files(out), ours(out)
    config, inode = (out / "config.json").read_bytes(), out.stat().st_ino

    def refused(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(folder_swap, "_exchange", refused)
    with pytest.raises(ConfigError, match="cannot write .*out.*No space left"):
        dms_jax.save(dms_jax.load(PLAIN, dms=DMSConfig()), out, overwrite=True)
    assert own_files(out) == kept and ours(out) == names and (out / "config.json").read_bytes() == config
    assert out.stat().st_ino == inode and [p.name for p in tmp_path.iterdir()] == ["out"]


def test_second_rename_that_fails_puts_the_old_folder_back(model, tmp_path, monkeypatch):
    dms_jax.save(model, tmp_path / "out")
    kept, rename = add_own_files(tmp_path / "out"), os.rename
    monkeypatch.setattr(folder_swap.sys, "platform", "another")

    def refuses_the_new_one(source, target):
        if str(target) == str(tmp_path / "out") and "-old" not in str(source):
            raise OSError(13, "Permission denied")
        rename(source, target)

    monkeypatch.setattr(os, "rename", refuses_the_new_one)
    with pytest.raises(ConfigError, match="Permission denied"):
        dms_jax.save(model, tmp_path / "out", overwrite=True)
    assert own_files(tmp_path / "out") == kept and [p.name for p in tmp_path.iterdir()] == ["out"]


def test_link_to_a_folder_stays_a_link(model, tmp_path):
    dms_jax.save(model, tmp_path / "disk")
    (tmp_path / "out").symlink_to("disk")
    dms_jax.save(dms_jax.load(PLAIN, dms=DMSConfig()), tmp_path / "out", overwrite=True)
    assert (tmp_path / "out").is_symlink() and dms_jax.load(tmp_path / "disk").config.dms == DMSConfig()


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json", "LICENSE"])
def test_link_in_the_place_of_one_of_our_files_is_refused(model, tmp_path, name):
    dms_jax.save(model, tmp_path / "out")
    place = tmp_path / "out" / name
    (tmp_path / "target").write_bytes(place.read_bytes() if place.exists() else b"mine")
    place.unlink(missing_ok=True)
    place.symlink_to(tmp_path / "target")
    before = (tmp_path / "target").read_bytes()
    with pytest.raises(ConfigError, match=f"{name} must be a regular file, got a symbolic link"):
        dms_jax.save(model, tmp_path / "out", overwrite=True)
    assert place.is_symlink() and (tmp_path / "target").read_bytes() == before


def test_tokenizer_files_that_the_new_model_lacks_are_kept_and_named(model, tmp_path):
    dms_jax.save(model, tmp_path / "out")
    (tmp_path / "out" / "chat_template.jinja").write_text("of the user")
    with pytest.warns(UserWarning, match=r"out keeps chat_template\.jinja"):
        dms_jax.save(model, tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == "of the user"


# Replaces a folder in child processes, each of which is killed at its n-th change of the file system.
KILLED = """
import json, os, shutil, sys
from pathlib import Path
from dms_jax.hf import folder_swap
def write(folder, version):
    for name in ("config.json", f"model-{version}.safetensors"):
        Path(folder, name).write_text(version)
    index = {"weight_map": {"x": f"model-{version}.safetensors"}}
    Path(folder, "model.safetensors.index.json").write_text(json.dumps(index))
top, moment = Path(sys.argv[1]), 0
while True:
    moment += 1
    shutil.rmtree(top, ignore_errors=True)
    (top / "out" / "sub").mkdir(parents=True)
    write(top / "out", "old")
    (top / "out" / "sub" / "x").write_text("mine")
    (top / "out" / "notes.txt").write_text("mine")
    child = os.fork()
    if not child:
        changes = 0
        def kill(event, arguments):
            global changes
            if event in ("os.rename", "os.link", "os.remove", "os.rmdir", "os.mkdir", "os.chmod"):
                changes += 1
                if changes == moment:
                    os._exit(9)
        sys.addaudithook(kill)
        with folder_swap.replacing_folder(str(top / "out")) as folder:
            write(folder, "new")
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    at = top / "out"
    index = json.loads((at / "model.safetensors.index.json").read_text())["weight_map"]["x"]
    found = {(at / "config.json").read_text(), (at / index).read_text()}
    left = [p for p in top.iterdir() if p.name != "out"]
    print(json.dumps({
        "code": code,
        "versions": sorted(found),
        "notes": (at / "notes.txt").read_text(),
        "sub": [p.read_text() for place in (at, *left) for p in [place / "sub" / "x"] if p.exists()],
        "names": sorted(p.name for p in at.iterdir()),
    }))
    if code == 0:
        break
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs an exchange of folders in one step")
def test_process_that_is_killed_at_any_moment_leaves_the_old_or_the_new_folder(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path / "top")], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    outcomes = [json.loads(line) for line in done.stdout.splitlines()]
    versions = [version for outcome in outcomes for version in outcome["versions"]]
    assert len(versions) == len(outcomes) and versions == sorted(versions, reverse=True)  # never a mixture
    assert set(versions) == {"old", "new"}
    assert all(outcome["notes"] == "mine" and outcome["sub"] == ["mine"] for outcome in outcomes)
    assert len(outcomes) > 8 and outcomes[-1]["code"] == 0
    assert outcomes[-1]["names"] == ["config.json", "model-new.safetensors", INDEX, "notes.txt", "sub"]


def test_weights_after_overwriting_are_those_of_the_new_model(model, tmp_path):
    other = dms_jax.load(PLAIN)
    other.final_norm[...] = other.final_norm[...] + 1
    dms_jax.save(other, tmp_path / "out", shard_bytes=SHARD)
    dms_jax.save(model, tmp_path / "out", overwrite=True)
    ids = np.arange(20, dtype=np.int32)[None]
    jax.tree.map(np.testing.assert_array_equal, dms_jax.load(tmp_path / "out").dense(ids), model.dense(ids))
