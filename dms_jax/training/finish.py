"""The end of a retrofit: calibration, the held-out report, the exported model and the plots."""

import json

from dms_jax.command import typed_as
from dms_jax.files import replacing
from dms_jax.hf.adapter import save_adapter
from dms_jax.hf.folder import save
from dms_jax.models.decoder import fold_threshold
from dms_jax.training.metrics import read_steps
from dms_jax.training.plots import plot_kept_fraction, plot_training
from dms_jax.training.prepare import PreparedRun
from dms_jax.training.step import TrainState
from dms_jax.training.validate import calibrated_threshold, validate


def finish(run: PreparedRun, state: TrainState) -> None:
    """Write export/, report.json and the plots to the output folder, and print the held-out table."""
    run.checkpoints.close()
    threshold = calibrated_threshold(run, state)
    report = validate(run, state, threshold) if run.held_out.num_rows else None

    trained = run.steps.math.student_model(state.trainable, run.frozen)
    fold_threshold(trained, threshold)
    export = run.output / "export"
    save(trained, export, overwrite=True)
    if run.config.mode == "adapter":
        save_adapter(trained, run.output / "adapter.safetensors", overwrite=True)

    if not run.is_writer:
        return
    plot_training(read_steps(run.metrics_path), run.output / "training.png")
    if report is not None:
        metrics = report.as_metrics()
        run.record({"step": run.config.steps} | metrics)
        plot_kept_fraction(report.live_per_head, run.config.length, run.output / "kept_fraction.png")
        with replacing(run.output / "report.json") as file:
            file.write_text(json.dumps(metrics, indent=1))
        print(report.table())
    print(f"\nThe model is in {export}; metrics and plots are in {run.output}. Next:")
    print(f"  {typed_as('evaluate')} --model {export} --text FILE")
