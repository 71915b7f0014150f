"""The fit of hidden units against closed forms, on labels that a linear head cannot and can predict."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dms_jax.training import mlp_head
from dms_jax.training.gamma_regression import Pairs, common_offset, log_mean_ratio
from dms_jax.training.mlp_head import Units, fit_layer

SIZE, UNITS, HEADS = 8, 16, 2


def start():
    weights = jax.random.normal(jax.random.key(0), (SIZE, UNITS)) * SIZE**-0.5
    return Units(weights, jnp.zeros(UNITS), jnp.zeros((UNITS, HEADS)))


def pairs(seed, log_value, count):
    """Pairs whose values are exponentially distributed about exp(log_value(u)), like squares of derivatives."""
    rng = np.random.default_rng(seed)
    u = rng.normal(size=(count, SIZE)).astype(np.float16)
    mean = np.exp(log_value(u.astype(np.float32)))
    return Pairs(u, (mean * rng.exponential(size=mean.shape)).astype(np.float32), np.ones(count, np.float32))


def linear(u):
    return np.stack([u[:, 0] - 0.5 * u[:, 1], 0.7 * u[:, 2]], axis=1) - 3


def bent(u):
    return linear(u) + 1.5 * np.abs(u[:, 3:4])


VALUE = np.zeros((SIZE, HEADS), np.float32)
VALUE[[0, 1, 2], [0, 0, 1]] = 1, -0.5, 0.7  # the linear part of both


def fitted(log_value, seed=5, count=6144):
    train, held_out = pairs(1, log_value, count), pairs(2, log_value, 2048)
    offset = common_offset([float(log_mean_ratio(train, VALUE))])
    return fit_layer(train, held_out, VALUE, offset, start(), jax.random.key(seed)), offset


def test_fit_predicts_what_a_linear_head_cannot():
    found, offset = fitted(bent, count=20480)
    u = pairs(3, bent, 4000).features
    predict = lambda units: np.asarray(mlp_head.predicted(units, VALUE, u)) + offset
    error = lambda units: np.std(predict(units) - bent(u.astype(np.float32)))
    assert found.after < found.before - 0.4
    assert error(found.units) < 0.45 * error(start()), (error(found.units), error(start()))
    # Mean and deviation of the predictions decide which logits evict.
    prediction = np.asarray(mlp_head.predicted(found.units, VALUE, pairs(1, bent, 20480).features))
    np.testing.assert_allclose(found.moments, [prediction.mean(), (prediction**2).mean()], rtol=1e-4)


def test_fit_leaves_a_linear_label_as_it_is():
    """Early stopping keeps the units where they help the held-out pairs, which noise alone never makes them do much."""
    found, _ = fitted(linear)
    assert 0 <= found.before - found.after < 0.005
    u = pairs(3, linear, 4000).features
    moved = np.asarray(mlp_head.predicted(found.units, np.zeros_like(VALUE), u))
    assert np.std(moved) < 0.1


def test_fit_is_a_function_of_its_arguments_and_units_that_never_help_stay_as_they_were():
    one, same, other = (fitted(bent, seed, 1024)[0] for seed in (5, 5, 6))
    for a, b, c in zip(one.units, same.units, other.units, strict=True):
        np.testing.assert_array_equal(a, b)
        assert not np.array_equal(a, c)
    # Values of held-out pairs that shrink where those of the others grow.
    wrong = fit_layer(
        pairs(1, bent, 1024), pairs(2, lambda u: -bent(u), 512), VALUE, np.float32(0), start(), jax.random.key(0)
    )
    assert wrong.after <= wrong.before
    for a, b in zip(wrong.units, start(), strict=True):
        np.testing.assert_array_equal(a, b)


def test_weights_count_pairs_and_their_scale_does_not_matter():
    """A pair of weight 3 counts like three pairs, and equal pairs get equal units for any common weight."""
    some, few = pairs(1, bent, 512), pairs(2, bent, 64)
    weight = np.where(np.arange(64) < 16, 3.0, 1.0).astype(np.float32)
    thrice = Pairs(*(np.concatenate([x, x[:16], x[:16]]) for x in few[:2]), np.ones(96, np.float32))
    fit = lambda held_out: fit_layer(some, held_out, VALUE, np.float32(0), start(), jax.random.key(0))
    heavy, repeated = fit(few._replace(weight=7 * weight)), fit(thrice)
    assert heavy.before == pytest.approx(repeated.before, rel=1e-5)
    scaled = fit_layer(some._replace(weight=some.weight * 50), few, VALUE, np.float32(0), start(), jax.random.key(0))
    plain = fit_layer(some, few, VALUE, np.float32(0), start(), jax.random.key(0))
    np.testing.assert_array_equal(scaled.units.out, plain.units.out)
