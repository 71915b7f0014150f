"""Random Attention in the engine: the prompt stays, through prefill, decoding and later turns, or is refused."""

import functools

import numpy as np
import pytest
from cases import tiny_model, tokens

import dms_jax
from dms_jax.errors import ConfigError
from dms_jax.evaluation.methods import parse_methods
from dms_jax.evaluation.teacher_forced import dense_hidden, online_rows
from dms_jax.policies import PromptCompression, RandomAttention, RandomEviction

PROMPT, BUDGET, RECENT = 20, 40, 4
POLICY = RandomAttention(BUDGET, RECENT)


@functools.cache
def model():
    return tiny_model(None, 3, num_layers=2)


def kept_positions(cache) -> np.ndarray:
    """Return the sorted positions [L B K BUDGET] that each head holds; every head must be at the budget."""
    layers = [np.where(np.asarray(layer.expiry) > 0, layer.position, 2**31 - 1) for layer in cache.layers]
    return np.sort(np.stack(layers), axis=-1)[..., :BUDGET]


def test_prompt_stays_and_each_head_draws_other_generated_pairs(rng):
    prompts = [row[:length].tolist() for row, length in zip(tokens(rng, 2, PROMPT), [PROMPT, 13], strict=True)]
    config = dms_jax.GenerationConfig(max_new_tokens=44, stop_ids=(), policy=POLICY, chunk_size=16)
    first = dms_jax.generate(model(), prompts, config)
    kept = kept_positions(first.cache)
    for row, length in enumerate([PROMPT, 13]):
        assert (kept[:, row, :, :length] == np.arange(length)).all(), "the prompt"
        assert (kept[:, row, :, -RECENT:] == length + 44 - RECENT + np.arange(RECENT)).all(), "the recent pairs"
        heads = {tuple(head) for head in kept[0, row]}
        assert len(heads) == 4 and (kept[0, row] == kept[1, row]).all(), "heads differ, layers do not"
        assert (first.cache.live_counts == BUDGET).all()
    again = dms_jax.generate(model(), prompts, config)
    np.testing.assert_array_equal(kept, kept_positions(again.cache))
    # A later turn, which is read in chunks as well, leaves at random like generated pairs.
    _, second = dms_jax.prefill(model(), first.cache, tokens(rng, 2, 50), [50, 40], chunk_size=16)
    kept = kept_positions(second)
    assert (kept[:, 0, :, :PROMPT] == np.arange(PROMPT)).all() and (kept[:, 1, :, :13] == np.arange(13)).all()
    assert (kept[:, 0, :, PROMPT] >= PROMPT).all() and (second.live_counts == BUDGET).all()


def test_prompts_that_leave_no_room_are_refused_with_the_smallest_budget(rng):
    ids, message = (
        tokens(rng, 2, 50),
        rf"random_attention:{BUDGET} .*at most {BUDGET - RECENT} tokens, got {{}} in row 1",
    )
    with pytest.raises(ConfigError, match=message.format(37) + ".*at least 41"):
        dms_jax.generate(
            model(),
            [ids[0, :5].tolist(), ids[1, :37].tolist()],
            dms_jax.GenerationConfig(max_new_tokens=2, policy=POLICY),
        )
    cache = dms_jax.init_cache(model(), 2, BUDGET, policy=POLICY)
    with pytest.raises(ConfigError, match="chunk_size of at least 2, got 1"):
        dms_jax.prefill(model(), cache, ids[:, :36], chunk_size=1)
    _, cache = dms_jax.prefill(model(), cache, ids[:, :36], [20, 36])  # the longest prompt that fits
    with pytest.raises(ConfigError, match=message.format(38) + ".*at least 42"):
        dms_jax.prefill(model(), cache, ids[:, :2])  # the prompt goes on
    _, cache = dms_jax.decode_step(model(), cache, ids[:, 0])
    _, cache = dms_jax.prefill(model(), cache, ids)  # the prompt has ended, so this is a later turn
    assert (np.asarray(cache.live_counts) == BUDGET).all()


def test_given_text_has_no_prompt(rng):
    """All pairs but the recent ones leave at random: the first ones too, and those of the last chunk never."""
    ids = tokens(rng, 2, 96)
    hidden = dense_hidden(model(), ids)
    kept = kept_positions(online_rows(model(), hidden, ids, POLICY).cache)
    assert (kept[..., -RECENT:] == 96 - RECENT + np.arange(RECENT)).all()
    early = (kept < 16).sum(-1)
    assert (early < 16).all() and early.any(), "neither all nor none of the first pairs stay"


def test_policies_that_keep_the_prompt_cannot_compress_it():
    with pytest.raises(ConfigError, match="RandomAttention keeps the prompt"):
        PromptCompression(POLICY)
    with pytest.raises(ConfigError, match="--policies: random_attention .*keeps the prompt; write random_attention"):
        parse_methods("prompt:random_attention", "64")
    assert PromptCompression(RandomEviction(8)).ranks_pairs
