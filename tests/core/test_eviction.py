"""Eviction gates: their noise, straight-through gradients, and the alignment of decisions to pairs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dms_jax.core import eviction
from dms_jax.sharding import make_mesh, named_sharding


def noise(examples, step=3, layers=2, length=50, seed=7):
    return eviction.logistic_noise(seed, step, jnp.asarray(examples), layers, 2, length)


def test_noise_depends_on_the_example_and_not_on_the_batch():
    whole = noise([4, 5, 6, 7])
    np.testing.assert_array_equal(whole[:, 2:], noise([6, 7]))
    np.testing.assert_array_equal(whole[:1], noise([4, 5, 6, 7], layers=1))
    for other in (noise([4, 5, 6, 7], step=4), noise([4, 5, 6, 7], seed=8)):
        assert not np.any(np.asarray(other) == np.asarray(whole))
    assert not np.any(np.asarray(whole[0]) == np.asarray(whole[1])) and not np.any(
        np.asarray(whole[:, 0]) == np.asarray(whole[:, 1])
    )


def test_noise_is_logistic():
    x = np.asarray(noise(range(40), length=1000)).ravel()
    assert abs(x.mean()) < 0.02 and abs(x.var() / (np.pi**2 / 3) - 1) < 0.02
    for logit in (-2.0, 0.0, 1.0):  # P(evict | logit) = sigmoid(logit)
        assert abs((logit + x > 0).mean() - 1 / (1 + np.exp(-logit))) < 0.005


def test_straight_through_is_hard_forward_and_soft_backward():
    z = jnp.array([-3.0, -0.1, 0.1, 5.0, -1e5, 1e5])
    np.testing.assert_array_equal(eviction.straight_through(z), [0, 0, 1, 1, 0, 1])
    soft = jax.nn.sigmoid(z)
    np.testing.assert_allclose(jax.grad(lambda z: eviction.straight_through(z).sum())(z), soft * (1 - soft), rtol=1e-6)


@pytest.mark.parametrize("z", [1e5, -1e5, 0.0])
def test_log_keep_has_finite_value_and_gradient(z):
    value, gradient = jax.value_and_grad(lambda z: eviction.log_keep(jnp.full((1, 1, 1), z)).sum())(z)
    np.testing.assert_allclose([value, gradient], [-np.logaddexp(0, z), -float(jax.nn.sigmoid(z))], rtol=1e-6)


def test_decisions_are_aligned_to_pairs_and_shared_by_heads():
    decisions = jnp.array([[[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]])
    np.testing.assert_array_equal(eviction.align_to_pairs(decisions, 1, -9.0), [[[2, 3, -9], [5, 6, -9]]])
    np.testing.assert_array_equal(eviction.align_to_pairs(decisions, 0, -9.0), decisions)
    np.testing.assert_array_equal(eviction.share_heads(decisions, "layer"), [[[1, 2, 3], [1, 2, 3]]])
    np.testing.assert_array_equal(eviction.share_heads(decisions, "head"), decisions)


@pytest.mark.parametrize("mesh", [None, (4, 2), (2, 2, 2)])
def test_threshold_is_the_next_logit_of_the_sorted_ones(mesh):
    rng = np.random.default_rng(0)
    x = rng.normal(scale=4.0, size=(3, 8, 4, 16)).astype(np.float32)
    x[0, :, 1] = np.float32(-5.0)  # ties
    x[1, :, :, 3:6] = 0.0
    x[2, 0, 0] = [1e38, -1e38, 1e-42, -1e-42, *rng.normal(size=12)]
    x[..., 12:] = -np.inf  # tokens that do not count
    descending, count = np.sort(x[..., :12], axis=None)[::-1], x[..., :12].size
    placed, run = x, jax.jit(eviction.threshold_at)
    if mesh is not None:
        grid = make_mesh(*mesh)
        placed = jax.device_put(x, named_sharding(("layers", "batch", "kv_heads", "length"), x.shape, grid))
    for number in (0, 1, 7.9, count // 3, 0.6 * count, count - 1):
        found = float(run(placed, jnp.float32(number)))
        assert found == descending[int(number)]
        assert np.sum(x > found) <= number < np.sum(x >= found)


def test_untrained_evict_head_keeps_everything():
    np.testing.assert_array_equal(eviction.evict_logits(jnp.zeros(3), 100.0, 5.0), [-5.0] * 3)
    np.testing.assert_allclose(eviction.evict_logits(jnp.array([0.06, 0.04]), 100.0, 5.0), [1.0, -1.0], rtol=1e-5)
