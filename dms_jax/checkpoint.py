"""Orbax checkpoints of the state that a run trains: parameters, optimizer state and step.

The frozen base is identified by its hash, not copied. A checkpoint is usable only if it has Orbax's commit marker, its
metadata, and contents that match the fingerprint taken when it was saved. Others are skipped, and the reason is
reported. An entry of the folder that is in the way but is not a checkpoint is moved aside, never deleted. An entry that
another process is just writing or removing is left alone.
"""

import contextlib
import itertools
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as ocp

from dms_jax.errors import ConfigError

COMMIT_MARKER = "commit_success.txt"
ASIDE = ".not-a-checkpoint"
SETTLED = 0.5  # seconds in which an incomplete or unreadable entry must not change to count as damaged
MAX_OPENINGS = 5  # attempts to open a folder whose entries vanish while it is read


class Restored(NamedTuple):
    """The checkpoint that `Checkpoints.restore_latest` found."""

    step: int
    state: Any
    skipped: list[str]  # newer entries that could not be used, each with its reason


class Checkpoints:
    """The checkpoints of one run. `save` writes in the background; `restore_latest` reads onto any mesh."""

    def __init__(self, folder: Path, keep: int = 2):
        """Open or make the folder. Only the newest `keep` complete checkpoints stay; older ones are removed."""
        self.folder, self._damaged = folder, set()
        training = ocp.training
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._aside, self._unreadable = self._move_aside()
            self._orbax = _retried(
                lambda: training.Checkpointer(
                    str(folder.absolute()),
                    # A type checker does not see that Orbax's policies implement its protocols.
                    # pyrefly: ignore[bad-argument-type]
                    save_decision_policy=training.save_decision_policies.FixedIntervalPolicy(1),  # the caller decides
                    # pyrefly: ignore[bad-argument-type]
                    preservation_policy=training.preservation_policies.LatestN(keep),
                )
            )
        except OSError as why:
            raise ConfigError(f"cannot write checkpoints to {folder}: {why}") from why

    def save(self, step: int, state: Any, metadata: dict, *, wait: bool = False) -> None:
        """Write `state` as the checkpoint of `step`.

        Returns as soon as the arrays are copied off the devices, so that they may be donated; with `wait`, returns when
        the checkpoint is committed. Raises ConfigError if this checkpoint, or the previous one, cannot be written.
        """
        if step in self.steps() and step not in self._damaged:
            return
        metadata = metadata | {"fingerprint": fingerprint(state)}
        if jax.default_backend() == "cpu":  # Orbax would write from the very buffers that the next step donates
            state = jax.tree.map(jnp.copy, state)
            jax.block_until_ready(state)
        write = self._orbax.save if wait else self._orbax.save_async
        with self._explained(f"cannot write checkpoint {step}"):
            write(step, state, force=True, overwrite=True, custom_metadata=metadata)
        self._damaged.discard(step)

    def steps(self) -> list[int]:
        """Return the steps of the complete checkpoints, oldest first."""
        return sorted(int(p.name) for p in self.folder.iterdir() if p.name.isdigit() and (p / COMMIT_MARKER).exists())

    def metadata(self, step: int) -> dict:
        """Return the metadata that was saved with the arrays of `step`."""
        # pyrefly: ignore[no-matching-overload]  # Orbax takes any JSON; `save` writes a dict
        return dict(self._orbax.checkpointables_metadata(step).custom_metadata or {})

    def restore_latest(self, like: Any, check: Callable[[dict], None]) -> Restored | None:
        """Return the newest usable checkpoint, or None if there are no checkpoints.

        `like` holds the shapes, dtypes and shardings of the state to return. `check(metadata)` raises ConfigError if a
        checkpoint belongs to another run. If there are checkpoints but none is usable, ConfigError is raised, because a
        run must not start over unnoticed.
        """
        skipped, damaged = list(self._aside), list(self._unreadable)
        for step in reversed(self.steps()):
            try:
                metadata = self.metadata(step)
                if not metadata:
                    raise ValueError("its metadata is damaged")
            except Exception as why:  # reading damaged files may raise anything inside Orbax
                if _settled([self.folder / str(step)]):
                    damaged.append(f"{step}: {_first_line(why)}")
                    self._damaged.add(step)
                continue
            check(metadata)
            try:
                state = self._orbax.load(step, like)
                wrong = [
                    name
                    for name, value in fingerprint(state).items()
                    if metadata.get("fingerprint", {}).get(name, value) != value
                ]
                if wrong:
                    raise ValueError(f"the contents of {wrong[0]} do not match the fingerprint taken when it was saved")
            except Exception as why:
                if _settled([self.folder / str(step)]):
                    damaged.append(f"{step}: {_first_line(why)}")
                    self._damaged.add(step)
                continue
            return Restored(step, state, skipped + damaged)
        if damaged:
            raise self._none_usable(damaged)
        for line in skipped:
            print(f"skipped checkpoint {line}", file=sys.stderr)
        return None

    def close(self) -> None:
        """Wait until the last checkpoint is committed. Raises ConfigError if it cannot be written."""
        with self._explained("cannot complete the last checkpoint"):
            self._orbax.close()

    def _move_aside(self) -> tuple[list[str], list[str]]:
        """Rename incomplete checkpoints, and complete ones with damaged metadata, so that Orbax does not see them.

        Orbax would count incomplete checkpoints and delete them in time, and it cannot open a folder in which a
        checkpoint has damaged metadata. Returns the reasons for the incomplete and for the damaged ones; every process
        returns the same. What changes while it is watched is neither: another process is writing or removing it.
        """
        entries = sorted(
            (p for p in self.folder.iterdir() if p.name.isdigit()), key=lambda p: int(p.name), reverse=True
        )
        incomplete = [path for path in entries if not (path / COMMIT_MARKER).exists()]
        unreadable = {
            path: why for path in entries if path not in incomplete and (why := _unreadable(path)) is not None
        }
        settled = _settled([*incomplete, *unreadable])
        incomplete = [path for path in incomplete if path in settled]
        unreadable = {path: why for path, why in unreadable.items() if path in settled}
        # No checkpoint is usable. Move nothing, so that the next run is refused as well.
        if unreadable and len(incomplete) + len(unreadable) == len(entries):
            raise self._none_usable([f"{path.name}: {why}" for path, why in unreadable.items()])
        new = {path: _free(path) for path in (*incomplete, *unreadable)}
        multihost_utils.sync_global_devices("all processes have listed the folder")
        if jax.process_index() == 0:
            for path in new:
                path.rename(new[path])
        multihost_utils.sync_global_devices("the entries are moved aside")
        reason = lambda path, why: f"{path.name}: {why} (kept as {new[path].name})"
        incomplete_reasons = [reason(path, "it was never completed") for path in reversed(incomplete)]
        return incomplete_reasons, [reason(path, why) for path, why in unreadable.items()]

    def _none_usable(self, damaged: list[str]) -> ConfigError:
        return ConfigError(
            f"no checkpoint in {self.folder} is usable ({'; '.join(damaged)}); move that folder away to start at step 0"
        )

    @contextlib.contextmanager
    def _explained(self, what: str) -> Iterator[None]:
        """Turn any error while writing into a ConfigError that names the newest complete checkpoint."""
        try:
            yield
        except ConfigError:
            raise
        except Exception as why:  # OSError, or whatever Orbax and TensorStore raise in their threads
            steps = self.steps()
            newest = f"the newest complete checkpoint is {steps[-1]}" if steps else "no checkpoint is complete"
            raise ConfigError(
                f"{what} in {self.folder}: {_first_line(why)}; {newest}. Free some space, then continue with --resume"
            ) from why


