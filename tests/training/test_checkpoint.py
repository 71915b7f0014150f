"""Checkpoints that are damaged, foreign or cannot be written are reported, and nothing is lost."""

import itertools
import os
import shutil
import subprocess
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dms_jax import checkpoint
from dms_jax.checkpoint import ASIDE, COMMIT_MARKER, Checkpoints, fingerprint
from dms_jax.errors import ConfigError
from dms_jax.sharding import make_mesh, named_sharding


def state(seed=0):
    rng = np.random.default_rng(seed)
    return {
        "step": jnp.int32(seed),
        "weights": jnp.asarray(rng.normal(size=(16, 24)), jnp.float32),
        "half": jnp.ones((4,), jnp.bfloat16),
    }


LIKE = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state())


def nothing(metadata):
    pass


@pytest.fixture
def saved(tmp_path):
    """A folder with checkpoints of steps 1 and 2."""
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    for step in (1, 2):
        checkpoints.save(step, state(step), {"run": "this"}, wait=True)
    checkpoints.close()
    return tmp_path / "checkpoints"


def files_of(folder):
    return sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())


def murmur(x: int) -> int:
    """The published finalizer of MurmurHash3."""
    x %= 2**32
    x = (x ^ (x >> 16)) * 0x85EBCA6B % 2**32
    x = (x ^ (x >> 13)) * 0xC2B2AE35 % 2**32
    return x ^ (x >> 16)


