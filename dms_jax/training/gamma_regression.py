"""The evict head fitted to what pairs are worth, rather than to the logarithm of it.

Pairs that look alike to the head have values y that scatter like squares of normal numbers. The mean of log y is then
not the logarithm of their mean, which is what evicting them costs. The prediction m of a pair therefore gets the
deviance of the gamma distribution, m + y exp(-m), whose expectation is smallest where exp(m) is the mean of y. Small
noisy values need no floor.

The unit of m stays the same in all layers, because the offset between m and a linear prediction is one number for all
of them. `refine` improves the ridge regression of `fisher_init` in this sense; `mlp_head` fits hidden units by it.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from dms_jax.axes import Array, typed

ROUNDS = 6  # more begin to chase the noise of the labels
STEP = 0.5  # of the way of each round
RIDGE = 0.15  # relative to the mean eigenvalue of the feature products
MAX_RATIO = 60.0  # of a value to its prediction; larger ones pull no harder, and the loss grows like their logarithm


class Pairs(NamedTuple):
    """Pairs of one layer, n of them, each with the features of the token that decides about it."""

    features: Float[Array, "n D"]  # fp16
    labels: Float[Array, "n K"]  # nats per query
    weight: Float[Array, "n"]

    def scaled(self) -> "Pairs":
        """Return the pairs with weights whose mean is 1."""
        return self._replace(weight=self.weight / jnp.mean(self.weight))


class Moments(NamedTuple):
    """Weighted means of the predictions of one layer and of their squares, over pairs and heads."""

    mean: Float[Array, ""]
    square: Float[Array, ""]


@typed
def deviance(
    prediction: Float[Array, "n K"], labels: Float[Array, "n K"], weight: Float[Array, "n"]
) -> Float[Array, ""]:
    """Return the weighted mean of the gamma deviance of labels whose mean is predicted as exp(prediction)."""
    ratio = labels * jnp.exp(-prediction)
    beyond = MAX_RATIO * (1 + jnp.log(jnp.maximum(ratio, MAX_RATIO) / MAX_RATIO))
    return jnp.mean(weight[:, None] * (prediction + jnp.where(ratio <= MAX_RATIO, ratio, beyond)))


@jax.jit
def log_mean_ratio(pairs: Pairs, value: Float[Array, "D K"]) -> Float[Array, ""]:
    """Return the logarithm of the mean of the labels over exp(linear prediction) of one layer."""
    log_ratio = jnp.log(pairs.labels) - pairs.features.astype(jnp.float32) @ value
    return jax.nn.logsumexp(log_ratio) - jnp.log(log_ratio.size)


def common_offset(ratios: Sequence[float]) -> Float[Array, ""]:
    """Return what to add to the predictions of all layers, given the `log_mean_ratio` of each."""
    with np.errstate(invalid="ignore"):  # the caller refuses predictions that are not finite
        return np.array(np.logaddexp.reduce(ratios) - np.log(len(ratios)), np.float32)


@jax.jit
def refine(pairs: Pairs, value: Float[Array, "D K"], offset: Float[Array, ""]) -> tuple[Float[Array, "D K"], Moments]:
    """Move the linear solution of one layer towards the smallest deviance, by damped rounds of Fisher's scoring.

    Args:
      value: the ridge regression (`FittedHead.value`). `offset` adds to its predictions.

    The curvature of the deviance in expectation is that of a regression, whatever the prediction, so its matrix is
    factored once. Few rounds from the ridge regression are a regularization, too.

    Returns:
      the linear map, and the moments of its predictions.
    """
    u, weight = pairs.features.astype(jnp.float32), (pairs.weight / jnp.sum(pairs.weight))[:, None]
    size = u.shape[1]
    with jax.default_matmul_precision("highest"):
        products = (u * weight).T @ u
        factor = jax.scipy.linalg.cho_factor(products + RIDGE * jnp.trace(products) / size * jnp.eye(size))
        log_labels = jnp.log(pairs.labels)  # -inf for a value of 0, whose ratio is 0

        def one_round(_, value):
            ratio = jnp.exp(jnp.minimum(log_labels - (u @ value + offset), jnp.log(MAX_RATIO)))
            return value + STEP * jax.scipy.linalg.cho_solve(factor, u.T @ (weight * (ratio - 1)))

        value = jax.lax.fori_loop(0, ROUNDS, one_round, value)
    return value, moments(u @ value, weight)


def moments(prediction: Float[Array, "n K"], weight: Float[Array, "n 1"]) -> Moments:
    """Return the moments of predictions under weights whose sum is 1."""
    of = lambda x: jnp.mean(jnp.sum(weight * x, axis=0))
    return Moments(of(prediction), of(prediction**2))
