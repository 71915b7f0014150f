"""The linear fit to what pairs are worth: its loss, its minimum, and what a regression of logarithms gets wrong."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize

from dms_jax.errors import ConfigError
from dms_jax.training import gamma_regression
from dms_jax.training.fisher_init import FittedHead
from dms_jax.training.gamma_regression import MAX_RATIO, Pairs, common_offset, deviance, log_mean_ratio, refine
from dms_jax.training.head_fit import refined

SIZE, HEADS = 5, 2


def pairs(rng, value, count=4096, offset=-3.0):
    """Pairs whose values scatter about exp(u @ value + offset) like squares of normal numbers."""
    u = rng.normal(size=(count, SIZE)).astype(np.float16)
    labels = np.exp(u.astype(np.float64) @ value + offset) * rng.normal(size=(count, HEADS)) ** 2
    return Pairs(u, labels.astype(np.float32), np.where(np.arange(count) < 9, 5.0, 1.0).astype(np.float32))


def test_deviance_is_that_of_the_gamma_distribution_with_a_slow_tail(rng):
    prediction, weight = rng.normal(size=(50, HEADS)).astype(np.float32), rng.random(50).astype(np.float32)
    ratio = rng.uniform(0.01, 4 * MAX_RATIO, (50, HEADS))
    labels = (ratio * np.exp(prediction)).astype(np.float32)
    of_ratio = [[r if r <= MAX_RATIO else MAX_RATIO * (1 + np.log(r / MAX_RATIO)) for r in row] for row in ratio]
    want = np.mean(weight[:, None] * (prediction + np.array(of_ratio)))
    np.testing.assert_allclose(deviance(prediction, labels, weight), want, rtol=1e-4)
    # Its slope in the prediction is 1 - min(ratio, MAX_RATIO), whose mean is 0 where exp(prediction) is the mean label.
    slope = jax.grad(lambda p: deviance(p, labels, np.ones(50, np.float32)))(prediction) * 50 * HEADS
    np.testing.assert_allclose(slope, 1 - np.minimum(ratio, MAX_RATIO), rtol=1e-3, atol=1e-3)


def test_rounds_end_at_the_minimum_of_the_deviance(rng, monkeypatch):
    """With many rounds, no damping and any ridge, the result is what a general minimizer finds in fp64."""
    monkeypatch.setattr(gamma_regression, "ROUNDS", 200)
    truth = rng.normal(size=(SIZE, HEADS)) * 0.5
    data, offset = pairs(rng, truth), np.float32(-3.2)
    u, labels, weight = (np.asarray(x, np.float64) for x in data)

    def loss(flat):
        m = u @ flat.reshape(SIZE, HEADS) + offset
        ratio = labels * np.exp(-m)
        tail = MAX_RATIO * (1 + np.log(np.maximum(ratio, MAX_RATIO) / MAX_RATIO))
        value = np.mean(weight[:, None] * (m + np.where(ratio <= MAX_RATIO, ratio, tail)))
        slope = u.T @ (weight[:, None] * (1 - np.minimum(ratio, MAX_RATIO))) / labels.size
        return value, slope.ravel()

    found = scipy.optimize.minimize(loss, np.zeros(SIZE * HEADS), jac=True, options={"gtol": 1e-9})
    jax.clear_caches()
    value, (mean, square) = refine(data, np.zeros((SIZE, HEADS), np.float32), offset)
    jax.clear_caches()
    np.testing.assert_allclose(value, found.x.reshape(SIZE, HEADS), atol=1e-4)
    np.testing.assert_allclose(value, truth, atol=0.15)
    prediction = u @ np.asarray(value)
    np.testing.assert_allclose(mean, np.average(prediction.mean(1), weights=weight), atol=1e-5)
    np.testing.assert_allclose(square, np.average((prediction**2).mean(1), weights=weight), rtol=1e-4)


def test_refined_head_ranks_by_the_mean_and_not_by_the_mean_logarithm(rng):
    """One feature marks pairs that are rarely worth much, but then a lot: their mean is high, their mean log is low."""
    count = 20000
    rare = rng.random(count) < 0.5
    u = np.stack([np.ones(count), rare], axis=1).astype(np.float16)
    high = np.where(rng.random(count) < 0.4, 6.0, 0.1)
    labels = np.where(rare, high, 1.0).astype(np.float32)[:, None] * np.float32(1e-3)
    data = Pairs(u, labels, np.ones(count, np.float32))
    start = np.linalg.lstsq(u.astype(np.float32), np.log(labels / 1e-3), rcond=None)[0]
    offset = common_offset([float(log_mean_ratio(data, start))])
    value = np.asarray(refine(data, start, offset)[0])
    assert start[1, 0] < -0.5
    # Six damped rounds go most of the way to log(0.4 * 6 + 0.6 * 0.1).
    assert 0.5 < value[1, 0] < np.log(0.4 * 6 + 0.6 * 0.1) + 0.1


def test_values_of_zero_and_huge_ones_leave_the_fit_finite(rng):
    data = pairs(rng, np.zeros((SIZE, HEADS)))
    labels = np.array(data.labels)
    labels[:100], labels[100] = 0.0, 1e30
    value, moments = refine(data._replace(labels=labels), np.zeros((SIZE, HEADS), np.float32), np.float32(-3))
    assert np.isfinite(value).all() and np.isfinite(moments).all() and float(jnp.abs(value).max()) < 1


def test_fit_that_is_not_finite_is_refused(rng):
    data, value = pairs(rng, np.zeros((SIZE, HEADS)), 64), np.zeros((1, SIZE, HEADS), np.float32)
    head = FittedHead(value, np.zeros((1, SIZE), np.float32), np.float32(0), np.float32(1))
    assert np.isfinite(refined(head, lambda layer: data)[0].deviation)
    with pytest.raises(ConfigError, match="not finite; use more label_rows"):
        refined(head, lambda layer: data._replace(features=np.full_like(data.features, np.nan)))
