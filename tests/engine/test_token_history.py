"""The repetition penalty counts all tokens that a cache has seen, whoever put them there."""

import functools
from dataclasses import replace

import jax
import numpy as np
import pytest
from cases import tiny_model

import dms_jax
from dms_jax.config import DMSConfig
from dms_jax.core.cache_base import NO_TOKEN

PENALTY = dms_jax.GenerationConfig(
    max_new_tokens=6, stop_ids=(), repetition_penalty=3.0, capacity=64, overflow="grow", threshold=1e9
)
PROMPT, TURN = [3, 9, 27, 81, 50, 53], [62, 89, 76]


@functools.cache
def model():
    return tiny_model(DMSConfig(window_size=3, evict_logit_bias=0.0), 3, num_layers=1)


@functools.cache
def at_once(*ids: int) -> list[int]:
    """The oracle: the answer to the whole conversation as one prompt."""
    return dms_jax.generate(model(), [list(ids)], PENALTY).tokens[0].tolist()


def turn(cache) -> list[int]:
    return dms_jax.generate(model(), [TURN] * cache.batch_size, PENALTY, cache=cache).tokens[-1].tolist()


def test_second_turn_equals_the_whole_conversation():
    first = dms_jax.generate(model(), [PROMPT], PENALTY)
    want = at_once(*PROMPT, *first.tokens[0].tolist(), *TURN)
    assert turn(first.cache) == want
    assert first.cache.history.last == (first.tokens[0][-1],)
    forgetful = dms_jax.generate(model(), [TURN], replace(PENALTY, repetition_penalty=1.0), cache=first.cache)
    assert forgetful.tokens[0].tolist() != want, "the penalty must matter in this example"


def test_prefilled_forked_and_saved_caches_know_their_tokens(tmp_path):
    cache = dms_jax.init_cache(model(), 2, 64, overflow="grow")
    assert cache.history.last == (NO_TOKEN,) * 2
    padded = np.array([PROMPT, PROMPT[:3] + [0, 0, 0]], np.int32)
    cache = dms_jax.prefill(model(), cache, padded, [6, 3], threshold=1e9)[1]
    assert cache.history.ids[1].tolist() == sorted(PROMPT[:3]) and cache.history.last == (PROMPT[-1], PROMPT[2])
    want = at_once(*PROMPT[:3], *TURN)
    assert turn(cache) == turn(dms_jax.fork(cache, 2)) == want
    dms_jax.save_cache(model(), cache, tmp_path / "cache")
    assert turn(dms_jax.load_cache(model(), tmp_path / "cache")) == want


def test_cache_of_unknown_tokens_is_said():
    cache = dms_jax.prefill(model(), dms_jax.init_cache(model(), 1, 64), np.array([PROMPT]), threshold=1e9)[1]
    for unknown in (dms_jax.decode_step(model(), cache, np.array([1]))[1], jax.tree.map(lambda x: x, cache)):
        assert unknown.history is None
        with pytest.warns(UserWarning, match="does not say which tokens it has seen"):
            turn(unknown)


@pytest.mark.parametrize("appended", [True, False])
def test_stop_id_enters_the_cache_only_if_asked(appended):
    free = dms_jax.generate(model(), [PROMPT], PENALTY)
    stop = int(free.tokens[0][2])
    config = replace(PENALTY, stop_ids=(stop,), append_stop_id=appended)
    out = dms_jax.generate(model(), [PROMPT], config)
    held = PROMPT + out.tokens[0].tolist()[: None if appended else -1]
    assert out.finish_reasons == ["stop_id"] and out.tokens[0][-1] == stop
    assert int(out.cache.seen[0]) == len(held) and out.cache.history.last == (held[-1],)
    np.testing.assert_allclose(out.logits[0], model().hard(np.array([held]), None, 1e9)[0][0, -1], atol=1e-5)
