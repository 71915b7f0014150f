"""How many programs a generation compiles."""

import jax
import pytest
from cases import tiny_model

import dms_jax
from dms_jax import GenerationConfig
from dms_jax.config import DMSConfig
from dms_jax.core.compact_cache import CompactCache
from dms_jax.engine import decode_layout


@pytest.mark.parametrize("cache", ["slots", "pages"])
def test_prompt_of_another_length_compiles_nothing_within_a_size(cache):
    model = tiny_model(DMSConfig(window_size=8, target_cr=2.0), 3, num_layers=2)
    run = lambda length: (
        dms_jax.generate(
            model, [list(range(1, length + 1))], GenerationConfig(max_new_tokens=40, stop_ids=(), cache=cache)
        ).cache
    )
    size = lambda cache: cache.capacities if isinstance(cache, CompactCache) else cache.arena.num_pages
    first, compiled = run(20), []
    listener = lambda event, *_, **__: compiled.append(event)
    jax.monitoring.register_event_duration_secs_listener(listener)
    try:
        sizes = [size(run(length)) for length in (24, 17, 23)]
    finally:
        jax.monitoring.unregister_event_duration_listener(listener)
    assert not [event for event in compiled if event.startswith("/jax/core/compile/")]
    assert sizes == [size(first)] * 3


def test_layers_share_their_programs_on_a_cpu():
    deep = tiny_model(DMSConfig(window_size=8), 3, num_layers=5)
    before = decode_layout.num_layer_compilations()
    dms_jax.generate(deep, [[1, 2, 3]], GenerationConfig(max_new_tokens=12, stop_ids=()))
    # A prefill chunk and a decode step each compile what enters the layers, one layer, and what leaves them.
    assert decode_layout.num_layer_compilations() - before <= 6
