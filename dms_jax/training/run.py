"""The course of a retrofit: prepare, restore, train, finish."""

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
    """Run a retrofit to its export. Returns the signal that stopped it before, or 0. JAX must have been started for `config.mesh`."""
    make_folder(Path(config.output))  # a folder that cannot be written is reported before anything slow
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
    """Print what a retrofit would do; train nothing and write nothing."""
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
    """Complete the checkpoints at the end, and report a full device memory or disk in one line that says what was saved."""
    try:
        yield
        run.checkpoints.close()
    except jax.errors.JaxRuntimeError as why:
        if "RESOURCE_EXHAUSTED" not in str(why):
            raise
        raise ConfigError(
            "out of device memory; use a larger accumulate, a smaller length, or a mesh of more devices"
        ) from why
    except OSError as why:  # a disk that is full or became read-only, while plots or reports are written
        steps = run.checkpoints.steps()
        saved = f"checkpoint {steps[-1]} is complete" if steps else "no checkpoint is complete"
        raise ConfigError(f"cannot write to {run.output}: {why}; {saved}. Make room, then go on with --resume") from why
    finally:
        with contextlib.suppress(ConfigError):  # the first error is the one to report
            run.checkpoints.close()