def fingerprint(state: Any) -> dict[str, int]:
    """Hash every array of a pytree, by its path.

    The hash covers all bits and their positions and is the same on any mesh.
    """
    named = {jax.tree_util.keystr(path): x for path, x in jax.tree_util.tree_leaves_with_path(state)}
    return {name: int(x) for name, x in jax.device_get(_fingerprint(named)).items()}


@jax.jit
def _fingerprint(arrays: dict[str, jax.Array]) -> dict[str, jax.Array]:
    return {name: _mixed(x) for name, x in arrays.items()}


def _mixed(x: jax.Array) -> jax.Array:
    words = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}")).astype(jnp.uint32)
    place, stride = jnp.uint32(0), 1
    for axis in reversed(range(x.ndim)):
        place = place + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis) * jnp.uint32(stride % 2**32)
        stride *= x.shape[axis]
    return jnp.sum(_scrambled(words + _scrambled(place)), dtype=jnp.uint32)


def _scrambled(x: jax.Array) -> jax.Array:
    """Apply the finalizer of MurmurHash3.

    It makes each bit depend on all others, so that changes do not cancel in a sum.
    """
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        x = (x ^ (x >> shift)) * jnp.uint32(factor)
    return x ^ (x >> 16)


def _free(path: Path) -> Path:
    """Return an unused path beside `path` whose name says that the entry is not a checkpoint."""
    names = (path.with_name(path.name + ASIDE + (f".{number}" if number else "")) for number in itertools.count())
    return next(name for name in names if not name.exists())


def _settled(paths: list[Path]) -> list[Path]:
    """Return those of some entries that nobody is writing or removing: they exist, and stay as they are for a while."""
    before = {path: _files_of(path) for path in paths}
    if before:
        time.sleep(SETTLED)
    return [path for path, files in before.items() if os.path.lexists(path) and _files_of(path) == files]


def _files_of(path: Path) -> set[tuple[str, int, int]]:
    found = set()
    for place in (path, *path.rglob("*")):
        with contextlib.suppress(OSError):  # removed just now
            status = place.lstat()
            found.add((str(place), status.st_size, status.st_mtime_ns))
    return found


def _retried(opening: Callable[[], Any]) -> Any:
    """Open a folder, again if a checkpoint vanishes while it is read, because another process is removing it."""
    for _ in range(MAX_OPENINGS - 1):
        with contextlib.suppress(FileNotFoundError):
            return opening()
    return opening()


def _unreadable(path: Path) -> str | None:
    """Return the reason why the metadata of a checkpoint cannot be read; None if it can."""
    try:
        # pyrefly: ignore[no-matching-overload]  # as in `Checkpoints.metadata`
        metadata = dict(ocp.checkpointables_metadata(str(path.absolute())).custom_metadata or {})
        return None if metadata else "its metadata is damaged"
    except Exception as why:  # reading damaged files may raise anything inside Orbax
        return _first_line(why)


def _first_line(why: Exception) -> str:
    return (str(why).strip().splitlines() or [type(why).__name__])[0][:200]
