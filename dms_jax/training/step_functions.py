"""The functions of one retrofit, each compiled once for its mesh, and the initial state."""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from dms_jax.models.parameters import Params
from dms_jax.sharding import named_sharding
from dms_jax.training.fisher_init import LabelSums, fit
from dms_jax.training.optimizer import optimizer_shardings
from dms_jax.training.placement import abstract_batch
from dms_jax.training.step import RetrofitStep, TrainState


class OnMesh:
    """A jitted function that is traced and run with its mesh set."""

    def __init__(self, function: Callable, mesh: Mesh, out_shardings, *, donate=(), static=()):
        self.mesh = mesh
        self._jitted = jax.jit(function, donate_argnums=donate, static_argnums=static, out_shardings=out_shardings)

    def __call__(self, *args):
        with jax.set_mesh(self.mesh):
            return self._jitted(*args)

    def lower(self, *args) -> jax.stages.Lowered:
        with jax.set_mesh(self.mesh):
            return self._jitted.lower(*args)

    def num_compiled(self) -> int:
        """Number of programs compiled so far, one for each set of argument shapes."""
        return self._jitted._cache_size()  # pyrefly: ignore[missing-attribute]  # not in the stub of jit


@dataclass(frozen=True, eq=False)
class StepFunctions:
    """The compiled functions of a run.

    The state is an argument and a result: `state, metrics = steps.step(state, frozen, batch)`.

    `step`, `free_channel` and `fitted_state` donate the state that they are given, and `add_labels` the sums. The
    functions take the arguments of the methods of `RetrofitStep` with the same names (`step` those of `update`, and
    `fit` those of `fisher_init.fit`).
    """

    math: RetrofitStep
    abstract_state: TrainState  # shapes and shardings of the state
    abstract_labels: LabelSums
    step: OnMesh
    free_channel: OnMesh
    no_labels: OnMesh
    add_labels: OnMesh
    fit: OnMesh
    fitted_state: OnMesh
    dense_hidden: OnMesh
    evaluate: OnMesh
    evaluate_budgeted: OnMesh
    scores: OnMesh
    evaluate_streaming_llm: OnMesh
    finite_gradients: OnMesh

    def initial_state(self, trainable: Params) -> TrainState:
        """Make the state before the first step.

        It may share buffers with `trainable`, which the first step then donates.
        """
        shardings = jax.tree.map(lambda x: x.sharding, self.abstract_state)
        # Master weights are fp32 for any compute dtype, because bf16 weights would lose updates of this size.
        master = jax.jit(
            lambda params: {name: array.astype(jnp.float32) for name, array in params.items()},
            out_shardings=shardings.trainable,
        )(trainable)
        init = jax.jit(self.math.tx.init, out_shardings=shardings.opt_state)
        threshold = shardings.threshold and jax.device_put(jnp.zeros((), jnp.float32), shardings.threshold)
        return TrainState(jax.device_put(jnp.zeros((), jnp.int32), shardings.step), master, init(master), threshold)

    def lower(self, frozen: Params, batch_size: int) -> jax.stages.Lowered:
        """Lower the step for a batch of `batch_size` rows, for example to compile it and read its memory."""
        batch = abstract_batch(batch_size, self.math.config.length, self.math.mesh)
        return self.step.lower(self.abstract_state, frozen, batch)

    def lower_labels(self, frozen: Params, rows: int) -> jax.stages.Lowered:
        """Lower `add_labels` for `rows` rows at a time."""
        batch = abstract_batch(rows, self.math.config.length, self.math.mesh)
        return self.add_labels.lower(self.abstract_labels, self.abstract_state, frozen, batch)


def step_functions(math: RetrofitStep, trainable: Params) -> StepFunctions:
    """Make the functions of `math`, each compiled on its first call. Only names and shapes of `trainable` are used."""
    mesh, replicated = math.mesh, NamedSharding(math.mesh, P())
    masters = {name: jax.ShapeDtypeStruct(array.shape, jnp.float32) for name, array in trainable.items()}
    opt_state = jax.eval_shape(math.tx.init, masters)
    where = math.student.shardings(list(trainable), mesh)
    holds = math.config.holds_ratio_by_threshold
    # `_make` because these states hold shardings and shapes instead of arrays.
    opt_shardings = optimizer_shardings(math.tx, opt_state, where, mesh)
    shardings = TrainState._make([replicated, where, opt_shardings, replicated if holds else None])
    step, threshold = jax.ShapeDtypeStruct((), jnp.int32), jax.ShapeDtypeStruct((), jnp.float32)
    abstract_state = jax.tree.map(
        lambda array, sharding: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding),
        TrainState._make([step, masters, opt_state, threshold if holds else None]),
        shardings,
    )

    # A sum is sharded by its first axis of D, as the weights are.
    def sharded(x):
        sharding = named_sharding(("layers", "embed", None)[: x.ndim], x.shape, mesh)
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    abstract_labels = jax.tree.map(sharded, jax.eval_shape(math.no_labels))
    sums = jax.tree.map(lambda x: x.sharding, abstract_labels)
    return StepFunctions(
        math=math,
        abstract_state=abstract_state,
        abstract_labels=abstract_labels,
        step=OnMesh(math.update, mesh, (shardings, replicated), donate=(0,)),
        free_channel=OnMesh(math.free_channel, mesh, shardings, donate=(0,)),
        no_labels=OnMesh(math.no_labels, mesh, sums),
        add_labels=OnMesh(math.add_labels, mesh, (sums, None), donate=(0,)),
        fit=OnMesh(fit, mesh, replicated),
        fitted_state=OnMesh(math.fitted_state, mesh, shardings, donate=(0,)),
        dense_hidden=OnMesh(math.dense_hidden, mesh, None),
        evaluate=OnMesh(math.evaluate, mesh, replicated),
        evaluate_budgeted=OnMesh(math.evaluate_budgeted, mesh, replicated),
        scores=OnMesh(math.scores, mesh, replicated),
        evaluate_streaming_llm=OnMesh(math.evaluate_streaming_llm, mesh, replicated, static=(2,)),
        finite_gradients=OnMesh(math.finite_gradients, mesh, replicated),
    )
