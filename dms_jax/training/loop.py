"""The training loop: steps, checkpoints and validations until the last step or a signal."""

import signal
import sys
import time

import jax
import numpy as np
from tqdm import tqdm

from dms_jax.errors import ConfigError
from dms_jax.training.data.rows import Batch
from dms_jax.training.placement import local_rows, place
from dms_jax.training.prepare import PreparedRun
from dms_jax.training.restore import checkpoint_metadata, stored
from dms_jax.training.run_monitor import RunMonitor
from dms_jax.training.step import TrainState
from dms_jax.training.stop_signal import StopSignal
from dms_jax.training.validate import Calibration, running_threshold, validate


def train(run: PreparedRun, state: TrainState, stop: StopSignal) -> tuple[TrainState, int]:
    """Train from `state`, which is donated, to the last step.

    Returns the new state, and the number of the signal that stopped the loop early, or 0.
    """
    c, steps, metadata = run.config, run.steps, checkpoint_metadata(run)
    first, count = local_rows(c.batch_size, run.mesh)
    start = int(state.step)
    log = StepLog(run, start)
    for step in range(start, c.num_steps):
        if step == c.first_gated_step and c.mode == "borrowed":
            state = steps.free_channel(state)
        host = run.train_rows.batch(step, c.batch_size, c.seed, first, count)
        batch = place(host, run.mesh, c.batch_size, first)
        state, metrics = steps.step(state, run.frozen, batch)
        log.write_pending(state)
        log.pending = step, metrics, batch

        done, number = step + 1, stop.agreed()
        save = done % c.save_every == 0 or done == c.steps or number
        validation = c.eval_every and done % c.eval_every == 0 and done < c.num_steps
        if save or validation:
            log.write_pending(state)  # raises if the step was not finite, so that it is neither saved nor validated
        if save:
            run.checkpoints.save(done, stored(state), metadata, wait=bool(number))
        if number:
            log.close()
            run.say(f"{signal.Signals(number).name}: saved at step {done} of {c.steps}; continue with --resume")
            return state, number
        if validation:
            report = validate(run, state, Calibration(running_threshold(state), None))
            run.record({"step": step} | report.as_metrics())
            log.show(f"step {done}\n{report.table()}")
    log.close()
    return state, 0


class StepLog:
    """The log, the monitor and the progress bar of the training steps.

    The metrics of a step are read while the next step runs. By then they are ready, so reading them does not stall the
    devices.
    """

    def __init__(self, run: PreparedRun, start: int):
        self.run = run
        self.pending: tuple[int, dict, Batch] | None = None  # the step that has not been logged yet
        self._monitor = RunMonitor(run.metrics_path)
        self._clock = time.perf_counter()  # time at which the previous step was logged
        self._bar = tqdm(
            total=run.config.steps,
            initial=start,
            unit="step",
            disable=not run.is_writer,
            mininterval=0.5 if sys.stderr.isatty() else 20,
            dynamic_ncols=True,
        )

    def write_pending(self, state: TrainState) -> None:
        """Log the pending step. Raises ConfigError if it was not finite."""
        if self.pending is None:
            return
        (step, metrics, batch), self.pending = self.pending, None
        read, c = jax.device_get(metrics), self.run.config
        heads = read.pop("cache/evict_per_head")
        values = {key: float(value) for key, value in read.items()}
        now = time.perf_counter()
        if not values.pop("finite"):
            raise _not_finite(self.run, state, step, values, batch)
        values["perf/tokens_per_s"] = c.batch_size * c.length / (now - self._clock)
        self.run.record({"step": step} | values)
        examples = step * c.batch_size, (step + 1) * c.batch_size - 1
        for event in self._monitor.check(step, values, heads, examples, step >= c.first_gated_step):
            self.run.record({"step": step} | event)
        ratios = f"CR {values['cache/nominal_cr']:.2f} nominal {values['cache/realised_cr']:.2f} realised"
        speed = f"{values['perf/tokens_per_s']:.0f} tokens/s"
        self._bar.set_postfix_str(f"KL {values['loss/distill']:.4f}, {ratios}, {speed}", refresh=False)
        self._bar.update(1)
        self._clock = now

    def show(self, text: str) -> None:
        """Print text above the progress bar, and exclude the time since the last step from the speed."""
        self._bar.write(text, file=sys.stderr)
        self._clock = time.perf_counter()

    def close(self) -> None:
        self._bar.close()


def _not_finite(run: PreparedRun, state: TrainState, step: int, values: dict, batch: Batch) -> ConfigError:
    """Make the error that names the tensors and layers whose gradients are not finite.

    Such a step changes nothing (`RetrofitStep.update`), so `state` and the earlier checkpoints are good.
    """
    finite = jax.device_get(run.steps.finite_gradients(state, run.frozen, batch))
    places = [f"{name} layer {layer}" for name, ok in finite.items() for layer in np.flatnonzero(~np.atleast_1d(ok))]
    first, size = step * run.config.batch_size, run.config.batch_size
    return ConfigError(
        f"step {step} is not finite (loss {values['loss/total']}, gradient norm {values['optim/grad_norm']}; "
        f"{', '.join(places[:4]) or 'all gradients finite'}); it was not saved. "
        f"Lower optimizer.learning_rate, or check examples {first} to {first + size - 1}"
    )
