"""Run a retrofit from start to end: prepare, restore, train, finish."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import jax

from dms_jax.errors import ConfigError
from dms_jax.training.dry_run import dry_run_text
from dms_jax.training.finish import finish
from dms_jax.training.loop import train
from dms_jax.training.prepare import PreparedRun, prepare
from dms_jax.training.restore import restore
from dms_jax.training.retrofit_config import RetrofitConfig
from dms_jax.training.stop_signal import stop_signals


def retrofit(config: RetrofitConfig, *, resume: bool = False, accept_changes: bool = False) -> int:
    """Run a retrofit up to the exported model. JAX must have been started for `config.mesh`.

    `resume`: continue from the newest checkpoint. `accept_changes`: do so even if settings differ from the
    checkpoint's. Returns the number of the signal that stopped the run early, or 0.
    """
    make_folder(Path(config.output))  # before anything slow, so that a read-only folder is reported at once
    run = prepare(config)
    for note in run.notes:
        run.say(note)
    state = restore(run, resume, accept_changes)
    with stop_signals(run.mesh) as stop, closing_checkpoints(run):
        state, number = train(run, state, stop)
        if not number:
            finish(run, state)
    return number


def dry_run(config: RetrofitConfig) -> None:
    """Print what a retrofit would do, without training or writing anything."""
    run = prepare(config)
    for note in run.notes:
        run.say(note)
    if run.is_writer:
        print(dry_run_text(run))


def make_folder(folder: Path) -> None:
    """Make the output folder and check that it can be written to."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".writable-{os.getpid()}"  # several processes may probe at once
        probe.touch()
        probe.unlink()
    except OSError as why:
        raise ConfigError(f"cannot write to output {folder}: {why}; choose another --set output=FOLDER") from why


@contextlib.contextmanager
def closing_checkpoints(run: PreparedRun) -> Iterator[None]:
    """Complete the checkpoints at the end.

    Turn a full disk or device memory into a ConfigError that says what was saved.
    """
    try:
        yield
        run.checkpoints.close()
    except jax.errors.JaxRuntimeError as why:
        if "RESOURCE_EXHAUSTED" not in str(why):
            raise
        raise ConfigError(
            "out of device memory; use a larger accumulate, a smaller length, or a mesh with more devices"
        ) from why
    except OSError as why:  # the disk became full or read-only while plots or reports were written
        steps = run.checkpoints.steps()
        saved = f"checkpoint {steps[-1]} is complete" if steps else "no checkpoint is complete"
        raise ConfigError(
            f"cannot write to {run.output}: {why}; {saved}. Free some space, then continue with --resume"
        ) from why
    finally:
        with contextlib.suppress(ConfigError):  # only the first error is reported
            run.checkpoints.close()
