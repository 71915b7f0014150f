"""The retrofit step as pure functions of (state, frozen, batch): loss, gradients, update and held-out rows.

The loss is the distillation from the dense teacher plus a one-sided compression loss. The gradients of the
micro-batches add up to exactly that of the whole batch. Mode `adapter` trains only the evict head, so the teacher is
the same frozen base; `full` and `borrowed` train all weights against a separate frozen teacher. Begin with
`RetrofitStep.losses`; `step_functions` compiles these functions for a mesh.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from dms_jax.axes import Array
from dms_jax.config import DMSConfig
from dms_jax.core import eviction
from dms_jax.core.cr_schedule import borrowed_channel_scale, evict_fraction, target_cr
from dms_jax.core.eviction import decidable, live_counts
from dms_jax.core.losses import TokenMetrics, compression_loss, distill_sum
from dms_jax.evaluation.held_out import RowMetrics, budgeted_rows, retrofit_rows, streaming_llm_rows
from dms_jax.models.decoder import Decoder, free_borrowed_channel
from dms_jax.models.layers import EvictParam
from dms_jax.models.parameters import ModelStructure, Params, flatten, with_shardings
from dms_jax.platform_defaults import platform_defaults
from dms_jax.policies.streaming_llm import StreamingLLM
from dms_jax.sharding import spec
from dms_jax.training import fisher_init
from dms_jax.training.data.rows import Batch
from dms_jax.training.fisher_init import FittedHead, LabeledPairs, LabelSums, no_labels
from dms_jax.training.mlp_head import Units
from dms_jax.training.optimizer import build_optimizer, rate_schedule
from dms_jax.training.retrofit_config import RetrofitConfig

THRESHOLD_RATE = 0.5  # part of the way to the threshold of its batch that a step moves the running one
EVICT_PROJECTION = "layers.attention.evict_proj"
EVICT_UNITS = tuple(f"layers.attention.evict_units_{part}" for part in ("in", "bias", "out"))


class TrainState(NamedTuple):
    """The arrays that change in a step, which a checkpoint holds."""

    step: Array  # int32, number of steps done
    trainable: Params
    opt_state: Any
    threshold: Array | None = None  # fp32, of the evict logits, with ratio_control=threshold; None with the other

    def with_projection(self, projection: Array) -> "TrainState":
        """Return this state with another projection of the evict head, [L D K]."""
        # pyrefly: ignore[bad-argument-type]  # under JAX's transformations, an array is never NumPy's
        return self._replace(trainable=self.trainable | {EVICT_PROJECTION: projection})


@dataclass(frozen=True, eq=False)
class RetrofitStep:
    """The mathematics of one retrofit, as methods that take all arrays as arguments. Nothing here is compiled."""

    config: RetrofitConfig
    mesh: Mesh
    student: ModelStructure
    teacher: (
        ModelStructure | None
    )  # None: the student is its own teacher, because `dense_hidden` ignores the evict head
    evict_head: frozenset[str]  # names of the parameters of the evict head, which are fp32 for any compute dtype
    compute_dtype: jnp.dtype
    remat: str  # `config.remat`, resolved for the platform

    @property
    def dms(self) -> DMSConfig:
        return self.student.config.require_dms()

    @property
    def rate(self) -> optax.Schedule:
        return rate_schedule(self.config.optimizer, self.config.num_steps)

    @property
    def tx(self) -> optax.GradientTransformation:
        return build_optimizer(self.config.optimizer, self.rate)

    # --- models from parameters ---

    def student_model(self, trainable: Params, frozen: Params) -> Decoder:
        cast = {
            name: array if name in self.evict_head else array.astype(self.compute_dtype)
            for name, array in trainable.items()
        }
        return self.student.build(cast, {} if self.teacher else frozen)

    def teacher_model(self, trainable: Params, frozen: Params) -> Decoder:
        if self.teacher:
            return self.teacher.build(frozen)
        return self.student_model(jax.lax.stop_gradient(trainable), frozen)

    # --- loss and gradients ---

    def losses(
        self,
        trainable: Params,
        frozen: Params,
        micro: Batch,
        step: Array,
        num_tokens: Array,
        threshold: Array | None = None,
    ) -> tuple[Array, tuple[dict, Array | None]]:
        """Compute (total loss, (metrics, evict logits)) of one micro-batch.

        Losses and metrics are scaled so that the sums over all micro-batches are the means of the batch. `num_tokens`:
        number of tokens of the whole batch that the loss mask includes. Logits [L B K T] are returned if there is a
        `threshold`; those of tokens that cannot evict within the row are -inf.
        """
        c, dms = self.config, self.dms
        student, teacher = self.student_model(trainable, frozen), self.teacher_model(trainable, frozen)
        target = jax.lax.stop_gradient(teacher.dense_hidden(micro.tokens, micro.segment_ids))

        hidden, evict, logits = self._decided(student, micro, step, threshold)

        # Distillation.
        weight = micro.loss_mask.astype(jnp.float32) / num_tokens
        distill = distill_sum(
            hidden, target, student.output_embedding(), teacher.output_embedding(), weight, c.loss.order
        )

        # Compression: how far the evicted fraction is below its target.
        counted = self._can_evict(micro) if c.loss.decidable_only else micro.loss_mask
        cr = self.nominal_target(step)
        compression = compression_loss(evict, evict_fraction(cr), scope=c.loss.scope, counted=counted) / c.accumulate
        compression = jnp.where(step < c.first_gated_step, 0.0, compression)

        # The evicted fraction, and the number of pairs that a cache would hold.
        mask = micro.loss_mask[None, :, None].astype(evict.dtype)
        evicted = jnp.sum(evict * mask) / (num_tokens * evict.shape[0] * evict.shape[2])
        live = live_counts(evict > 0.5, dms.window_size, dms.decision_shift).astype(jnp.float32)
        assert c.loss.compression_weight is not None, "RetrofitConfig.resolved gives it a value"
        total = distill + c.loss.compression_weight * compression
        metrics = {
            "loss/total": total,
            "loss/distill": distill,
            "loss/compression": compression,
            "cache/evict_fraction": evicted,
            "cache/live_tokens": jnp.mean(live) / c.accumulate,
            "cache/evict_per_head": jnp.mean(evict, axis=(1, 3)) / c.accumulate,
        }
        return total, (metrics, logits)

    def _decided(
        self, student: Decoder, micro: Batch, step: Array, threshold: Array | None
    ) -> tuple[Array, Array, Array | None]:
        """Run the student. Return its hidden states, its decisions [L B K T], and the evict logits of `losses`.

        In the first steps of `borrowed`, the channel is freed and nothing is evicted.
        """
        c = self.config
        layers, heads = student.config.num_layers, student.config.num_kv_heads

        def free():
            scale = borrowed_channel_scale(step, c.first_gated_step)
            hidden = student.ramped_hidden(micro.tokens, scale, micro.segment_ids, self.remat)
            return hidden, jnp.zeros((layers, len(micro.tokens), heads, c.length))

        def noise():
            return eviction.logistic_noise(c.seed, step, micro.examples, layers, heads, c.length)

        def gate():
            return student.relaxed_hidden(micro.tokens, noise(), micro.segment_ids, self.remat)

        if threshold is None:
            ramping = step < c.first_gated_step
            hidden, evict = jax.lax.cond(ramping, free, gate) if c.first_gated_step else gate()
            return hidden, evict, None
        # Gates act on logit + noise, so this moves the threshold.
        hidden, evict, logits = student.relaxed_scores(micro.tokens, noise() - threshold, micro.segment_ids, self.remat)
        return hidden, evict, jnp.where(self._can_evict(micro)[None, :, None], logits, -jnp.inf)

    def _can_evict(self, batch: Batch) -> Array:
        """Return which tokens of a batch [B T] decide about a pair that can still leave within their row."""
        dms = self.dms
        return batch.loss_mask & decidable(self.config.length, dms.window_size, dms.decision_shift)[None]

    def nominal_target(self, step: Array) -> Array:
        """Return the target of the nominal compression ratio at a step."""
        initial_cr = self.config.initial_cr
        assert initial_cr is not None, "RetrofitConfig.resolved gives it a value"
        return target_cr(
            jnp.maximum(step - self.config.first_gated_step, 0),
            initial_cr,
            self.dms.target_cr,
            self.config.rising_steps,
        )

    def gradients(self, state: TrainState, frozen: Params, batch: Batch) -> tuple[Params, dict, Array | None]:
        """Compute (gradients, metrics, evict logits) of a batch: sums over its micro-batches, and the logits of all.

        The logits [... L B K T] are None without a threshold.
        """
        num_tokens = jnp.maximum(jnp.sum(batch.loss_mask), 1).astype(jnp.float32)

        def of_micro_batch(micro):
            grad = jax.grad(self.losses, has_aux=True)
            grads, (metrics, logits) = grad(state.trainable, frozen, micro, state.step, num_tokens, state.threshold)
            return (grads, metrics), logits

        if self.config.accumulate == 1:
            (grads, metrics), logits = of_micro_batch(batch)
            return grads, metrics, logits
        micros = jax.tree.map(self._micro_batches, batch)

        def add(carry, micro):
            sums, logits = of_micro_batch(micro)
            return jax.tree.map(jnp.add, carry, sums), logits

        zero = jax.tree.map(
            lambda x: jnp.zeros(x.shape, x.dtype),
            jax.eval_shape(of_micro_batch, jax.tree.map(lambda x: x[0], micros))[0],
        )
        (grads, metrics), logits = jax.lax.scan(add, zero, micros)
        return grads, metrics, logits

    def _micro_batches(self, x: Array) -> Array:
        """Split rows [b*A ...] into A micro-batches [A b ...].

        Micro-batch a takes every A-th row, starting at row a, so that no row leaves the device that holds it.
        """
        x = x.reshape(-1, self.config.accumulate, *x.shape[1:]).swapaxes(0, 1)
        axes = (None, "batch") + (None,) * (x.ndim - 2)
        return jax.lax.with_sharding_constraint(x, spec(axes, x.shape, self.mesh))

    # --- one step ---

    def update(self, state: TrainState, frozen: Params, batch: Batch) -> tuple[TrainState, dict]:
        """Take one optimizer step and return (new state, metrics)."""
        grads, metrics, logits = self.gradients(state, frozen, batch)
        norm = optax.tree.norm(grads)
        with jax.numpy_dtype_promotion("standard"):  # optax mixes floats with the step, an integer
            updates, opt_state = self.tx.update(grads, state.opt_state, state.trainable)
            learning_rate = jnp.asarray(self.rate(state.step), jnp.float32)
        finite = jnp.isfinite(norm) & jnp.isfinite(metrics["loss/total"])
        before, threshold = state.step, state.threshold
        # A step that is not finite changes nothing, so that the run stops with its last good state.
        # pyrefly: ignore[bad-assignment]  # optax returns the tree it was given
        trainable: Params = optax.apply_updates(state.trainable, updates)
        new = TrainState(state.step + 1, trainable, opt_state, self._next_threshold(state, logits, batch))
        state = jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, state)
        if logits is not None:
            metrics["cache/threshold"] = threshold
        metrics |= {
            "optim/grad_norm": norm,
            "optim/learning_rate": learning_rate,
            "cache/target_cr": self.nominal_target(before),
            "cache/nominal_cr": 1 / jnp.maximum(1 - metrics["cache/evict_fraction"], 1e-6),
            "cache/realised_cr": self.config.length / metrics["cache/live_tokens"],
            "finite": finite,
        }
        return state, metrics

    def _next_threshold(self, state: TrainState, logits: Array | None, batch: Batch) -> Array | None:
        """Move the threshold halfway to the one at which the target fraction of the batch's decisions would evict.

        The first step moves it all the way. Only tokens that can evict count, so that rows realise `realised_cr` of the
        target.
        """
        threshold = state.threshold
        if threshold is None or logits is None:
            return None
        heads = self.student.config.num_layers * self.student.config.num_kv_heads
        num_decisions = jnp.sum(self._can_evict(batch)).astype(jnp.float32) * heads
        wanted = eviction.threshold_at(logits, num_decisions * evict_fraction(self.dms.target_cr))
        rate = jnp.where(state.step == 0, 1.0, THRESHOLD_RATE)
        # A batch without a decision has no such threshold.
        return jnp.where(num_decisions > 0, threshold + rate * (wanted - threshold), threshold)

    # --- the start with init=fisher ---

    def no_labels(self) -> LabelSums:
        return no_labels(self.student.config)

    def add_labels(
        self, sums: LabelSums, state: TrainState, frozen: Params, batch: Batch
    ) -> tuple[LabelSums, LabeledPairs]:
        """Add the sums of a batch of label rows; also return its pairs.

        Rows whose segments are padding add nothing.
        """
        student = self.student_model(state.trainable, frozen)
        return fisher_init.add_labels(
            sums, student, batch.tokens, batch.segment_ids, batch.examples, self.config.seed, self.remat
        )

    def fitted_state(self, state: TrainState, head: FittedHead, units: Units | None = None) -> TrainState:
        """Put the head that fits the labels into a state. It evicts about the target fraction of the decisions.

        `units`: its hidden units, if it has some, with an axis of layers.
        """
        if units is not None:
            out = head.weights_of_logits(self.dms, units.out)
            new = dict(zip(EVICT_UNITS, (units.weights, units.bias, out), strict=True))
            # pyrefly: ignore[bad-argument-type]  # as in `with_projection`
            state = state._replace(trainable=state.trainable | new)
        return state.with_projection(head.projection(self.dms, evict_fraction(self.dms.target_cr)))

    def free_channel(self, state: TrainState) -> TrainState:
        """Set the borrowed channel to exactly 0 after the first steps of `borrowed`, and reset the optimizer state.

        Those steps have already reduced the effect of the channel to nothing.
        """
        model = self.student.build(state.trainable)
        free_borrowed_channel(model)
        trainable = flatten(model)
        return state._replace(trainable=trainable, opt_state=self.tx.init(trainable))

    def finite_gradients(self, state: TrainState, frozen: Params, batch: Batch) -> dict[str, Array]:
        """Return whether the gradients are finite, by parameter and layer: bool [L] for each parameter."""
        return jax.tree.map(_finite_per_layer, self.gradients(state, frozen, batch)[0])

    # --- held-out rows ---

    def dense_hidden(self, state: TrainState, frozen: Params, batch: Batch) -> Array:
        """Return the hidden states [B T D] of the dense teacher, with which the other methods compare."""
        return self.teacher_model(state.trainable, frozen).dense_hidden(batch.tokens, batch.segment_ids)

    def evaluate(self, state: TrainState, frozen: Params, batch: Batch, dense: Array, threshold: Array) -> RowMetrics:
        """Compare the student, with hard decisions under `threshold`, with the dense teacher."""
        student, teacher = self.student_model(state.trainable, frozen), self.teacher_model(state.trainable, frozen)
        return retrofit_rows(student, teacher, dense, batch.tokens, batch.segment_ids, threshold)

    def evaluate_budgeted(
        self, state: TrainState, frozen: Params, batch: Batch, dense: Array, budgets: Array
    ) -> TokenMetrics:
        """Compare the student within `budgets` [L K] of live pairs with the dense teacher."""
        student, teacher = self.student_model(state.trainable, frozen), self.teacher_model(state.trainable, frozen)
        return budgeted_rows(student, teacher, dense, batch.tokens, batch.segment_ids, budgets)

    def scores(self, state: TrainState, frozen: Params, batch: Batch, threshold: Array) -> Array:
        """Compute the evict logits [L B K T] of rows whose decisions use `threshold`."""
        return self.student_model(state.trainable, frozen).hard_scores(batch.tokens, batch.segment_ids, threshold)

    def evaluate_streaming_llm(
        self, state: TrainState, frozen: Params, policy: StreamingLLM, batch: Batch, dense: Array
    ) -> TokenMetrics:
        """Compare the dense teacher under `policy` with the dense teacher itself."""
        teacher = self.teacher_model(state.trainable, frozen)
        return streaming_llm_rows(teacher, dense, batch.tokens, batch.segment_ids, policy)


def _finite_per_layer(gradient: Array) -> Array:
    axes = tuple(range(1, gradient.ndim)) if gradient.ndim > 1 else ()
    return jnp.all(jnp.isfinite(gradient), axis=axes)


def take_apart(
    model: Decoder,
    teacher: Decoder | None,
    config: RetrofitConfig,
    mesh: Mesh,
    compute_dtype: jnp.dtype,
    kind: type[RetrofitStep] = RetrofitStep,
) -> tuple[RetrofitStep, Params, Params]:
    """Split the models into (mathematics, parameters that train, frozen parameters).

    `teacher` is the separate dense model of `full` and `borrowed`; None for `adapter`. Models that consist of shapes
    only (`abstract_model`), on a mesh of hardware that need not be at hand, give shapes in place of parameters.
    """
    assert "auto" not in (config.init, config.ratio_control), "call RetrofitConfig.resolved first"
    student, params = ModelStructure(model), flatten(model)
    evict_head = frozenset(flatten(model, EvictParam))
    chosen = evict_head if config.mode == "adapter" else params.keys()
    trainable = {name: array for name, array in params.items() if name in chosen}
    separate = None if teacher is None else ModelStructure(teacher)
    frozen = (
        flatten(teacher)
        if teacher is not None
        else {name: array for name, array in params.items() if name not in chosen}
    )
    if any(isinstance(array, jax.ShapeDtypeStruct) for array in params.values()):
        frozen = with_shardings(frozen, (separate or student).shardings(list(frozen), mesh))
    remat = config.remat
    if remat == "auto":
        with jax.set_mesh(mesh):
            remat = platform_defaults().remat
    return kind(config, mesh, student, separate, evict_head, compute_dtype, remat), trainable, frozen
