"""Orbax checkpoints of what a run trains: parameters, optimizer state and step; the frozen base is named, not copied.

A checkpoint counts only when it has Orbax's commit marker, its metadata, and the fingerprint of the numbers that were saved. Any other is
passed over with its reason. What is in the way and no checkpoint is moved aside, never deleted.
"""

import itertools
import sys
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as ocp

from dms_jax.errors import ConfigError

COMMIT_MARKER = "commit_success.txt"
ASIDE = ".not-a-checkpoint"


class Restored(NamedTuple):
    """What `Checkpoints.restore_latest` found."""

    step: int
    state: Any
    skipped: list[str]  # newer ones, each with the reason


class Checkpoints:
    """The checkpoints of one run: `save` in the background, `restore_latest` onto any mesh."""

    def __init__(self, folder: Path, keep: int = 2):
        """`keep` complete checkpoints stay; older ones are removed after a newer one is committed."""
        self.folder, self._damaged = folder, set()
        training = ocp.training
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._aside, self._unreadable = self._move_aside()
            self._orbax = training.Checkpointer(
                str(folder.absolute()),
                # Orbax's policies inherit from its protocols in no way a checker sees.
                # pyrefly: ignore[bad-argument-type]
                save_decision_policy=training.save_decision_policies.FixedIntervalPolicy(1),  # the caller decides
                # pyrefly: ignore[bad-argument-type]
                preservation_policy=training.preservation_policies.LatestN(keep),
            )
        except OSError as why:
            raise ConfigError(f"cannot write checkpoints to {folder}: {why}") from why

    def save(self, step: int, state: Any, metadata: dict, *, wait: bool = False) -> None:
        """Write `state` as `step`. Returns once the arrays are copied off the devices, so they may be donated; `wait` until
        the checkpoint is committed. Raises ConfigError when the disk does not take it, or did not take the one before."""
        if step in self.steps() and step not in self._damaged:
            return
        metadata = metadata | {"fingerprint": fingerprint(state)}
        if jax.default_backend() == "cpu":  # there Orbax would write out the very buffers that the next step donates
            state = jax.tree.map(jnp.copy, state)
            jax.block_until_ready(state)
        how = self._orbax.save if wait else self._orbax.save_async
        with self._explained(f"cannot write checkpoint {step}"):
            how(step, state, force=True, overwrite=True, custom_metadata=metadata)
        self._damaged.discard(step)

    def steps(self) -> list[int]:
        """Complete checkpoints, oldest first."""
        return sorted(int(p.name) for p in self.folder.iterdir() if p.name.isdigit() and (p / COMMIT_MARKER).exists())

    def metadata(self, step: int) -> dict:
        """What was saved beside the arrays of `step`."""
        # pyrefly: ignore[no-matching-overload]  # any JSON to Orbax; `save` writes a dict
        return dict(self._orbax.checkpointables_metadata(step).custom_metadata or {})

    def restore_latest(self, like: Any, check) -> Restored | None:
        """The newest usable checkpoint, placed as `like` (ShapeDtypeStructs with shardings); None when there is none at all.

        `check(metadata)` raises ConfigError when the checkpoint belongs to another run. Raises ConfigError when there are checkpoints and
        none is usable: nobody wants to begin anew without knowing.
        """
        skipped, damaged = list(self._aside), list(self._unreadable)
        for step in reversed(self.steps()):
            try:
                metadata = self.metadata(step)
                if not metadata:
                    raise ValueError("its metadata is damaged")
            except Exception as why:  # whatever reading damaged files leads Orbax to
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
                    raise ValueError(f"{wrong[0]} holds other numbers than were saved")
            except Exception as why:
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
        """Wait until everything is committed. Raises ConfigError when the disk did not take it."""
        with self._explained("cannot complete the last checkpoint"):
            self._orbax.close()

    def _move_aside(self) -> tuple[list[str], list[str]]:
        """Entries that look like checkpoints and are none, and those whose metadata no longer reads: Orbax would count the former and one
        day delete them, and does not open a folder with one of the latter. Of both, names with reasons, the same for all processes."""
        entries = sorted(
            (p for p in self.folder.iterdir() if p.name.isdigit()), key=lambda p: int(p.name), reverse=True
        )
        incomplete = [path for path in entries if not (path / COMMIT_MARKER).exists()]
        unreadable = {
            path: why for path in entries if path not in incomplete and (why := _unreadable(path)) is not None
        }
        if unreadable and len(incomplete) + len(unreadable) == len(
            entries
        ):  # nothing is moved: the next run is to refuse too
            raise self._none_usable([f"{path.name}: {why}" for path, why in unreadable.items()])
        new = {path: _free(path) for path in (*incomplete, *unreadable)}
        multihost_utils.sync_global_devices("all have looked")
        if jax.process_index() == 0:
            for path in new:
                path.rename(new[path])
        multihost_utils.sync_global_devices("moved aside")
        said = lambda path, why: f"{path.name}: {why} (kept as {new[path].name})"
        return [said(path, "it was never completed") for path in reversed(incomplete)], [
            said(*item) for item in unreadable.items()
        ]

    def _none_usable(self, damaged: list[str]) -> ConfigError:
        return ConfigError(
            f"no checkpoint in {self.folder} is usable ({'; '.join(damaged)}); move that folder away to begin at step 0"
        )

    def _explained(self, what: str) -> "_Explained":
        return _Explained(self, what)


class _Explained:
    """Turns what a disk says into one line that names the checkpoints that are complete."""

    def __init__(self, checkpoints: Checkpoints, what: str):
        self.checkpoints, self.what = checkpoints, what

    def __enter__(self):
        return self

    def __exit__(self, kind, why, traceback) -> None:
        if why is None or isinstance(why, ConfigError) or not isinstance(why, Exception):
            return
        folder, steps = self.checkpoints.folder, self.checkpoints.steps()
        left = f"the newest complete one is of step {steps[-1]}" if steps else "there is no complete one"
        raise ConfigError(
            f"{self.what} in {folder}: {_first_line(why)}; {left}. Make room, then go on with --resume"
        ) from why


def fingerprint(state: Any) -> dict[str, int]:
    """A number for each array, of all its bits and where they stand, the same on any mesh."""
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
    """The finalizer of MurmurHash3: each bit depends on all, so that changes do not cancel in a sum."""
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        x = (x ^ (x >> shift)) * jnp.uint32(factor)
    return x ^ (x >> 16)


def _free(path: Path) -> Path:
    """A name beside `path` that says what it is not, and that nothing has."""
    names = (path.with_name(path.name + ASIDE + (f".{number}" if number else "")) for number in itertools.count())
    return next(name for name in names if not name.exists())


def _unreadable(path: Path) -> str | None:
    """Why the metadata of a checkpoint cannot be read; None when it can."""
    try:
        # pyrefly: ignore[no-matching-overload]  # as in `metadata`
        return (
            None
            if dict(ocp.checkpointables_metadata(str(path.absolute())).custom_metadata or {})
            else "its metadata is damaged"
        )
    except Exception as why:  # whatever damaged files lead Orbax to
        return _first_line(why)


def _first_line(why: Exception) -> str:
    return (str(why).strip().splitlines() or [type(why).__name__])[0][:200]
