"""Orbax checkpoints of what a run trains: parameters, optimizer state and step; the frozen base is named, not copied.

A checkpoint counts only when it has Orbax's commit marker. One that is empty, truncated or foreign is skipped with a line.
"""

import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from orbax.checkpoint import v1 as ocp

from dms_jax.config import ConfigError

COMMIT_MARKER = "commit_success.txt"


class Checkpoints:
    """The checkpoints of one run: `save` in the background, `restore_latest` onto any mesh."""

    def __init__(self, folder: Path, keep: int = 2):
        """`keep` complete checkpoints stay; older ones are removed after a newer one is committed."""
        self.folder = folder
        training = ocp.training
        try:
            folder.mkdir(parents=True, exist_ok=True)
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
        the checkpoint is committed."""
        if step in self.steps():
            return
        if jax.default_backend() == "cpu":  # there Orbax would write out the very buffers that the next step donates
            state = jax.tree.map(jnp.copy, state)
            jax.block_until_ready(state)
        if wait:
            self._orbax.save(step, state, force=True, overwrite=True, custom_metadata=metadata)
        else:
            self._orbax.save_async(step, state, force=True, overwrite=True, custom_metadata=metadata)

    def steps(self) -> list[int]:
        """Complete checkpoints, oldest first."""
        return sorted(int(p.name) for p in self.folder.iterdir() if p.name.isdigit() and (p / COMMIT_MARKER).exists())

    def metadata(self, step: int) -> dict:
        """What was saved beside the arrays of `step`."""
        # pyrefly: ignore[no-matching-overload]  # any JSON to Orbax; `save` writes a dict
        return dict(self._orbax.checkpointables_metadata(step).custom_metadata or {})

    def restore_latest(self, like: Any, check) -> tuple[int, Any] | None:
        """(step, state) of the newest usable checkpoint, placed as `like` (ShapeDtypeStructs with shardings); None when there
        is none. `check(metadata)` raises ConfigError when the checkpoint belongs to another run."""
        broken = [p.name for p in self.folder.iterdir() if p.name.isdigit() and not (p / COMMIT_MARKER).exists()]
        for name in sorted(broken, key=int):
            print(f"skipping checkpoint {self.folder / name}: it was never completed", file=sys.stderr)
        for step in reversed(self.steps()):
            try:
                metadata = self.metadata(step)
                if not metadata:
                    raise ValueError("its metadata is damaged")
            except Exception as why:
                print(f"skipping checkpoint {self.folder / str(step)}: {_first_line(why)}", file=sys.stderr)
                continue
            check(metadata)
            try:
                return step, self._orbax.load(step, like)
            except Exception as why:
                print(f"skipping checkpoint {self.folder / str(step)}: {_first_line(why)}", file=sys.stderr)
        return None

    def close(self) -> None:
        """Wait until everything is committed."""
        self._orbax.close()


def _first_line(why: Exception) -> str:
    return (str(why).strip().splitlines() or [type(why).__name__])[0][:200]
