"""The dense, relaxed and hard paths of the model against each other and against the oracle of visibility."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import TINY, tiny_model, tokens, visible

from dms_jax.config import DMSConfig
from dms_jax.core.reference_attention import reference_attention
from dms_jax.core.visibility import MASKED
from dms_jax.models import attention_layer
from dms_jax.models.decoder import free_borrowed_channel

POLICIES = [
    DMSConfig(window_size=4, evict_logit_bias=0.0),
    DMSConfig(window_size=4, evict_logit_bias=0.0, decision_shift=0),
    DMSConfig(window_size=0, evict_logit_bias=0.0),
    DMSConfig(window_size=7, evict_logit_bias=0.0, granularity="layer"),
    DMSConfig(window_size=4, evict_logit_bias=0.0, variant="borrowed"),
    DMSConfig(window_size=4, evict_logit_bias=0.0, head_units=6),
]


def zeros(model, batch, length):
    return jnp.zeros((model.config.num_layers, batch, model.config.num_kv_heads, length))


@pytest.mark.parametrize("dms", POLICIES, ids=str)
def test_hard_path_is_attention_under_the_oracles_mask(rng, dms, monkeypatch):
    """Replace each attention call of the hard path by dense attention under the oracle's mask."""
    model, ids = tiny_model(dms, 3), tokens(rng, 2, 30)
    logits, evict = model.hard(ids)
    decisions, calls = np.asarray(evict), iter(range(TINY.num_layers))
    assert 0.1 < decisions.mean() < 0.9

    def oracle_attention(q, k, v, log_keep, *, window_size, segment_ids, implementation):
        layer = next(calls)
        out = []
        for b in range(len(q)):
            heads = []
            for n in range(q.shape[2]):
                seen = visible(
                    decisions[layer, b, n // model.config.group_size].astype(int), dms.window_size, dms.decision_shift
                )
                scores = q[b, :, n] @ k[b, :, n // model.config.group_size].T * q.shape[3] ** -0.5
                heads.append(jax.nn.softmax(jnp.where(seen, scores, -jnp.inf)) @ v[b, :, n // model.config.group_size])
            out.append(jnp.stack(heads, axis=1))
        return jnp.stack(out)

    monkeypatch.setattr(attention_layer, "gated_attention", oracle_attention)
    with jax.disable_jit():
        expected, _ = model.hard(ids)
    np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-5)
    assert next(calls, None) is None


@pytest.mark.parametrize("dms", POLICIES, ids=str)
def test_soft_path_at_its_limit_is_the_hard_path(rng, dms):
    ids = tokens(rng, 2, 30)
    model = tiny_model(dataclasses.replace(dms, tau=1e-6), 3)
    soft, evict = model.relaxed(ids, zeros(model, 2, 30))
    hard, decisions = model.hard(ids)
    np.testing.assert_array_equal(evict, decisions)
    np.testing.assert_allclose(soft, hard, rtol=1e-5, atol=1e-5)


def test_model_that_never_evicts_is_dense(rng):
    ids = tokens(rng, 2, 30)
    model = tiny_model(DMSConfig(window_size=4, evict_logit_bias=1e4), 3)
    np.testing.assert_array_equal(model.hard(ids)[0], model.dense(ids))
    np.testing.assert_array_equal(model.relaxed(ids, zeros(model, 2, 30))[0], model.dense(ids))
    base = tiny_model(None, 3)
    np.testing.assert_array_equal(model.dense(ids), base.dense(ids))
    with pytest.raises(ValueError, match="dms=DMSConfig"):
        base.hard(ids)


def test_past_logits_do_not_depend_on_future_tokens(rng):
    """Change token 20, and expect no change before it."""
    model, ids = tiny_model(POLICIES[0], 3), tokens(rng, 1, 30)
    changed = ids.copy()
    changed[0, 20] = (changed[0, 20] + 1) % TINY.vocab_size
    before, after = model.hard(ids)[0], model.hard(changed)[0]
    np.testing.assert_array_equal(before[:, :20], after[:, :20])
    assert not np.allclose(before[:, 20:], after[:, 20:])


@pytest.mark.parametrize("dms", POLICIES, ids=str)
def test_packed_documents_get_the_logits_that_they_get_alone(rng, dms):
    model, ids = tiny_model(dms, 3), tokens(rng, 1, 30)
    segments = jnp.asarray([[1] * 11 + [2] * 19], jnp.int32)
    together, evict = model.hard(ids, segments)
    for part in (slice(0, 11), slice(11, 30)):
        alone, decisions = model.hard(ids[:, part])
        np.testing.assert_array_equal(evict[..., part], decisions)
        np.testing.assert_allclose(together[:, part], alone, rtol=1e-4, atol=1e-5)


def test_rematerialization_changes_no_gradient(rng):
    model, ids = tiny_model(POLICIES[0], 3), tokens(rng, 2, 30)
    from dms_jax.models.parameters import ModelStructure, flatten

    structure, params = ModelStructure(model), flatten(model)

    def loss(params, remat):
        hidden, evict = structure.build(params).relaxed_hidden(ids, zeros(model, 2, 30), remat=remat)
        return jnp.sum(jnp.sin(hidden)) + evict.sum()

    expected = jax.grad(loss)(params, "none")
    for remat in ("full", "matmuls"):
        for a, b in zip(jax.tree.leaves(jax.grad(loss)(params, remat)), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_gradient_reaches_only_decisions_that_matter(rng):
    """The gradient of a token's logit is 0 for token 0 and for the last window_size + 1 - decision_shift tokens."""
    window, length = 4, 20
    model, ids = tiny_model(DMSConfig(window_size=window, evict_logit_bias=0.0, tau=1.0), 3), tokens(rng, 1, length)

    def loss(noise):  # the gradient for the noise is that for the logit, because they are added
        return jnp.sum(jnp.sin(model.relaxed_hidden(ids, noise)[0]))

    gradient = np.abs(np.asarray(jax.grad(loss)(zeros(model, 1, length)))).sum(axis=(0, 1, 2))
    matters = np.zeros(length, bool)
    matters[1 : length - window] = True  # token t decides about pair t - 1, which is gone from query t + window on
    np.testing.assert_array_equal(gradient > 0, matters)


@pytest.mark.parametrize("fields", [{}, {"qk_norm": True}, {"qkv_bias": True}])
def test_ramp_goes_from_the_base_model_to_a_freed_channel(rng, fields):
    ids = tokens(rng, 2, 20)
    base, model = tiny_model(None, 3, **fields), tiny_model(POLICIES[4], 3, **fields)
    if fields.get("qkv_bias"):
        for m in (base, model):
            m.layers.attention.q_bias[...] = m.layers.attention.q_bias[...] + 0.3
    np.testing.assert_array_equal(model.ramped_hidden(ids, jnp.float32(1.0)), base.dense_hidden(ids))
    ramped = model.ramped_hidden(ids, jnp.float32(0.0))
    assert not np.allclose(ramped, base.dense_hidden(ids), atol=1e-3)
    free_borrowed_channel(model)
    np.testing.assert_allclose(model.dense_hidden(ids), ramped, rtol=1e-5, atol=1e-6)
    _, evict = model.relaxed(ids, zeros(model, 2, 20))
    assert float(evict.sum()) == 0.0 or POLICIES[4].evict_logit_bias == 0.0  # all logits are exactly -bias


def test_borrowed_query_head_ignores_the_last_key_channel(rng):
    """The output does not depend on the last key channel in the borrowed query head of each group, and only there."""
    q, k, v = (jnp.asarray(rng.normal(size=(1, 9, heads, 8)), jnp.float32) for heads in (4, 2, 2))
    q = q.at[:, :, ::2, -1].set(0.0)
    keep = jnp.zeros((1, 2, 9))
    scaled = k.at[..., -1].multiply(5.0)
    change = jnp.abs(
        reference_attention(q, scaled, v, keep, window_size=3) - reference_attention(q, k, v, keep, window_size=3)
    )
    touched = np.asarray(change.max(axis=(0, 1, 3)) > 1e-6)
    assert touched.tolist() == [False, True, False, True]


def test_rows_beyond_the_models_own_window_are_refused(rng):
    model = tiny_model(None, sliding_window=16)
    assert model.dense(tokens(rng, 1, 16)).shape == (1, 16, 97)
    with pytest.raises(ValueError, match="length <= 16"):
        model.dense(tokens(rng, 1, 17))


def test_marked_hidden_is_a_sliding_window_with_sinks(rng):
    """Compare `marked_hidden` with the visibility oracle and with the dense path."""
    model, ids = tiny_model(None, 3), tokens(rng, 1, 25)
    hidden = model.marked_hidden(ids, jnp.arange(25) >= 2, 5)
    keep = jnp.broadcast_to(jnp.where(jnp.arange(25) >= 2, MASKED, 0.0), (1, 4, 25))
    seen = visible(np.r_[[0, 0, 0], np.ones(22, int)], 5, 1)  # with shift 1, token t decides about pair t - 1
    assert seen[20].sum() == 2 + 6 and keep.shape == (1, 4, 25)
    other = ids.copy()
    other[0, 10] = (other[0, 10] + 1) % 97  # the last query cannot see it, but depends on it through other tokens
    assert not np.array_equal(model.marked_hidden(other, jnp.arange(25) >= 2, 5), hidden)
    np.testing.assert_array_equal(model.marked_hidden(ids, jnp.arange(25) >= 2, 30), model.dense_hidden(ids))
