"""The border to Flax NNX: from models to arrays by name, and back."""

import jax
import numpy as np
import pytest
from cases import tiny_model, tokens

from dms_jax.config import DMSConfig
from dms_jax.models.layers import EvictParam
from dms_jax.models.parameters import ModelStructure, abstract_model, flatten, jitted

DMS = DMSConfig(window_size=4, evict_logit_bias=0.0)


def test_model_built_from_its_own_arrays_gives_equal_logits(rng):
    model, ids = tiny_model(DMS, num_layers=1), tokens(rng, 1, 12)
    params, head = flatten(model), flatten(model, EvictParam)
    assert set(head) == {"layers.attention.evict_norm", "layers.attention.evict_proj"} < set(params)
    structure = ModelStructure(abstract_model(model.config, params["embed"].dtype))
    base = {name: array for name, array in params.items() if name not in head}
    np.testing.assert_array_equal(structure.build(base, head).hard(ids)[0], model.hard(ids)[0])
    with pytest.raises(KeyError, match="evict"):
        structure.build(base)


def test_profile_names_the_parts_of_a_layer(rng):
    model, ids = tiny_model(DMS, num_layers=1), tokens(rng, 1, 12)
    program = jax.jit(lambda ids: model.hard(ids)[0]).lower(ids).as_text(debug_info=True)
    for part in ("qkv", "rope", "evict_head", "attention", "output", "mlp"):
        assert f'"{part}/' in program, part


def test_jitted_method_equals_the_method(rng):
    model, ids = tiny_model(DMS, num_layers=1), tokens(rng, 1, 12)
    scores = jitted(model, "hard_scores")(ids, None, np.float32(0.5))
    np.testing.assert_allclose(scores, model.hard_scores(ids, threshold=0.5), rtol=1e-5, atol=1e-5)
