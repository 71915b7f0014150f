"""Prefill and decoding on a mesh give the results of one device; each device decides about its own rows and heads."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import tiny_model
from jax.sharding import AxisType, Mesh
from lowering import abstract_cache, lower_extend

import dms_jax
from dms_jax.config import DMSConfig
from dms_jax.core.compact_cache import CompactCache
from dms_jax.models.parameters import ModelStructure, flatten


def mesh_of(data, model):
    return Mesh(
        np.array(jax.devices()[: data * model]).reshape(data, model), ("data", "model"), axis_types=(AxisType.Auto,) * 2
    )


def run(model, ids, lengths) -> tuple[list, CompactCache]:
    """Prefill a ragged prompt in two calls, the first in chunks, then decode four tokens."""
    cache = dms_jax.init_cache(model, len(ids), 16)
    first, cache = dms_jax.prefill(model, cache, ids[:, :20], np.minimum(lengths, 20), chunk_size=7)
    second, cache = dms_jax.prefill(model, cache, ids[:, 20:30], np.maximum(lengths - 20, 0), last_only=True)
    outputs = [first, second]
    for step in range(4):
        logits, cache = dms_jax.decode_step(model, cache, ids[:, 30 + step])
        outputs.append(logits)
    return outputs, cache


DMS = DMSConfig(window_size=4, evict_logit_bias=0.0)


@pytest.mark.parametrize(
    ("data", "model_axis", "kv_heads", "dms"), [(4, 2, 4, DMS), (1, 8, 8, DMS), (2, 4, 3, DMS), (4, 2, 4, None)]
)
def test_mesh_does_not_change_results(rng, data, model_axis, kv_heads, dms):
    model = tiny_model(dms, 3, num_layers=2, num_kv_heads=kv_heads, num_q_heads=2 * kv_heads)
    # No row repeats a token. In the first layer, both would have the same score, and rounding errors would decide which
    # of them is forced out.
    ids = np.stack([rng.permutation(model.config.vocab_size)[:34] for _ in range(8)]).astype(np.int32)
    lengths = np.array([30, 5, 20, 21, 13, 30, 1, 27])
    if dms is None:  # nothing leaves the 16 slots
        lengths = np.minimum(lengths, 8)
    wanted, cache = run(model, ids, lengths)
    mesh = mesh_of(data, model_axis)
    template = ModelStructure(model)
    params = flatten(model)
    placed = jax.device_put(params, template.shardings(list(params), mesh))
    actual, sharded = run(template.build(placed), ids, lengths)  # runs on the mesh of its weights
    assert len(sharded.layers[0].k.sharding.device_set) == data * model_axis
    for ours, theirs in zip(actual, wanted, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(sharded.live_counts, cache.live_counts)
    np.testing.assert_array_equal(sharded.forced_evictions, cache.forced_evictions)
    if dms is not None:
        assert int(jnp.sum(cache.forced_evictions)) > 0 and dms_jax.compression_ratio(cache) > 1.2


@pytest.mark.parametrize("length", [1, 16])
def test_sharded_layers_communicate_by_two_all_reduces_only(length):
    config = tiny_model(DMSConfig(window_size=4)).config
    mesh = mesh_of(1, 4)
    cache = abstract_cache(config, 2, 32, mesh, dtype=jnp.float32)
    program = lower_extend(config, cache, mesh, length, jnp.float32).compile()
    text = program.as_text()
    # Each layer has one all-reduce after attention and one after the MLP. The vocabulary of 97 is not split.
    assert text.count(" all-reduce(") + text.count(" all-reduce-start(") == 2 * config.num_layers
    assert not any(f" {kind}(" in text for kind in ("all-gather", "collective-permute", "all-to-all", "reduce-scatter"))
