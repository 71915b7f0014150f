"""Hidden units of the evict head: their logits against NumPy, and their start, which changes nothing."""

import dataclasses

import jax
import numpy as np
import pytest
from cases import tiny_model, tokens
from flax import nnx

from dms_jax.config import DMSConfig
from dms_jax.errors import ConfigError
from dms_jax.models.decoder import Decoder
from dms_jax.models.layers import EvictParam
from dms_jax.models.parameters import flatten
from dms_jax.sharding import make_mesh

LINEAR = DMSConfig(window_size=4, evict_logit_bias=0.5, evict_logit_scale=20.0)
WITH_UNITS = dataclasses.replace(LINEAR, head_units=6)


@pytest.mark.parametrize("o_bias", [False, True])
def test_logits_equal_numpy(rng, o_bias):
    """scale * (norm * u @ proj [+ bias] + silu(u @ in + b) @ out) - bias, where u = x / rms(x), in fp64."""
    model, ids = tiny_model(WITH_UNITS, 3, o_bias=o_bias, qkv_bias=o_bias), tokens(rng, 2, 20)
    head = model.layers.attention
    head.evict_norm[...] = 1 + 0.3 * jax.random.normal(jax.random.key(9), head.evict_norm[...].shape)
    if o_bias:
        head.evict_bias[...] = jax.random.normal(jax.random.key(8), head.evict_bias[...].shape)
    zeros = np.zeros((model.config.num_layers, 2, model.config.num_kv_heads, 20), np.float32)
    stream = np.asarray(model.gated_hidden(ids, zeros, None, "none")[1], np.float64)
    p = {name.rpartition(".")[2]: np.asarray(a, np.float64) for name, a in flatten(model, EvictParam).items()}
    u = stream / np.sqrt((stream**2).mean(-1, keepdims=True) + model.config.rms_norm_eps)
    before = np.einsum("lbtd,ldu->lbtu", u, p["evict_units_in"]) + p["evict_units_bias"][:, None, None]
    units = np.einsum("lbtu,luk->lbtk", before / (1 + np.exp(-before)), p["evict_units_out"])
    raw = np.einsum("lbtd,ldk->lbtk", u * p["evict_norm"][:, None, None], p["evict_proj"]) + units
    want = 20.0 * (raw + (p["evict_bias"][:, None, None] if o_bias else 0)).swapaxes(2, 3) - 0.5
    # Nothing is evicted at this threshold, so the streams are those of the dense model.
    found = model.hard_scores(ids, None, 1e9)
    np.testing.assert_allclose(found, want, rtol=1e-4, atol=1e-4)
    assert 20 * np.abs(units).max() > 1, "the units must matter"


def test_fresh_units_change_no_logit_and_no_base_weight(rng):
    """A model with a fresh head computes what it does with a linear one, and the units are the same in any model."""
    build = lambda dms, seed: Decoder(dataclasses.replace(model.config, dms=dms), rngs=nnx.Rngs(seed))
    model, ids = tiny_model(LINEAR, 3), tokens(rng, 1, 20)
    linear, fresh, other = build(LINEAR, 3), build(WITH_UNITS, 3), build(WITH_UNITS, 4)
    for name, array in flatten(linear).items():
        np.testing.assert_array_equal(flatten(fresh)[name], array, err_msg=name)
    np.testing.assert_array_equal(fresh.hard_scores(ids), linear.hard_scores(ids))
    head, same = (m.layers.attention for m in (fresh, other))
    np.testing.assert_array_equal(head.evict_units_in[...], same.evict_units_in[...])
    # Units that are alike would stay alike.
    assert np.std(head.evict_units_in[...]) == pytest.approx(32**-0.5, rel=0.1)
    assert not np.any(head.evict_units_out[...]) and not np.any(head.evict_units_bias[...])


@pytest.mark.parametrize("mesh", ["8x1", "2x4"])
def test_logits_of_training_equal_those_of_inference(rng, mesh):
    """Rows sharded along their length give the logits that a chunk of inference computes."""
    model = tiny_model(WITH_UNITS, 3)
    layer = jax.tree.map(lambda x: x[1], nnx.state(model.layers.attention))
    attention = nnx.merge(nnx.graphdef(model.layers.attention), layer)
    x = rng.normal(size=(8, 16, 32)).astype(np.float32)
    q = np.zeros((8, 16, 8, 8), np.float32)
    want = attention.evict_logits(x, q)
    with jax.set_mesh(make_mesh(*map(int, mesh.split("x")))):
        found = jax.jit(attention.evict_logits_for_training)(x, q)
    np.testing.assert_allclose(found, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "units, words", [(-1, r"dms.head_units must be in \[0, 65536\]"), (2.5, "whole number"), (1 << 20, "got 1048576")]
)
def test_number_of_units_must_be_in_range(units, words):
    with pytest.raises(ConfigError, match=words):
        DMSConfig(head_units=units)
