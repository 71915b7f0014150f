"""Sampling against its definition, and the independence of rows from their neighbors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dms_jax.core.sampling import SamplingMode, SamplingNumbers, allowed, penalize, sample, token_logprobs

SAMPLES = SamplingMode(greedy=False, sorts=True)


def keys(*seeds):
    return jax.vmap(jax.random.key)(np.array(seeds, np.uint32))


def kept(logits, **numbers):
    return np.flatnonzero(
        np.asarray(allowed(jnp.asarray([logits], jnp.float32), SamplingNumbers(**numbers), True))[0]
    ).tolist()


@pytest.mark.parametrize(
    "numbers, tokens",
    [
        ({}, [0, 1, 2, 3]),
        ({"top_k": 2}, [0, 1]),
        ({"top_k": 99}, [0, 1, 2, 3]),
        ({"top_p": 0.4}, [0]),  # the likeliest token alone reaches it
        ({"top_p": 0.75}, [0, 1]),
        ({"top_p": 0.81}, [0, 1, 2]),
        ({"top_p": 1e-9}, [0]),
        ({"min_p": 0.45}, [0, 1]),
        ({"top_k": 3, "top_p": 0.85}, [0, 1]),  # top-k leaves a mass of 0.9, of which 0.5 + 0.3 reach 0.85
    ],
)
def test_allowed_tokens_after_top_k_top_p_and_min_p(numbers, tokens):
    assert kept(np.log([0.5, 0.3, 0.1, 0.1 - 1e-3]), **numbers) == tokens


def test_sampled_frequencies_are_the_probabilities():
    p = np.array([0.5, 0.3, 0.15, 0.05])
    logits = jnp.tile(jnp.log(jnp.asarray(p, jnp.float32)), (20000, 1))
    mode, many = SamplingMode(greedy=False), jax.random.split(jax.random.key(1), 20000)
    drawn = np.bincount(np.asarray(sample(logits, many, None, SamplingNumbers(), mode)), minlength=4) / 20000
    np.testing.assert_allclose(drawn, p, atol=0.015)
    colder = (
        np.bincount(np.asarray(sample(logits, many, None, SamplingNumbers(temperature=0.5), mode)), minlength=4) / 20000
    )
    np.testing.assert_allclose(colder, p**2 / (p**2).sum(), atol=0.015)


def test_row_draws_the_same_token_in_any_batch(rng):
    logits = jnp.asarray(rng.normal(size=(3, 50)) * 2, jnp.float32)
    numbers = SamplingNumbers(top_k=20, top_p=0.9)
    for seeds in ([1, 2, 3], [4, 5, 6]):
        together = np.asarray(sample(logits, keys(*seeds), None, numbers, SAMPLES))
        order = np.array([2, 0, 1])
        np.testing.assert_array_equal(
            sample(logits[order], keys(*np.array(seeds)[order]), None, numbers, SAMPLES), together[order]
        )
        assert int(sample(logits[1:2], keys(seeds[1]), None, numbers, SAMPLES)[0]) == together[1]


def test_greedy_takes_the_best_after_the_penalty():
    logits, used = jnp.asarray([[3.0, 2.0, -1.0]]), jnp.asarray([[True, False, True]])
    np.testing.assert_allclose(penalize(logits, used, 2.0), [[1.5, 2.0, -2.0]])
    assert int(sample(logits, keys(0), None, SamplingNumbers(), SamplingMode())[0]) == 0
    assert (
        int(sample(logits, keys(0), used, SamplingNumbers(repetition_penalty=2.0), SamplingMode(penalizes=True))[0])
        == 1
    )


def test_logprobs_are_the_log_softmax_of_the_logits(rng):
    logits = jnp.asarray(rng.normal(size=(2, 9)), jnp.float32)
    want = np.log(np.exp(logits) / np.exp(logits).sum(-1, keepdims=True))
    np.testing.assert_allclose(
        token_logprobs(logits, jnp.asarray([4, 0], jnp.int32)), [want[0, 4], want[1, 0]], atol=1e-6
    )


@pytest.mark.parametrize("temperature", [1e-8, 1e-30, 1e-37, 1e-38, 1e-40, 1e-46, 1e-320, 0.0])
@pytest.mark.parametrize("scale", [1.0, 1e-3, 1e4])
def test_small_temperatures_are_greedy(temperature, scale):
    """fp32 cannot divide by less than 1e-38: a denormal number counts as 0."""
    logits = jnp.tile(jnp.asarray([[1.0, 5.0, 2.0, -3.0]]) * scale, (8, 1))
    drawn = sample(
        logits, keys(*range(8)), None, SamplingNumbers(jnp.float32(temperature)), SamplingMode(False, False, False)
    )
    assert drawn.tolist() == [1] * 8


@pytest.mark.parametrize(
    ("penalty", "used", "want"),
    [(1e-300, 1, 1), (1e-46, 0, 0), (1e-46, 2, 2), (3e38, 1, 2), (np.inf, 1, 2), (np.inf, 3, 1), (1e-300, 3, 1)],
)
def test_extreme_penalties_stay_finite(penalty, used, want):
    """A tiny penalty lifts a used token with a positive logit above all others, and a huge one sinks it."""
    logits = jnp.asarray([[1.0, 5.0, 2.0, -3.0, 0.0]])
    mask, penalty = jnp.arange(5)[None] == used, jnp.float32(penalty)
    assert np.isfinite(penalize(logits, mask, penalty)).all()
    mode = SamplingMode(penalizes=True)
    assert int(sample(logits, keys(0), mask, SamplingNumbers(repetition_penalty=penalty), mode)[0]) == want
    all_used = jnp.ones((1, 5), bool)
    assert np.isfinite(penalize(logits * 1e30, all_used, penalty)).all()
