"""Run a retrofit from start to end: prepare, restore, train, finish."""

import contextlib
import uuid
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

from dms_jax.errors import ConfigError
from dms_jax.files import check_target
from dms_jax.hf.folder import check_save
from dms_jax.training.dry_run import dry_run_text
from dms_jax.training.finish import EXPORT, FILES, finish
from dms_jax.training.label_pass import first_state
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
    check_output(Path(config.output))  # before anything slow, so that a read-only folder is reported at once
    run = prepare(config)
    for note in run.notes:
        run.say(note)
    state, number = restore(run, resume, accept_changes), 0
    with stop_signals(run.mesh) as stop, closing_checkpoints(run):
        if state is None:
            state, number = first_state(run, stop, resume, accept_changes)
        if not number:
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


def by_first_process(action: Callable[[], None]) -> None:
    """Let only the first process of a run do something. If it is refused, no process goes on. JAX must be running."""
    refusal: ConfigError | None = None
    if jax.process_index() == 0:
        try:
            action()
        except ConfigError as why:
            refusal = why
    failed = bool(multihost_utils.broadcast_one_to_all(np.int32(refusal is not None)))
    if refusal is not None:
        raise refusal
    if failed:
        raise ConfigError("the first process of this run was refused, and its line says why; start all of them again")


def check_output(output: Path) -> None:
    """Make the output folder, and check that everything that the run will write to it can be written."""
    check_writable(output, FILES)
    check_save(output / EXPORT, overwrite=True)


def check_writable(output: Path, names: Iterable[str]) -> None:
    """Make the output folder, and check that files of these names can be written to it."""
    try:
        output.mkdir(parents=True, exist_ok=True)
        probe = output / f".writable-{uuid.uuid4().hex}"  # several processes may probe at once
        probe.touch()
        probe.unlink()
    except OSError as why:
        raise ConfigError(f"cannot write to output {output}: {why}; choose another --set output=FOLDER") from why
    for name in names:
        check_target(output / name)


@contextlib.contextmanager
def closing_checkpoints(run: PreparedRun) -> Iterator[None]:
    """Complete the checkpoints at the end. Turn full device memory into a ConfigError that says what to change."""
    try:
        yield
        run.checkpoints.close()
    except jax.errors.JaxRuntimeError as why:
        if "RESOURCE_EXHAUSTED" not in str(why):
            raise
        raise ConfigError(
            "out of device memory; use a larger accumulate, a smaller length, or a mesh with more devices"
        ) from why
    finally:
        with contextlib.suppress(ConfigError):  # only the first error is reported
            run.checkpoints.close()
