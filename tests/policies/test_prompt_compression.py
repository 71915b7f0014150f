"""Prompt compression against kvpress (tests/golden/README.md), and for several rows, which kvpress does not support."""

import dataclasses

import numpy as np
import pytest
from cases import GOLDEN, tiny_model, tokens
from safetensors.numpy import load_file

import dms_jax
from dms_jax.errors import ConfigError
from dms_jax.policies import (
    H2O,
    TOVA,
    DropKV,
    ExpectedAttention,
    KeepAll,
    KeyDiff,
    KNorm,
    ObservedAttention,
    PromptCompression,
    RandomEviction,
    SnapKV,
    StreamingLLM,
    VaSE,
)
from dms_jax.policies.prompt_compression import prompt_pairs

PROMPT, BUDGET = 48, 24
GOLDEN_FOLDERS = "kvpress", "kvpress_newer"
METHODS = {
    "knorm": KNorm(BUDGET),
    "keydiff": KeyDiff(BUDGET),
    "snapkv": SnapKV(BUDGET),
    "tova": TOVA(BUDGET),
    "streaming_llm": StreamingLLM(BUDGET),
    "observed_attention": ObservedAttention(BUDGET),
    "dropkv": DropKV(BUDGET, 8, 5),
    "expected_attention": ExpectedAttention(BUDGET),
}


def kept_positions(cache, layer, row, head) -> set[int]:
    held, position = cache.layers[layer], np.asarray(cache.layers[layer].position)[row, head]
    return set(position[np.asarray(held.expiry)[row, head] >= int(cache.seen[row]) - 1].tolist())


@pytest.mark.parametrize("folder", ["llama3_rope_scaled", "qwen3_qk_norm"])
def test_scores_kept_pairs_and_logits_equal_kvpress(folder):
    model, files = dms_jax.load(GOLDEN / folder), [GOLDEN / name / f"{folder}.safetensors" for name in GOLDEN_FOLDERS]
    want = load_file(files[0]) | load_file(files[1])
    ids = want["input_ids"]
    for name, method in METHODS.items():
        cache = dms_jax.init_cache(model, 1, 64, policy=PromptCompression(method))
        _, cache = dms_jax.prefill(model, cache, ids[:, :PROMPT], chunk_size=32)
        scores = np.stack(
            [np.asarray(method.keep_scores(prompt_pairs(layer, cache.seen)))[0, :, :PROMPT] for layer in cache.layers]
        )
        if name == "dropkv":
            # kvpress sums over the window of 8, and gives the pairs of the window another score, which is also the
            # highest of a head.
            scores, want["dropkv.scores"] = 8 * scores[..., :-8], want["dropkv.scores"][..., :-8]
        np.testing.assert_allclose(scores, want[f"{name}.scores"], atol=1e-5, err_msg=name)
        if name == "knorm":
            # In layer 0, equal tokens have keys of equal norm at any position, and two such pairs tie at the cut. Which
            # one torch.topk picks is arbitrary, so we add 1e-5 to its picks, which only breaks such ties.
            picked = np.pad(want["knorm.keep"], ((0, 0), (0, 0), (0, 64 - PROMPT)))[:, None, :, :, None] * 1e-5
            layers = [
                dataclasses.replace(layer, statistic=layer.statistic + extra)
                for layer, extra in zip(cache.layers, picked, strict=True)
            ]
            cache = dataclasses.replace(cache, layers=tuple(layers))
        cache = dms_jax.compress_prompt(cache)
        for layer, head in np.ndindex(want[f"{name}.keep"].shape[:2]):
            assert kept_positions(cache, layer, 0, head) == set(np.flatnonzero(want[f"{name}.keep"][layer, head])), (
                name,
                layer,
                head,
            )
        for step, logits in enumerate(want[f"{name}.decode_logits"]):
            ours, cache = dms_jax.decode_step(model, cache, ids[:, PROMPT + step])
            np.testing.assert_allclose(ours[0], logits, atol=1e-4, err_msg=name)
        assert (np.asarray(cache.live_counts) == BUDGET + len(logits := want[f"{name}.decode_logits"])).all()


def test_rows_are_compressed_independently(rng):
    """Compress ragged rows, prefilled in chunks, into a smaller buffer."""
    model, ids, lengths = tiny_model(None, 3, num_layers=2), tokens(rng, 2, 40), [40, 23]
    for method in [*METHODS.values(), H2O(10), RandomEviction(10), VaSE(10, 4)]:
        method = dataclasses.replace(method, budget=12)

        def compressed(rows, chunk_size, method=method):
            cache = dms_jax.init_cache(model, len(rows), 64, policy=PromptCompression(method))
            _, cache = dms_jax.prefill(model, cache, ids[rows], np.asarray(lengths)[rows], chunk_size=chunk_size)
            return dms_jax.compress_prompt(cache, capacity=20)

        both = compressed([0, 1], 16)
        assert both.capacities == (20, 20) and both.policy == KeepAll() and (np.asarray(both.live_counts) == 12).all()
        for row in (0, 1):
            alone = compressed([row, row], 16)  # as many rows, so that nothing is compiled again
            for layer, head in np.ndindex(2, 4):
                assert kept_positions(both, layer, row, head) == kept_positions(alone, layer, 0, head), type(
                    method
                ).__name__
        after, _ = dms_jax.decode_step(model, both, ids[:, 0])
        alone, _ = dms_jax.decode_step(model, alone, ids[[1, 1], 0])
        np.testing.assert_allclose(after[1], alone[0], atol=1e-5)


def test_prompt_below_the_budget_stays_dense(rng):
    model, ids = tiny_model(None, 3, num_layers=1), tokens(rng, 1, 13)
    cache = dms_jax.init_cache(model, 1, 64, policy="prompt:tova:32")
    _, cache = dms_jax.prefill(model, cache, ids[:, :12])
    logits, _ = dms_jax.decode_step(model, dms_jax.compress_prompt(cache), ids[:, 12])
    np.testing.assert_allclose(logits, model.dense(ids)[:, -1], atol=1e-5)


def test_caches_of_other_policies_and_small_capacities_are_refused():
    model = tiny_model(None, 3, num_layers=1)
    with pytest.raises(
        ConfigError,
        match="PromptCompression.*TOVA",
    ):
        dms_jax.compress_prompt(dms_jax.init_cache(model, 1, 64, policy="tova:32"))
    with pytest.raises(ConfigError, match="capacity.*32.*16"):
        dms_jax.compress_prompt(dms_jax.init_cache(model, 1, 64, policy="prompt:tova:32"), capacity=16)
