"""Prefill and decoding on a mesh give the results of one device; each device decides about its own rows and heads."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import tiny_model
from jax.sharding import AxisType, Mesh
from lowering import abstract_cache, lower_extend

import dms_jax
from dms_jax.config import DMSConfig
from dms_jax.core import paged_cache
from dms_jax.core.compact_cache import CompactCache
from dms_jax.engine import decode_layout, decoding
from dms_jax.models.parameters import ModelStructure, flatten
from dms_jax.planning.hlo_collectives import collectives
from dms_jax.sharding import INFERENCE_AXES


def mesh_of(data, model, axes=("data", "model")):
    return Mesh(np.array(jax.devices()[: data * model]).reshape(data, model), axes, axis_types=(AxisType.Auto,) * 2)


def placed_on(model, mesh):
    template, params = ModelStructure(model), flatten(model)
    return template.build(jax.device_put(params, template.shardings(list(params), mesh)))


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
    placed = placed_on(model, mesh_of(data, model_axis))
    actual, sharded = run(placed, ids, lengths)  # runs on the mesh of its weights
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


def layer_program(runner, cache, tokens, count, threshold, last):
    """Lower the program of a single layer, as a CPU runs it."""
    x, chunk = decode_layout._enter(runner.embed, cache.seen, tokens, count, threshold)
    return decode_layout._extend_layer.lower(runner.structure, runner._layer(0), x, cache.layer(0), cache.policy, chunk)


whole_program = jax.jit(decoding.extend_rows, donate_argnums=1).lower


@pytest.mark.parametrize("length", [1, 16])
@pytest.mark.parametrize("name", [None, "dms_budget:9"])
def test_pages_of_rows_and_heads_on_their_own_devices_need_no_communication(rng, name, length):
    """On 2 x 2 devices, rows over 2 and KV heads over 2, a decode step and a prefill chunk exchange nothing but the two
    sums of each layer, which two devices take for their own rows. No append, gather or allocation communicates, nor
    does a fork or an arena that grows."""
    mesh = mesh_of(2, 2, INFERENCE_AXES)
    model = placed_on(tiny_model(DMS, 3, num_layers=2), mesh)
    cache = dms_jax.init_pages(model, 4, 40, page_size=4, num_pages=100, policy=name)
    last, cache = dms_jax.prefill(model, cache, rng.integers(0, 97, (4, 16)), last_only=True)
    chunk = np.zeros((4, length), np.int32), np.full(4, length, np.int32), jnp.float32(0), last
    arena, heads = cache.arena, cache.heads
    with jax.set_mesh(mesh):
        for program, layers in (
            (whole_program(decode_layout.stacked(model), cache, *chunk), 2),
            (whole_program(decode_layout.unrolled(model), cache, *chunk), 2),
            (layer_program(decode_layout.unrolled(model), cache, *chunk), 1),
        ):
            text = program.compile().as_text()
            found = collectives(text)
            assert sum(one.executions for one in found) == 2 * layers
            for one in found:
                assert (one.kind, one.group_size, one.shapes) == ("all-reduce", 2, ((2, length, 32),))
                (line,) = (line for line in text.splitlines() if f"%{one.name} = " in line)
                assert re.search(r'op_name="[^"]*/(output|mlp)/dot_general"', line), line
        for program in (
            paged_cache.select_rows.lower(cache, jnp.repeat(jnp.arange(4), 2)),
            paged_cache._renumbered.lower(arena.references, heads, 200, 20),
            paged_cache._moved.lower(arena.k, jnp.zeros((4, 200), jnp.int32), heads.survivors.shape[1:]),
        ):
            assert not collectives(program.compile().as_text())
