"""Losses against their textbook forms, and chunked losses against autodiff of the dense ones."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dms_jax
from dms_jax.core.eviction import decidable, live_counts
from dms_jax.core.losses import compression_loss, distill_sum, kl_student_teacher, kl_teacher_student, token_metrics


def problem(rng, batch=2, length=37, width=16, vocab=53):
    student, teacher = (jnp.asarray(rng.normal(size=(batch, length, width)), jnp.float32) for _ in "st")
    embedding, teacher_embedding = (jnp.asarray(rng.normal(size=(vocab, width)), jnp.float32) for _ in "st")
    return student, teacher, embedding, teacher_embedding, jnp.asarray(rng.random((batch, length)), jnp.float32)


def test_kl_directions_on_a_vocabulary_of_two_tokens():
    p, q = np.array([0.9, 0.1]), np.array([0.5, 0.5])
    student, teacher, mask = jnp.log(p)[None, None], jnp.log(q)[None, None], jnp.ones((1, 1), bool)
    np.testing.assert_allclose(dms_jax.kl_student_teacher(student, teacher, mask), np.sum(p * np.log(p / q)), rtol=1e-6)
    np.testing.assert_allclose(dms_jax.kl_teacher_student(student, teacher, mask), np.sum(q * np.log(q / p)), rtol=1e-6)


def test_kl_averages_over_the_mask_and_is_zero_for_an_empty_one():
    rng = np.random.default_rng(0)
    s, t = (jnp.asarray(rng.normal(size=(2, 5, 7)), jnp.float32) for _ in "st")
    mask = jnp.asarray(rng.random((2, 5)) < 0.5)
    expected = optax.losses.kl_divergence_with_log_targets(
        jax.nn.log_softmax(s), jax.nn.log_softmax(t)
    )  # KL(targets || predictions)
    np.testing.assert_allclose(kl_teacher_student(s, t, mask), np.asarray(expected)[np.asarray(mask)].mean(), rtol=1e-5)
    assert float(kl_student_teacher(s, t, jnp.zeros((2, 5), bool))) == 0.0
    assert float(kl_student_teacher(s, s, mask)) == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize(
    "order, dense", [("student_teacher", kl_student_teacher), ("teacher_student", kl_teacher_student)]
)
@pytest.mark.parametrize("chunk", [1, 8, 37, 64])
def test_chunked_distillation_equals_dense_distillation(rng, order, dense, chunk):
    student, teacher, embedding, teacher_embedding, weight = problem(rng)

    def reference(student, embedding):
        logits = jnp.einsum("btd,vd->btv", student, embedding), jnp.einsum("btd,vd->btv", teacher, teacher_embedding)
        ones = jnp.ones((1, 1), bool)
        per_token = jax.vmap(jax.vmap(lambda s, t: dense(s[None, None], t[None, None], ones)))(*logits)
        return jnp.sum(per_token * weight)

    def ours(student, embedding):
        return distill_sum(student, teacher, embedding, teacher_embedding, weight, order, chunk)

    expected, gradients = jax.value_and_grad(reference, argnums=(0, 1))(student, embedding)
    actual, ours_gradients = jax.value_and_grad(ours, argnums=(0, 1))(student, embedding)
    np.testing.assert_allclose(actual, expected, rtol=1e-5)
    for a, b in zip(ours_gradients, gradients, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
    only_hidden = jax.grad(ours)(student, embedding)  # an adapter retrofit does not train the embedding
    np.testing.assert_array_equal(only_hidden, ours_gradients[0])


def test_tied_embedding_gets_only_the_gradient_of_the_student(rng):
    student, teacher, embedding, _, weight = problem(rng)
    tied = jax.grad(lambda e: distill_sum(student, teacher, e, jax.lax.stop_gradient(e), weight))(embedding)
    separate = jax.grad(lambda e: distill_sum(student, teacher, e, embedding, weight))(embedding)
    np.testing.assert_allclose(tied, separate, rtol=1e-6)


def test_distillation_never_holds_all_logits(rng):
    def largest(length):
        student, teacher, embedding, _, weight = (
            jax.ShapeDtypeStruct(s, jnp.float32)
            for s in ((1, length, 16), (1, length, 16), (5000, 16), (1,), (1, length))
        )
        jaxpr = jax.make_jaxpr(jax.grad(lambda s, t, e, w: distill_sum(s, t, e, e, w), argnums=(0, 2)))(
            student, teacher, embedding, weight
        )
        return str(jaxpr).count(f"f32[1,{length},5000]"), str(jaxpr).count("f32[1,256,5000]")

    assert largest(4096)[0] == 0 and largest(4096)[1] > 0


def test_compression_loss_is_one_sided_and_global(rng):
    evict = jnp.asarray(rng.random((3, 2, 4, 10)) < 0.3, jnp.float32)
    mean = np.asarray(evict).mean(axis=(0, 2, 3))  # per example
    np.testing.assert_allclose(compression_loss(evict, 0.6), np.maximum(0, 0.6 - mean).mean(), rtol=1e-6)
    assert float(compression_loss(evict, 0.05)) == 0.0 and np.all(
        np.asarray(jax.grad(compression_loss)(evict, 0.05)) == 0
    )
    np.testing.assert_allclose(jax.grad(compression_loss)(evict, 0.9), np.full(evict.shape, -1 / evict.size), rtol=1e-6)
    per_head = np.asarray(evict).mean(axis=3)
    np.testing.assert_allclose(
        compression_loss(evict, 0.3, scope="head"), np.maximum(0, 0.3 - per_head).mean(), rtol=1e-6
    )
    np.testing.assert_allclose(
        compression_loss(evict, 0.3, scope="layer"), np.maximum(0, 0.3 - per_head.mean(2)).mean(), rtol=1e-6
    )


def test_compression_loss_counts_decidable_tokens_only(rng):
    evict = jnp.asarray(rng.random((3, 2, 4, 10)) < 0.5, jnp.float32)
    counted = decidable(10, 3, 1)
    # Token t decides about pair t - 1, which must be gone by token 9.
    np.testing.assert_array_equal(np.flatnonzero(counted), [1, 2, 3, 4, 5, 6])
    np.testing.assert_array_equal(np.flatnonzero(decidable(10, 3, 0)), [0, 1, 2, 3, 4, 5])
    np.testing.assert_array_equal(np.flatnonzero(decidable(4, 3, 1)), [])
    np.testing.assert_allclose(
        compression_loss(evict, 0.9, counted=counted), compression_loss(evict[..., 1:7], 0.9), rtol=1e-6
    )
    # A decision changes a live count iff it is decidable.
    base = evict[0, 0] > 0
    for token in range(10):
        flipped = live_counts(base.at[:, token].set(~base[:, token]), 3, 1)
        assert bool(jnp.any(flipped != live_counts(base, 3, 1))) == bool(counted[token])


def test_token_metrics_equal_their_definitions(rng):
    student, teacher, embedding, teacher_embedding, _ = problem(rng)
    following = jnp.asarray(rng.integers(0, 53, (2, 37)), jnp.int32)
    metrics = token_metrics(student, teacher, embedding, teacher_embedding, following, chunk=8)
    log_s, log_t = (
        np.asarray(jax.nn.log_softmax(jnp.einsum("btd,vd->btv", h, e)))
        for h, e in ((student, embedding), (teacher, teacher_embedding))
    )
    np.testing.assert_allclose(
        metrics.kl_teacher_student, (np.exp(log_t) * (log_t - log_s)).sum(-1), rtol=1e-4, atol=1e-5
    )
    np.testing.assert_allclose(
        metrics.kl_student_teacher, (np.exp(log_s) * (log_s - log_t)).sum(-1), rtol=1e-4, atol=1e-5
    )
    rows, columns = np.indices((2, 37))
    np.testing.assert_allclose(metrics.student_nll, -log_s[rows, columns, following], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(metrics.teacher_nll, -log_t[rows, columns, following], rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(metrics.agree, log_s.argmax(-1) == log_t.argmax(-1))