def test_fingerprint_depends_on_all_bits_and_their_places():
    base = fingerprint(state())
    x = np.asarray(state()["weights"])
    one_bit = x.copy()
    one_bit.view(np.uint32)[7, 5] ^= 1
    swapped = x.copy()
    swapped[0, 0], swapped[3, 4] = x[3, 4], x[0, 0]
    for changed in (one_bit, swapped, -x, x.T.reshape(x.shape)):
        assert fingerprint(state() | {"weights": jnp.asarray(changed)})["['weights']"] != base["['weights']"]
    total = sum(murmur(int(word) + murmur(place)) for place, word in enumerate(x.view(np.uint32).ravel())) % 2**32
    assert base["['weights']"] == total
    mesh = make_mesh(jax.device_count() // 2, 2)
    assert (
        fingerprint({"weights": jax.device_put(x, named_sharding(("embed", "mlp"), x.shape, mesh))})["['weights']"]
        == total
    )


def test_newest_checkpoint_is_restored_bit_for_bit(saved):
    found = Checkpoints(saved).restore_latest(LIKE, nothing)
    assert found.step == 2 and found.skipped == []
    jax.tree.map(np.testing.assert_array_equal, found.state, state(2))


def test_damage_to_any_file_is_noticed_or_harmless(saved, tmp_path, monkeypatch):
    """Cut, remove or flip each file: the numbers are those of step 2, or step 1 is used and the reason is given."""
    monkeypatch.setattr(checkpoint, "SETTLED", 0.0)  # nobody else writes here
    outcomes = []
    for name in files_of(saved / "2"):
        for harm in ("cut", "remove", "flip"):
            shutil.rmtree(tmp_path / "copy", ignore_errors=True)
            shutil.copytree(saved, tmp_path / "copy")
            path = tmp_path / "copy" / "2" / name
            content = path.read_bytes()
            if harm == "cut":
                path.write_bytes(content[: len(content) // 2])
            elif harm == "remove":
                path.unlink()
            else:
                middle = len(content) // 2
                path.write_bytes(
                    content[:middle] + bytes([(content[middle] if content else 0) ^ 0x55]) + content[middle + 1 :]
                )
            found = Checkpoints(tmp_path / "copy").restore_latest(LIKE, nothing)
            jax.tree.map(np.testing.assert_array_equal, found.state, state(found.step))
            assert found.step == 2 or (found.step == 1 and any(line.startswith("2: ") for line in found.skipped)), (
                name,
                harm,
            )
            assert all("\n" not in line for line in found.skipped)
            outcomes.append((harm, found.step))
    assert {("cut", 1), ("remove", 1)} <= set(outcomes)


def test_folder_without_a_usable_checkpoint_is_refused_and_an_empty_one_is_not(saved, tmp_path, capsys):
    for step in ("1", "2"):
        for name in files_of(saved / step):
            if name.name != COMMIT_MARKER:
                os.truncate(saved / step / name, 0)
    with pytest.raises(ConfigError, match="no checkpoint in .* is usable .*2: .*1: .*move that folder away") as refusal:
        Checkpoints(saved).restore_latest(LIKE, nothing)
    assert "\n" not in str(refusal.value)
    with pytest.raises(ConfigError, match="no checkpoint in"):  # again, because nothing was moved aside
        Checkpoints(saved).restore_latest(LIKE, nothing)
    assert Checkpoints(tmp_path / "new").restore_latest(LIKE, nothing) is None


def test_foreign_entries_are_kept(saved, capsys):
    (saved / f"7{ASIDE}").write_text("an older note")
    (saved / "7").write_text("a note")
    (saved / "3").mkdir()
    (saved / "3" / "weights.bin").write_bytes(b"of another tool")
    (saved / "readme.txt").write_text("mine")
    checkpoints = Checkpoints(saved)
    found = checkpoints.restore_latest(LIKE, nothing)
    assert found.step == 2 and [line[:2] for line in found.skipped] == ["3:", "7:"]
    for step in (3, 4, 7):
        checkpoints.save(step, state(step), {"run": "this"}, wait=True)
    checkpoints.close()
    assert (saved / f"7{ASIDE}").read_text() == "an older note" and (saved / f"7{ASIDE}.1").read_text() == "a note"
    assert (saved / f"3{ASIDE}" / "weights.bin").read_bytes() == b"of another tool"
    assert (saved / "readme.txt").read_text() == "mine" and Checkpoints(saved).steps() == [4, 7]


@pytest.mark.parametrize("what", ["incomplete", "unreadable"])
def test_checkpoint_that_is_being_removed_is_left_alone(saved, what):
    """Another process removes the files of step 3 one by one, first its metadata or its commit marker."""
    shutil.copytree(saved / "2", saved / "3")
    first = COMMIT_MARKER if what == "incomplete" else "_CHECKPOINT_METADATA"
    for number in range(10):
        (saved / "3" / f"part{number}").touch()
    (saved / "3" / first).unlink()

    def remove():
        for path in (saved / "3").glob("part*"):
            path.unlink()
            time.sleep(0.08)
        shutil.rmtree(saved / "3")

    thread = threading.Thread(target=remove)
    thread.start()
    checkpoints = Checkpoints(saved)
    thread.join()
    found = checkpoints.restore_latest(LIKE, nothing)
    assert found.step == 2 and found.skipped == [] and not list(saved.glob(f"*{ASIDE}*"))


def test_folder_opens_while_another_process_saves_and_removes(tmp_path):
    folder, ended = tmp_path / "checkpoints", threading.Event()
    writer = Checkpoints(folder, keep=1)

    def save():
        for step in itertools.count(1):
            writer.save(step, state(step), {"run": "this"}, wait=True)
            if ended.is_set():
                break

    thread = threading.Thread(target=save)
    thread.start()
    try:
        for _ in range(8):
            Checkpoints(folder, keep=10**6)
    finally:
        ended.set()
        thread.join()
    assert not list(folder.glob(f"*{ASIDE}*"))
    writer.close()
    newest = writer.steps()[-1]
    assert Checkpoints(folder).restore_latest(LIKE, nothing).step == newest


def test_checkpoint_of_another_run_is_refused(saved):
    def check(metadata):
        raise ConfigError(f"run {metadata['run']}")

    with pytest.raises(ConfigError, match="run this"):
        Checkpoints(saved).restore_latest(LIKE, check)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 1 MiB; skipped where none can be mounted."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"no small file system can be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("wait", [True, False])
def test_full_disk_is_one_line_and_keeps_the_checkpoint_before(small_disk, wait):
    checkpoints = Checkpoints(small_disk / "checkpoints")
    large = lambda step: (
        state(step) | {"weights": jnp.asarray(np.random.default_rng(step).normal(size=(300, 400)), jnp.float32)}
    )
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), large(1))
    checkpoints.save(1, large(1), {"run": "this"}, wait=True)
    (small_disk / "filler").write_bytes(b"x" * 300_000)
    with pytest.raises(ConfigError, match="checkpoint.* in .*newest complete checkpoint is 1.*--resume") as refusal:
        checkpoints.save(2, large(2), {"run": "this"}, wait=wait)
        checkpoints.close()
    assert "\n" not in str(refusal.value)
    (small_disk / "filler").unlink()
    again = Checkpoints(small_disk / "checkpoints")
    found = again.restore_latest(like, nothing)
    assert found.step == 1
    jax.tree.map(np.testing.assert_array_equal, found.state, large(1))


def test_read_only_disk_is_one_line(small_disk):
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(ConfigError, match="cannot write checkpoints to .*Read-only file system") as refusal:
        Checkpoints(small_disk / "checkpoints")
    assert "\n" not in str(refusal.value)
