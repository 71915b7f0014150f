"""The hidden units of an evict head (`dms.head_units`), fitted to what the linear solution leaves over.

The closed form of `fisher_init` predicts the logarithm of what a pair is worth from the features u of its deciding
token. Hidden units add silu(u W + b) V to the prediction m. They are fitted layer by layer with AdamW to the values
themselves: a value y has the gamma deviance m + y exp(-m), whose expectation is smallest where exp(m) is the mean of y.
Unlike a regression of log y, it needs no floor against the noise of small values. The unit of m stays the same in all
layers, because the offset between m and the linear prediction is one number for all of them. Begin with `fit_layer`.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Float

from dms_jax.axes import Array, typed

EPOCHS = 24  # at most
PATIENCE = 4  # epochs without a lower loss of the held-out pairs, after which the fit of a layer ends
BATCH = 512  # pairs
RATE, FINAL_RATE = 1e-3, 0.02  # of AdamW: the first one, and the last one as a fraction of it
DECAY = 0.1
MAX_RATIO = 8.0  # of a value to its prediction; the loss grows like the logarithm beyond it, so that outliers pull less


class Units(NamedTuple):
    """The hidden units of one layer."""

    weights: Float[Array, "D U"]
    bias: Float[Array, "U"]
    out: Float[Array, "U K"]


class HiddenUnits(NamedTuple):
    """The fitted hidden units of all layers, and the distribution of the predictions that they are part of."""

    weights: Float[Array, "L D U"]
    bias: Float[Array, "L U"]
    out: Float[Array, "L U K"]  # adds to the predictions
    mean: Float[Array, ""]  # of the predictions, over pairs, heads and layers
    deviation: Float[Array, ""]  # their standard deviation


class Pairs(NamedTuple):
    """Pairs of one layer, n of them, each with the features of the token that decides about it."""

    features: Float[Array, "n D"]  # fp16
    labels: Float[Array, "n K"]  # nats per query
    weight: Float[Array, "n"]

    def scaled(self) -> "Pairs":
        """Return the pairs with weights whose mean is 1."""
        return self._replace(weight=self.weight / jnp.mean(self.weight))


class LayerFit(NamedTuple):
    """The result of the fit of one layer."""

    units: Units
    before: float  # loss of the held-out pairs without hidden units
    after: float
    mean: float  # of the predictions
    square: float  # mean of their squares


@typed
def deviance(
    prediction: Float[Array, "n K"], labels: Float[Array, "n K"], weight: Float[Array, "n"]
) -> Float[Array, ""]:
    """Return the weighted mean of the gamma deviance of labels whose mean is predicted as exp(prediction)."""
    ratio = labels * jnp.exp(-prediction)
    beyond = MAX_RATIO * (1 + jnp.log(jnp.maximum(ratio, MAX_RATIO) / MAX_RATIO))
    return jnp.mean(weight[:, None] * (prediction + jnp.where(ratio <= MAX_RATIO, ratio, beyond)))


def predicted(units: Units, value: Float[Array, "D K"], features: Float[Array, "n D"]) -> Float[Array, "n K"]:
    """Return the linear prediction of features plus that of the hidden units."""
    u = features.astype(jnp.float32)
    return u @ value + jax.nn.silu(u @ units.weights + units.bias[None]) @ units.out


def common_offset(ratios: Sequence[float]) -> Float[Array, ""]:
    """Return what to add to the predictions of all layers, given the `mean_ratio` of each."""
    return np.array(np.log(np.mean(ratios)), np.float32)


@jax.jit
def mean_ratio(pairs: Pairs, value: Float[Array, "D K"]) -> Float[Array, ""]:
    """Return the mean of the labels over exp(linear prediction) of one layer."""
    return jnp.mean(pairs.labels * jnp.exp(-(pairs.features.astype(jnp.float32) @ value)))


def fit_layer(
    train: Pairs, held_out: Pairs, value: Float[Array, "D K"], offset: Float[Array, ""], start: Units, key: Array
) -> LayerFit:
    """Fit the hidden units of one layer; return those of the epoch with the lowest loss of the held-out pairs.

    `value` is the linear solution (`FittedHead.value`), and `offset` adds to the predictions. Units that never lower
    that loss are returned as they are in `start`. The result is a function of the arguments.
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
    mean, square = map(float, _moments(train, value, kept))
    return LayerFit(kept, before, best, mean, square)


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
def _moments(pairs: Pairs, value: Array, units: Units) -> Array:
    """Return the weighted means of the predictions and of their squares."""
    prediction, weight = predicted(units, value, pairs.features), pairs.weight[:, None]
    return jnp.stack([jnp.mean(weight * prediction), jnp.mean(weight * prediction**2)])


def stacked(fits: Sequence[LayerFit]) -> HiddenUnits:
    """Join the fits of all layers."""
    parts = (
        np.stack([np.asarray(part) for part in of_layers]) for of_layers in zip(*(f.units for f in fits), strict=True)
    )
    mean, square = np.mean([f.mean for f in fits]), np.mean([f.square for f in fits])
    weights, bias, out = parts
    return HiddenUnits(weights, bias, out, *np.array([mean, np.sqrt(square - mean**2)], np.float32))
