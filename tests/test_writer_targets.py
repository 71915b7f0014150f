"""Every function that writes a file leaves what is not a regular file as it is, and gives new ones the umask's mode."""

import functools
import os
import stat
import sys
from pathlib import Path

import numpy as np
import pytest
from cases import tiny_model

import dms_jax
from dms_jax.commands import generate, report
from dms_jax.config import DMSConfig
from dms_jax.errors import ConfigError
from dms_jax.evaluation.results import ResultsFile
from dms_jax.files import replacing, write_json
from dms_jax.hf.safetensors_files import new_path, write_whole
from dms_jax.kernels.tuned import write_tuned
from dms_jax.training.metrics import MetricsFile
from dms_jax.training.plots import plot_kept_fraction, plot_training
from dms_jax.writer_lock import only_writer


@functools.cache
def model():
    return tiny_model(DMSConfig(window_size=4))


def through_replacing(path: Path) -> None:
    with replacing(path) as temporary:
        temporary.touch(0o600)  # as the library of safetensors makes its files


def lock(path: Path) -> None:
    path.rename(path.with_name("r.jsonl.lock"))
    with only_writer(path.with_name("r.jsonl"), "use another file"):
        pass


def locked(path: Path) -> None:
    with only_writer(path, "use another file"):
        raise AssertionError("a command would load its model now")


def generated(name: str):
    return lambda path: generate.check(
        generate.parse(["--model", "x", *GENERATED[name], f"--{name}", str(path), "--overwrite"])
    )


GENERATED = {"output": ["--prompts", "p.txt"], "save-cache": ["--prompt", "x"]}
STEP = {
    "step": 0,
    **dict.fromkeys(("loss/distill", "loss/compression"), 0.5),
    **dict.fromkeys(("cache/target_cr", "cache/nominal_cr", "cache/realised_cr"), 1.0),
}
WRITERS = {
    "replacing": through_replacing,
    "write_json": lambda path: write_json(path, {"a": 1}),
    "new_path": lambda path: new_path(path, True),
    "write_whole": lambda path: write_whole(str(path), {"a": np.zeros(3, np.float32)}, {}),
    "save_adapter": lambda path: dms_jax.save_adapter(model(), path, overwrite=True),
    "report": lambda path: report.write_files(path.parent, {path.name: b"x"}),
    "results": lambda path: ResultsFile(path, {}, {}, ()),
    "metrics": lambda path: MetricsFile(path).begin({"header": {}}, None),
    "resumed metrics": lambda path: MetricsFile(path).begin({"header": {}}, 3),
    "training plot": lambda path: plot_training([STEP], path),
    "kept plot": lambda path: plot_kept_fraction(np.ones((2, 2)), 4, path),
    "tuned": lambda path: write_tuned(path, ()),
    "lock": lock,
    "locked results": locked,
    "generate --output": generated("output"),
    "generate --save-cache": generated("save-cache"),
}
CREATES = [
    name for name in WRITERS if name not in ("new_path", "lock", "locked results") and not name.startswith("generate")
]


def make(kind: str, path: Path) -> None:
    if kind in ("symlink", "dangling symlink"):
        target = path.with_name("target")
        path.symlink_to(target)
        if kind == "symlink":
            target.write_text("mine")
    elif kind == "folder":
        path.mkdir()
        (path / "mine").write_text("mine")
    elif kind == "fifo":
        os.mkfifo(path)
    else:
        try:
            os.mknod(path, 0o666 | stat.S_IFCHR, os.makedev(1, 3))
        except PermissionError:
            pytest.skip("only root may make a device node")


@pytest.mark.skipif(sys.platform == "win32", reason="no such files")
@pytest.mark.parametrize("kind", ["symlink", "dangling symlink", "folder", "fifo", "device node"])
@pytest.mark.parametrize("writer", WRITERS)
def test_target_that_is_no_regular_file_is_refused_and_left(writer, kind, tmp_path):
    path = tmp_path / "file.png"
    make(kind, path)
    before = os.lstat(path).st_mode
    with pytest.raises(ConfigError, match="regular file, got a|must be a file") as refusal:
        WRITERS[writer](path)
    assert "\n" not in str(refusal.value)
    left = path if os.path.lexists(path) else tmp_path / "r.jsonl.lock"
    assert os.lstat(left).st_mode == before
    if kind == "symlink":
        assert (tmp_path / "target").read_text() == "mine"
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted({left.name, *(["target"] if kind == "symlink" else [])})


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_modes_of_new_files_follow_the_umask(umask, tmp_path):
    before = os.umask(umask)
    try:
        for name in CREATES:
            WRITERS[name](tmp_path / f"{name}.png")
        dms_jax.save(model(), tmp_path / "model", shard_bytes=20_000)
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.rglob("*") if path.is_file()}
    assert len(modes) > len(CREATES) + 3 and set(modes.values()) == {0o666 & ~umask}, modes
    assert stat.S_IMODE((tmp_path / "model").stat().st_mode) == 0o777 & ~umask


def test_replaced_file_keeps_its_mode(tmp_path):
    path = tmp_path / "x"
    path.write_text("private")
    path.chmod(0o600)
    write_whole(str(path), {"a": np.zeros(3, np.float32)}, {})
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
