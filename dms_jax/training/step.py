"""The retrofit step: everything that is differentiated, and the jitted functions of a run.

Distillation against the dense teacher plus the one-sided compression loss, over micro-batches that add up to exactly the
gradient of the whole batch. `adapter` trains the evict head and its teacher is the same frozen weights; `full` and
`borrowed` train all weights against a separate frozen copy.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from dms_jax.axes import Array
from dms_jax.core import eviction
from dms_jax.core.cr_schedule import borrowed_channel_scale, evict_fraction, target_cr
from dms_jax.core.eviction import decidable, live_counts
from dms_jax.core.losses import compression_loss, distill_sum
from dms_jax.evaluation.held_out import RowMetrics, retrofit_rows, streaming_llm_rows
from dms_jax.models.decoder import Decoder, free_borrowed_channel
from dms_jax.models.parameters import Params, Template, is_any, is_evict_head, params_of, placed
from dms_jax.policies.streaming_llm import StreamingLLM
from dms_jax.sharding import named_sharding, spec
from dms_jax.training.data.rows import Batch
from dms_jax.training.optimizer import build_optimizer, optimizer_shardings, rate_schedule
from dms_jax.training.retrofit_config import LossConfig, Mode, OptimizerConfig


@dataclass(frozen=True)
class StepConfig:
    """What the compiled step depends on."""

    mode: Mode
    seed: int
    length: int
    steps: int
    accumulate: int  # micro-batches of a step
    initial_cr: float
    ramp_steps: int  # borrowed: steps that free the channel, before any gate acts
    cr_steps: int  # steps from initial_cr to dms.target_cr, after the ramp
    remat: str
    loss: LossConfig
    optimizer: OptimizerConfig


class TrainState(NamedTuple):
    """All that a checkpoint holds."""

    step: Array  # int32, steps done
    trainable: Params
    opt_state: Any


class Retrofit:
    """The functions of one run, compiled once each: `step`, `free_channel`, `evaluate`, `scores`, `evaluate_sliding_window`."""

    def __init__(
        self, model: Decoder, teacher: Decoder | None, config: StepConfig, mesh: Mesh, compute_dtype: jnp.dtype
    ):
        """`model` is taken apart; `teacher` is the separate dense model of `full` and `borrowed`, None for `adapter`.

        Models of shapes only (`abstract_model`), with a mesh of hardware that need not be here, can be lowered and not run.
        """
        self.config, self.mesh, self.dms = config, mesh, model.config.require_dms()
        self.compute_dtype = compute_dtype
        self.student = Template(model)
        self.teacher = Template(teacher) if teacher is not None else None
        chosen = self.student.names(is_evict_head if config.mode == "adapter" else is_any)
        params = params_of(model)
        self.rate = rate_schedule(config.optimizer, config.steps)
        self.tx = build_optimizer(config.optimizer, self.rate)
        self.frozen = (
            params_of(teacher) if teacher is not None else {n: a for n, a in params.items() if n not in chosen}
        )
        shardings = self.student.shardings(chosen, mesh)
        abstract = isinstance(params[chosen[0]], jax.ShapeDtypeStruct)
        if abstract:
            self.frozen = placed(self.frozen, (self.teacher or self.student).shardings(list(self.frozen), mesh))
        # Master weights are fp32 whatever the compute dtype: a bf16 weight loses updates of this size.
        make = jax.eval_shape if abstract else lambda f, *x: f(*x)
        master = jax.jit(lambda p: {n: a.astype(jnp.float32) for n, a in p.items()}, out_shardings=shardings)
        trainable = make(master, {n: params[n] for n in chosen})
        everywhere = NamedSharding(mesh, P())
        # pyrefly: ignore[bad-argument-type]  # a tree of the same form, of shardings
        self.shardings = TrainState(everywhere, shardings, optimizer_shardings(self.tx, trainable, shardings, mesh))
        init = jax.jit(self.tx.init, out_shardings=self.shardings.opt_state)
        self.state = TrainState(
            make(lambda: jax.device_put(jnp.zeros((), jnp.int32), everywhere)), trainable, make(init, trainable)
        )
        if abstract:
            self.state = jax.tree.map(
                lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), self.state, self.shardings
            )
        self.step = self._jit(self._step, donate=(0,), out=(self.shardings, everywhere))
        self.free_channel = self._jit(self._free_channel, donate=(0,), out=self.shardings)
        self.evaluate = self._jit(self._evaluate, out=everywhere)
        self.scores = self._jit(self._scores, out=everywhere)
        self.evaluate_sliding_window = self._jit(self._evaluate_sliding_window, out=everywhere, static=(2,))
        self.finite_gradients = self._jit(
            lambda state, frozen, batch: jax.tree.map(_finite_per_layer, self._gradients(state, frozen, batch)[0]),
            out=everywhere,
        )

    def _jit(self, f, *, out, donate=(), static=()):
        compiled = jax.jit(f, donate_argnums=donate, static_argnums=static, out_shardings=out)

        def call(*args):
            with jax.set_mesh(self.mesh):
                return compiled(*args)

        call.cache_size = compiled._cache_size  # pyrefly: ignore[missing-attribute]  # not in the stub of jit
        call.lower = compiled.lower  # pyrefly: ignore[missing-attribute]  # a function takes attributes
        return call

    # --- model views ---

    def student_model(self, trainable: Params, frozen: Params) -> Decoder:
        cast = {
            name: a if is_evict_head(name, self.student.variables[name][1]) else a.astype(self.compute_dtype)
            for name, a in trainable.items()
        }
        return self.student.merge(cast, {} if self.teacher else frozen)

    def teacher_model(self, trainable: Params, frozen: Params) -> Decoder:
        """`adapter`: the student itself, whose `dense_hidden` never looks at the evict head."""
        return (
            self.teacher.merge(frozen) if self.teacher else self.student_model(jax.lax.stop_gradient(trainable), frozen)
        )

    def trained_model(self, state: TrainState) -> Decoder:
        return self.student_model(state.trainable, self.frozen)

    # --- one step ---

    def _losses(self, trainable, frozen, micro, step, num_tokens):
        """Sums of one micro-batch, scaled so that they add up to the batch's means: (total, metrics)."""
        c, dms = self.config, self.dms
        student, teacher = self.student_model(trainable, frozen), self.teacher_model(trainable, frozen)
        target = jax.lax.stop_gradient(teacher.dense_hidden(micro.tokens, micro.segment_ids))
        ramping = step < c.ramp_steps

        def free():
            hidden = student.ramped_hidden(
                micro.tokens, borrowed_channel_scale(step, c.ramp_steps), micro.segment_ids, c.remat
            )
            return hidden, jnp.zeros(
                (student.config.num_layers, len(micro.tokens), student.config.num_kv_heads, c.length)
            )

        def gate():
            noise = eviction.logistic_noise(
                c.seed, step, micro.examples, student.config.num_layers, student.config.num_kv_heads, c.length
            )
            return student.relaxed_hidden(micro.tokens, noise, micro.segment_ids, c.remat)

        hidden, evict = jax.lax.cond(ramping, free, gate) if c.ramp_steps else gate()
        weight = micro.loss_mask.astype(jnp.float32) / num_tokens
        distill = distill_sum(
            hidden, target, student.output_embedding(), teacher.output_embedding(), weight, c.loss.order
        )
        counted = micro.loss_mask
        if c.loss.decidable_only:
            counted = counted & decidable(c.length, dms.window_size, dms.decision_shift)
        cr = self.nominal_target(step)
        compression = compression_loss(evict, evict_fraction(cr), scope=c.loss.scope, counted=counted) / c.accumulate
        compression = jnp.where(ramping, 0.0, compression)
        evicted = jnp.sum(evict * micro.loss_mask[:, None]) / (num_tokens * evict.shape[0] * evict.shape[2])
        live = (
            jnp.mean(live_counts(evict > 0.5, dms.window_size, dms.decision_shift).astype(jnp.float32)) / c.accumulate
        )
        total = distill + c.loss.compression_weight * compression
        return total, {
            "loss/total": total,
            "loss/distill": distill,
            "loss/compression": compression,
            "cache/evict_fraction": evicted,
            "cache/live_tokens": live,
            "cache/evict_per_head": jnp.mean(evict, axis=(1, 3)) / c.accumulate,
        }

    def nominal_target(self, step: Array) -> Array:
        return target_cr(
            jnp.maximum(step - self.config.ramp_steps, 0),
            self.config.initial_cr,
            self.dms.target_cr,
            max(self.config.cr_steps, 1),
        )

    def _gradients(self, state: TrainState, frozen: Params, batch) -> tuple[Params, dict]:
        num_tokens = jnp.maximum(jnp.sum(batch.loss_mask), 1).astype(jnp.float32)
        of = jax.grad(self._losses, has_aux=True)
        if self.config.accumulate == 1:
            return of(state.trainable, frozen, batch, state.step, num_tokens)
        micros = jax.tree.map(self._micro_batches, batch)

        def add(carry, micro):
            return jax.tree.map(jnp.add, carry, of(state.trainable, frozen, micro, state.step, num_tokens)), None

        zero = jax.tree.map(
            lambda x: jnp.zeros(x.shape, x.dtype),
            jax.eval_shape(of, state.trainable, frozen, jax.tree.map(lambda x: x[0], micros), state.step, num_tokens),
        )
        return jax.lax.scan(add, zero, micros)[0]

    def _micro_batches(self, x: Array) -> Array:
        """[b*A ...] -> [A b ...]; micro-batch a takes every A-th row from a on, so that no row leaves the device that holds it."""
        x = x.reshape(-1, self.config.accumulate, *x.shape[1:]).swapaxes(0, 1)
        axes = (None, "batch") + (None,) * (x.ndim - 2)
        return jax.lax.with_sharding_constraint(x, spec(axes, x.shape, self.mesh))

    def _step(self, state: TrainState, frozen: Params, batch) -> tuple[TrainState, dict]:
        grads, metrics = self._gradients(state, frozen, batch)
        norm = optax.tree.norm(grads)
        updates, opt_state = self.tx.update(grads, state.opt_state, state.trainable)
        finite = jnp.isfinite(norm) & jnp.isfinite(metrics["loss/total"])
        before = state.step
        # A step that is not finite changes nothing: the run stops with its last good state, which it may save.
        # pyrefly: ignore[bad-argument-type]  # optax returns the tree it was given
        new = TrainState(state.step + 1, optax.apply_updates(state.trainable, updates), opt_state)
        state = jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, state)
        metrics |= {
            "optim/grad_norm": norm,
            "optim/learning_rate": jnp.asarray(self.rate(before), jnp.float32),
            "cache/target_cr": self.nominal_target(before),
            "cache/nominal_cr": 1 / jnp.maximum(1 - metrics["cache/evict_fraction"], 1e-6),
            "cache/realised_cr": self.config.length / metrics["cache/live_tokens"],
            "finite": finite,
        }
        return state, metrics

    def _free_channel(self, state: TrainState) -> TrainState:
        """Between the phases of `borrowed`: the channel, which no longer has any effect, becomes exactly 0."""
        model = self.student.merge(state.trainable)
        free_borrowed_channel(model)
        trainable = params_of(model)
        return TrainState(state.step, trainable, self.tx.init(trainable))

    # --- held-out rows ---

    def _evaluate(self, state: TrainState, frozen: Params, batch, threshold: Array) -> RowMetrics:
        student, teacher = self.student_model(state.trainable, frozen), self.teacher_model(state.trainable, frozen)
        return retrofit_rows(student, teacher, batch.tokens, batch.segment_ids, threshold)

    def _scores(self, state: TrainState, frozen: Params, batch, threshold: Array) -> Array:
        """Evict logits [L B K T] of rows that decide under `threshold`."""
        return self.student_model(state.trainable, frozen).hard_scores(batch.tokens, batch.segment_ids, threshold)

    def _evaluate_sliding_window(self, state: TrainState, frozen: Params, policy: StreamingLLM, batch):
        return streaming_llm_rows(self.teacher_model(state.trainable, frozen), batch.tokens, batch.segment_ids, policy)

    def lower(self, batch_size: int) -> jax.stages.Lowered:
        """The step for a batch of so many rows, not run: `.compile()` says what it needs of each device."""

        def shape(dtype: Any, *dims: int) -> Any:
            return jax.ShapeDtypeStruct(
                dims, dtype, sharding=named_sharding(("batch",) + (None,) * (len(dims) - 1), dims, self.mesh)
            )

        rows = batch_size, self.config.length
        batch = Batch(
            shape(jnp.int32, *rows), shape(jnp.int32, *rows), shape(jnp.bool_, *rows), shape(jnp.int32, batch_size)
        )
        with jax.set_mesh(self.mesh):
            return self.step.lower(self.state, self.frozen, batch)  # pyrefly: ignore[missing-attribute]  # set in `_jit`

    def place(self, batch_of: Callable[[int, int], Batch], batch_size: int) -> Batch:
        """A global batch on the mesh; `batch_of(start, count)` gives the rows that this host's devices hold."""

        @functools.cache  # the four fields of a shard come from one call
        def rows(start: int, stop: int) -> Batch:
            return batch_of(start, stop - start)

        shape = (batch_size, self.config.length)

        def array(field: str, dims: tuple[int, ...]) -> Array:
            sharding = named_sharding(("batch",) + (None,) * (len(dims) - 1), dims, self.mesh)
            # pyrefly: ignore[unsupported-operation]  # the index of a shard that is here is not None
            return jax.make_array_from_callback(
                dims, sharding, lambda index: getattr(rows(*index[0].indices(batch_size)[:2]), field)
            )

        return Batch(
            tokens=array("tokens", shape),
            segment_ids=array("segment_ids", shape),
            loss_mask=array("loss_mask", shape),
            examples=array("examples", shape[:1]),
        )


def _finite_per_layer(gradient: Array) -> Array:
    axes = tuple(range(1, gradient.ndim)) if gradient.ndim > 1 else ()
    return jnp.all(jnp.isfinite(gradient), axis=axes)
