"""The end of a retrofit: calibration, the held-out report, the exported model and the plots."""

import contextlib
from collections.abc import Iterator

from dms_jax.command import typed_as
from dms_jax.errors import ConfigError
from dms_jax.files import write_json
from dms_jax.hf.adapter import save_adapter
from dms_jax.hf.folder import save
from dms_jax.models.decoder import fold_threshold
from dms_jax.training.metrics import read_steps
from dms_jax.training.plots import plot_kept_fraction, plot_training
from dms_jax.training.prepare import PreparedRun
from dms_jax.training.step import TrainState
from dms_jax.training.validate import calibrate, validate

EXPORT = "export"  # the folder of the model, in the output folder
FILES = ("metrics.jsonl", "report.json", "training.png", "kept_fraction.png", "adapter.safetensors")  # beside it


def finish(run: PreparedRun, state: TrainState) -> None:
    """Write export/, report.json and the plots to the output folder, and print the held-out table."""
    run.checkpoints.close()
    calibration = calibrate(run, state)
    report = validate(run, state, calibration) if run.held_out.num_rows else None

    trained = run.steps.math.student_model(state.trainable, run.frozen)
    fold_threshold(trained, calibration.threshold)
    export = run.output / EXPORT
    with writing_results(run):
        save(trained, export, overwrite=True, head_shares=calibration.shares)
        if run.config.mode == "adapter":
            save_adapter(trained, run.output / "adapter.safetensors", overwrite=True)
        if not run.is_writer:
            return
        if steps := read_steps(run.metrics_path):
            plot_training(steps, run.output / "training.png")
        if report is not None:
            metrics = report.as_metrics()
            run.record({"step": run.config.steps} | metrics)
            plot_kept_fraction(report.live_per_head, run.config.length, run.output / "kept_fraction.png")
            write_json(run.output / "report.json", metrics, indent=1)
            print(report.table())
    print(f"\nThe model is in {export}; metrics and plots are in {run.output}. Next:")
    print(f"  {typed_as('evaluate')} --model {export} --text FILE")


@contextlib.contextmanager
def writing_results(run: PreparedRun) -> Iterator[None]:
    """Add the newest checkpoint to any error: the disk may become full or read-only, but the training is not lost."""
    try:
        yield
    except (OSError, ConfigError) as why:
        steps = run.checkpoints.steps()
        saved = f"checkpoint {steps[-1]} is complete" if steps else "no checkpoint is complete"
        raise ConfigError(
            f"cannot write the results to {run.output}: {why}; {saved}. Free some space, then continue with --resume"
        ) from why
