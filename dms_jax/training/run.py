"""One retrofit: its inputs, its loop, its checkpoints, its export."""

import contextlib
import dataclasses
import json
import os
import signal
import sys
import time
from pathlib import Path

from dms_jax.errors import ConfigError
from dms_jax.training.retrofit_config import RetrofitConfig, differences


class Run:
    """One retrofit, from its inputs to its export."""

    def __init__(self, config: RetrofitConfig, output: Path, resume: bool, accept_changes: bool, dry: bool = False):
        """`dry`: everything up to the first step, and nothing is written."""
        import jax
        import numpy as np

        from dms_jax.sharding import make_mesh, parse_mesh

        self.output, self.accept_changes = output, accept_changes
        self.mesh = make_mesh(*parse_mesh(config.mesh))
        self.writer = jax.process_index() == 0
        if not dry:
            _make_folder(output)
        self.config, self.threshold = config, np.float32(0)
        self.model, self.teacher, self.model_path = self._load_models()
        self.train_rows, self.held_out, summary = self._load_rows()
        self._say(str(summary))
        self.data_hash = summary.content_hash
        self._build()
        if dry:
            return
        self.start = self._restore(resume)
        self._open_log(self.start if resume else None, summary)

    # --- inputs ---

    def _load_models(self):
        import jax
        import jax.numpy as jnp

        import dms_jax
        from dms_jax.hf.folder import open_source, resolve
        from dms_jax.kernels.head_split import uneven_heads
        from dms_jax.sharding import replicated_axes
        from dms_jax.training.data import default_assets
        from dms_jax.training.watch import target_advice

        c = self.config
        path = resolve(c.model or default_assets.default_model(c.data.cache_dir))
        base = open_source(path)[1]
        limit, name = base.context_limit()
        if c.length > limit:
            raise ConfigError(f"length {c.length} exceeds the model's {name} of {limit}; use length <= {limit}")
        dms = c.trained_dms
        if base.dms is not None:
            dms = dataclasses.replace(base.dms, window_size=dms.window_size, target_cr=dms.target_cr, tau=dms.tau)
            if (c.mode == "borrowed") != (dms.variant == "borrowed") and c.mode != "full":
                raise ConfigError(
                    f"{path} already has a policy of the {dms.variant} variant, mode {c.mode} trains the other; use its base model, or mode=full"
                )
            self._say(f"{path} already has a policy ({dms.variant}): it is trained further")
        dtype = jnp.dtype({"auto": "float32" if jax.default_backend() == "cpu" else "bfloat16"}.get(c.dtype, c.dtype))
        teacher = (
            None
            if c.mode == "adapter"
            else dms_jax.load(path, dtype=dtype, mesh=self.mesh, implementation=c.implementation)
        )
        # Weights that train are read in fp32, which bf16 could not hold the updates of.
        master = dtype if c.mode == "adapter" else jnp.float32
        model = dms_jax.load(path, dtype=master, mesh=self.mesh, dms=dms, implementation=c.implementation)
        self.compute_dtype = dtype
        sizes = {
            "batch": c.batch_size,
            "kv_heads": base.num_kv_heads,
            "q_heads": base.num_q_heads,
            "embed": base.hidden_size,
            "mlp": base.intermediate_size,
            "vocab": base.vocab_size,
            "sequence": c.length,
        }
        for sentence in (
            *replicated_axes(sizes, self.mesh),
            *uneven_heads(base.num_q_heads, base.num_kv_heads, self.mesh),
        ):
            self._say(f"note: {sentence}")
        if (advice := target_advice(c.length, dms)) is not None:
            self._say(f"warning: {advice}")
        return model, teacher, path

    def _load_rows(self):
        from dms_jax.hf.hf_tokenizer import load_tokenizer
        from dms_jax.training.data import default_assets
        from dms_jax.training.data.documents import expand_paths
        from dms_jax.training.data.token_store import load_rows

        data = self.config.data
        if not data.paths:
            data = dataclasses.replace(
                data, paths=tuple(str(text) for _, text in default_assets.default_text(data.cache_dir))
            )
        files = expand_paths((*data.paths, *data.eval_paths))  # a path that is not there is said before anything slow
        only_ids = all(name.endswith(".npy") for name in files)
        tokenizer = None if only_ids else load_tokenizer(self.model_path)
        return load_rows(data, tokenizer, self.config.length, self.config.seed, self.model.config.vocab_size)

    def _build(self) -> None:
        import jax

        from dms_jax.training.step import Retrofit, StepConfig

        c = self.config
        remat = c.remat if c.remat != "auto" else "matmuls" if jax.default_backend() == "cpu" else "full"
        step = StepConfig(
            mode=c.mode,
            seed=c.seed,
            length=c.length,
            steps=c.steps,
            accumulate=c.accumulate,
            initial_cr=c.initial_cr,
            ramp_steps=c.first_gated_step,
            cr_steps=c.rising_steps,
            remat=remat,
            loss=c.loss,
            optimizer=c.optimizer,
        )
        self.retrofit = Retrofit(self.model, self.teacher, step, self.mesh, self.compute_dtype)

    def _restore(self, resume: bool) -> int:
        """Steps already done."""
        import jax

        import dms_jax
        from dms_jax.checkpoint import Checkpoints

        self.saved_config = json.loads(json.dumps(dataclasses.asdict(self.config)))
        self.metadata = {
            "config": self.saved_config,
            "base_hash": dms_jax.base_hash(self.model),
            "data_hash": self.data_hash,
            "format": 1,
        }
        self.checkpoints = Checkpoints(self.output / "checkpoints", self.config.keep)
        if not resume:
            return 0
        like = jax.tree.map(
            lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s),
            self.retrofit.state,
            self.retrofit.shardings,
        )
        found = self.checkpoints.restore_latest(like, self._check_checkpoint)
        if found is None:
            self._say(f"no complete checkpoint in {self.output}: starting at step 0")
            return 0
        self.retrofit.state = found.state
        self._say(
            "; skipped checkpoint ".join([f"resumed at step {found.step} of {self.config.steps}", *found.skipped])
        )
        return found.step

    def _check_checkpoint(self, metadata: dict) -> None:
        where = self.output / "checkpoints"
        if metadata.get("base_hash") != self.metadata["base_hash"]:
            raise ConfigError(f"{where} was trained on another base model; give that model, or another output")
        changed = differences(metadata.get("config", {}), self.saved_config)
        if (
            not changed and metadata.get("data_hash", self.data_hash) != self.data_hash
        ):  # the same paths, and not the same in them
            changed = ["data: other data under the same paths"]
        if changed and not self.accept_changes:
            raise ConfigError(
                f"{where} was saved with other settings ({'; '.join(changed)}); repeat them, or add --accept-changes"
            )

    def _open_log(self, resumed_at: int | None, summary) -> None:
        from dms_jax.training.metrics import MetricsFile, provenance

        hashes = {"base_hash": self.metadata["base_hash"], "data_hash": self.data_hash}
        header = provenance(self.saved_config, hashes)
        self.log = (
            MetricsFile(self.output / "metrics.jsonl", header, resumed_at, self.config.tensorboard)
            if self.writer
            else None
        )

    # --- the loop ---

    def run(self) -> int:
        import jax

        self.stop_signal = 0
        previous = {number: signal.signal(number, self._on_signal) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            code = self._train()
            if code == 0:
                self._finish()
            self.checkpoints.close()
            return code
        except jax.errors.JaxRuntimeError as why:
            if "RESOURCE_EXHAUSTED" not in str(why):
                raise
            raise ConfigError(
                "out of device memory; use a larger accumulate, a smaller length, or a mesh of more devices"
            ) from why
        except OSError as why:  # a full disk, or one that became read-only: plots, reports
            steps = self.checkpoints.steps()
            saved = f"checkpoint {steps[-1]} is complete" if steps else "no checkpoint is complete"
            raise ConfigError(
                f"cannot write to {self.output}: {why}; {saved}. Make room, then go on with --resume"
            ) from why
        finally:
            with contextlib.suppress(ConfigError):  # what went wrong first has been said
                self.checkpoints.close()
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _on_signal(self, number: int, frame) -> None:
        if self.stop_signal:  # a second one does not wait
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.stop_signal = number

    def _stop(self) -> int:
        """The signal to stop for, 0 for none: read once a step. Several processes agree on it, a step later, so that all save the same step."""
        import jax
        import numpy as np
        from jax.sharding import NamedSharding
        from jax.sharding import PartitionSpec as P

        if jax.process_count() == 1:
            return self.stop_signal
        if not hasattr(self, "_highest"):
            self._highest, self._flag = jax.jit(jax.numpy.max, out_shardings=NamedSharding(self.mesh, P())), None
        everywhere = NamedSharding(self.mesh, P(self.mesh.axis_names))
        mine = jax.make_array_from_callback(
            (self.mesh.size,), everywhere, lambda index: np.full(1, self.stop_signal, np.int32)
        )
        before, self._flag = self._flag, self._highest(mine)
        return 0 if before is None else int(before)

    def _train(self) -> int:
        from tqdm import tqdm

        from dms_jax.training.watch import Watch

        c, r = self.config, self.retrofit
        self.watch = Watch(self.output / "metrics.jsonl")
        bar = tqdm(
            total=c.steps,
            initial=self.start,
            unit="step",
            disable=not self.writer,
            mininterval=0.5 if sys.stderr.isatty() else 20,
            dynamic_ncols=True,
        )
        pending, clock = None, time.perf_counter()
        for step in range(self.start, c.steps):
            if step == c.first_gated_step and c.mode == "borrowed":
                r.state = r.free_channel(r.state)
            batch = r.place(
                lambda start, count, step=step: self.train_rows.batch(step, c.batch_size, c.seed, start, count),
                c.batch_size,
            )
            r.state, metrics = r.step(r.state, r.frozen, batch)
            # The metrics of the step before: their arrays are ready, so reading them does not hold up this one.
            clock = self._log_step(pending, clock, bar)
            pending = step, metrics, batch
            done, stop = step + 1, self._stop()
            save = done % c.save_every == 0 or done == c.steps or stop
            validate = c.eval_every and done % c.eval_every == 0 and done < c.steps
            if save or validate:  # neither may see a step that was not finite
                clock = self._log_step(pending, clock, bar)
                pending = None
            if save:
                self.checkpoints.save(done, r.state, self.metadata, wait=bool(stop))
            if stop:
                bar.close()
                self._say(f"{signal.Signals(stop).name}: saved at step {done} of {c.steps}; go on with --resume")
                return 128 + stop
            if validate:
                report = self.evaluate()
                self._write({"step": step} | report.as_metrics())
                bar.write(f"step {done}\n{report.table()}", file=sys.stderr)
                clock = time.perf_counter()
        bar.close()
        return 0

    def _log_step(self, pending, clock: float, bar) -> float:
        import jax

        if pending is None:
            return clock
        step, metrics, batch = pending
        read = jax.device_get(metrics)
        heads = read.pop("cache/evict_per_head")
        values = {key: float(value) for key, value in read.items()}
        now = time.perf_counter()
        if not values.pop("finite"):
            self._stop_not_finite(step, values, batch)
        values["perf/tokens_per_s"] = self.config.batch_size * self.config.length / (now - clock)
        self._write({"step": step} | values)
        first = step * self.config.batch_size
        examples = first, first + self.config.batch_size - 1
        for event in self.watch.look(step, values, heads, examples, step >= self.config.first_gated_step):
            self._write({"step": step} | event)
        ratios = f"CR {values['cache/nominal_cr']:.2f} nominal {values['cache/realised_cr']:.2f} realised"
        bar.set_postfix_str(
            f"KL {values['loss/distill']:.4f}, {ratios}, {values['perf/tokens_per_s']:.0f} tokens/s", refresh=False
        )
        bar.update(1)
        return now

    def _stop_not_finite(self, step: int, values: dict, batch) -> None:
        """The step changed nothing (train/step.py), so earlier checkpoints and the state are good; say where it broke."""
        import jax
        import numpy as np

        finite = jax.device_get(self.retrofit.finite_gradients(self.retrofit.state, self.retrofit.frozen, batch))
        places = [
            f"{name} layer {layer}" for name, ok in finite.items() for layer in np.flatnonzero(~np.atleast_1d(ok))
        ]
        first, size = step * self.config.batch_size, self.config.batch_size
        raise ConfigError(
            f"step {step} is not finite (loss {values['loss/total']}, gradient norm {values['optim/grad_norm']}; "
            f"{', '.join(places[:4]) or 'all gradients finite'}); nothing was saved from it. "
            f"Lower optimizer.learning_rate, and look at examples {first} to {first + size - 1}"
        )

    # --- results ---

    def evaluate(self):
        """The held-out report: retrofitted, dense, and a sliding window with as many live tokens."""
        from dms_jax.evaluation.held_out import held_out_report

        r = self.retrofit
        return held_out_report(
            self._some_rows(self.held_out, self.config.eval_rows),
            self.config.length,
            lambda batch: r.evaluate(r.state, r.frozen, self._placed(batch), self.threshold),
            lambda batch, policy: r.evaluate_sliding_window(r.state, r.frozen, policy, self._placed(batch)),
        )

    def _some_rows(self, rows, number: int) -> list:
        """Batches of the first rows, one for each data-parallel device: at least `number` rows, if there are as many."""
        size = self.mesh.shape["data"]
        return [rows.batch(i, size, self.config.seed) for i in range(-(-min(number, max(rows.num_rows, 1)) // size))]

    def _placed(self, batch):
        return self.retrofit.place(
            lambda start, count: type(batch)(*(x[start : start + count] for x in batch)), len(batch.tokens)
        )

    def _calibrate(self) -> None:
        """Raise the threshold until hard decisions evict no more than was asked for. The one-sided loss never pushes back, and
        decisions without the noise of training evict more than those with it."""
        import jax
        import numpy as np

        from dms_jax.core.cr_schedule import realised_cr
        from dms_jax.engine.calibration import threshold_for

        c, r, dms = self.config, self.retrofit, self.retrofit.dms
        if not c.calibration_rows:
            return
        batches = [self._placed(batch) for batch in self._some_rows(self.train_rows, c.calibration_rows)]

        def scores(threshold: float) -> np.ndarray:
            return np.concatenate(
                [jax.device_get(r.scores(r.state, r.frozen, batch, np.float32(threshold))) for batch in batches], axis=1
            )

        wanted = realised_cr(dms.target_cr, c.length, dms.window_size)
        self.threshold = np.float32(max(0.0, threshold_for(scores, dms, wanted, tolerance=0.02, most_runs=6)))
        if self.threshold:
            self._say(
                f"evict logits have to exceed {self.threshold:.3f} from now on: then rows like those trained on realise CR {wanted:.2f}"
            )

    def _finish(self) -> None:
        import dms_jax
        from dms_jax.models.decoder import fold_threshold
        from dms_jax.training.metrics import read_steps
        from dms_jax.training.plots import plot_kept_fraction, plot_training

        self.checkpoints.close()
        self._calibrate()
        report = self.evaluate() if self.held_out.num_rows else None
        trained = self.retrofit.trained_model(self.retrofit.state)
        fold_threshold(trained, float(self.threshold))
        export = self.output / "export"
        dms_jax.save(trained, export, overwrite=True)
        if self.config.mode == "adapter":
            dms_jax.save_adapter(trained, self.output / "adapter.safetensors", overwrite=True)
        if not self.writer:
            return
        plot_training(read_steps(self.output / "metrics.jsonl"), self.output / "training.png")
        if report is not None:
            metrics = report.as_metrics()
            self._write({"step": self.config.steps} | metrics)
            plot_kept_fraction(report.live_per_head, self.config.length, self.output / "kept_fraction.png")
            (self.output / "report.json").write_text(json.dumps(metrics, indent=1))
            print(report.table())
        print(
            f"\n{export} holds the model; {self.output} the metrics and plots. Next:\n  python -m infer.evaluate --model {export} --text FILE"
        )

    def _write(self, values: dict) -> None:
        if self.log is not None:
            self.log.append(values)

    def _say(self, text: str) -> None:
        if self.writer:
            print(text, file=sys.stderr)


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".writable-{os.getpid()}"  # several processes may probe at once
        probe.touch()
        probe.unlink()
    except OSError as why:
        raise ConfigError(f"cannot write to output {folder}: {why}; choose another --set output=FOLDER") from why
