"""The hidden units of an evict head (`dms.head_units`), fitted to what the linear solution leaves over.

The linear solution predicts what a pair is worth from the features u of its deciding token. Hidden units add
silu(u W + b) V to the prediction. AdamW fits them layer by layer to the same loss, `gamma_regression.deviance`. Begin
with `fit_layer`.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Float

from dms_jax.axes import Array
from dms_jax.training.gamma_regression import Moments, Pairs, deviance, moments

EPOCHS = 24  # at most
PATIENCE = 4  # epochs without a lower loss of the held-out pairs, after which the fit of a layer ends
BATCH = 512  # pairs
RATE, FINAL_RATE = 1e-3, 0.02  # of AdamW: the first one, and the last one as a fraction of it
DECAY = 0.1


class Units(NamedTuple):
    """The hidden units of one layer."""

    weights: Float[Array, "D U"]
    bias: Float[Array, "U"]
    out: Float[Array, "U K"]


class LayerFit(NamedTuple):
    """The result of the fit of one layer."""

    units: Units
    before: float  # loss of the held-out pairs without hidden units
    after: float
    moments: Moments  # of the predictions


def predicted(units: Units, value: Float[Array, "D K"], features: Float[Array, "n D"]) -> Float[Array, "n K"]:
    """Return the linear prediction of features plus that of the hidden units."""
    u = features.astype(jnp.float32)
    return u @ value + jax.nn.silu(u @ units.weights + units.bias[None]) @ units.out


def fit_layer(
    train: Pairs, held_out: Pairs, value: Float[Array, "D K"], offset: Float[Array, ""], start: Units, key: Array
) -> LayerFit:
    """Fit the hidden units of one layer; return those of the epoch with the lowest loss of the held-out pairs.

    `value` is the linear solution, and `offset` adds to the predictions. Units that never lower that loss are returned
    as they are in `start`. The result is a function of the arguments.
    """
    train, held_out = (jax.tree.map(jnp.asarray, pairs).scaled() for pairs in (train, held_out))
    num_steps = EPOCHS * max(1, len(train.labels) // BATCH)
    units, opt_state = start, _optimizer(num_steps).init(start)
    before = best = float(_loss(units, held_out, value, offset))
    kept, waited = start, 0
    for epoch in range(EPOCHS):
        order = jax.random.fold_in(key, epoch)
        units, opt_state = _epoch(units, opt_state, train, value, offset, order, num_steps=num_steps)
        now = float(_loss(units, held_out, value, offset))
        if now < best:
            best, kept, waited = now, units, 0
        elif (waited := waited + 1) == PATIENCE:
            break
    return LayerFit(kept, before, best, _moments(train, value, kept))


def _optimizer(num_steps: int) -> optax.GradientTransformation:
    return optax.adamw(optax.cosine_decay_schedule(RATE, num_steps, FINAL_RATE), weight_decay=DECAY)


@jax.jit
def _loss(units: Units, pairs: Pairs, value: Array, offset: Array) -> Array:
    return deviance(predicted(units, value, pairs.features) + offset, pairs.labels, pairs.weight)


@partial(jax.jit, static_argnames="num_steps")
def _epoch(
    units: Units, opt_state: Any, train: Pairs, value: Array, offset: Array, key: Array, *, num_steps: int
) -> tuple[Units, Any]:
    """Run one epoch of `num_steps`, the number of steps of all of them, over the pairs in a random order."""
    optimizer, steps = _optimizer(num_steps), num_steps // EPOCHS
    order = jax.random.permutation(key, len(train.labels))
    order = order[: steps * min(BATCH, len(order))].reshape(steps, -1)

    def step(carry, at):
        units, opt_state = carry
        gradient = jax.grad(_loss)(units, jax.tree.map(lambda x: x[at], train), value, offset)
        with jax.numpy_dtype_promotion("standard"):  # optax mixes floats with the step, an integer
            updates, opt_state = optimizer.update(gradient, opt_state, units)
        return (optax.apply_updates(units, updates), opt_state), None

    return jax.lax.scan(step, (units, opt_state), order)[0]


@jax.jit
def _moments(pairs: Pairs, value: Array, units: Units) -> Moments:
    return moments(predicted(units, value, pairs.features), pairs.weight[:, None] / jnp.sum(pairs.weight))
