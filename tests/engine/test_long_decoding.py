"""Ten thousand tokens in a row of a cache in pages: memory and programs change only when the cache grows."""

import gc

import jax
import numpy as np
import pytest
from cases import tiny_model, tokens
from interleavings import policy

import dms_jax

STEPS, PART = 10_000, 500


def by_steps(model, cache, last):
    """Append the likeliest token to each row PART times, with `decode_step`."""
    for _ in range(PART):
        ids = np.argmax(last, axis=-1).astype(np.int32)
        last, cache = dms_jax.decode_step(model, cache, ids, donate=True)
    return last, cache


def by_generate(model, cache, last):
    """Append PART tokens to the row in a turn of `generate`, the first of them as its prompt."""
    config = dms_jax.GenerationConfig(max_new_tokens=PART - 1, stop_ids=())
    out = dms_jax.generate(model, np.argmax(last, axis=-1)[:, None], config, cache=cache)
    return out.logits, out.cache


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, append, sizes", [(None, by_generate, range(4, 11)), ("dms_budget:40", by_steps, range(1, 2))]
)
def test_steps_compile_and_allocate_only_when_the_cache_grows(rng, name, append, sizes):
    """Look at the process after every 500 tokens: how much was compiled so far, and its live arrays.

    Under the learned policy, heads keep more pairs than the cache was made for, so the arena grows a few times, as
    `overflow="grow"` declares. From the second look at an arena of one size on, nothing is compiled, and the live
    arrays are as many and as large as before. Under budgets, the arena keeps its first size.
    """
    model = tiny_model(
        policy(15, target_cr=16.0), 3, num_layers=1, num_kv_heads=2, num_q_heads=2, max_position_embeddings=2 * STEPS
    )
    cache = dms_jax.init_pages(model, 1, STEPS + 100, policy=name, page_size=16)
    last, cache = dms_jax.prefill(model, cache, tokens(rng, 1, 40), last_only=True, donate=True)
    compiled, found = [], {}
    listener = lambda event, *_, **__: compiled.append(event) if event.startswith("/jax/core/compile/") else None
    jax.monitoring.register_event_duration_secs_listener(listener)
    try:
        for _ in range(STEPS // PART):
            last, cache = append(model, cache, last)
            gc.collect()
            arrays = [x.nbytes for x in jax.live_arrays()]
            size = cache.arena.num_pages, cache.heads.table.shape
            found.setdefault(size, []).append((len(compiled), len(arrays), sum(arrays)))
    finally:
        jax.monitoring.unregister_event_duration_listener(listener)
    assert np.asarray(cache.seen).tolist() == [STEPS + 40] and not np.asarray(cache.starved).any()
    assert len(found) in sizes
    for size, seen in found.items():
        assert seen[1:] == seen[1:2] * (len(seen) - 1), size
