"""Generation equals the model's own mask path, and refuses settings and inputs that cannot work."""

import functools
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from cases import TINY, tiny_model, visible

import dms_jax
from dms_jax.config import DMSConfig
from dms_jax.core.cache_base import HostBounds
from dms_jax.engine import decode_loop, decoding
from dms_jax.engine.cache_capacity import default_overflow, plan_capacity
from dms_jax.engine.generation_config import GenerationConfig
from dms_jax.errors import ConfigError
from dms_jax.policies import policy_of

ROOT = Path(__file__).parents[2]
POLICY = DMSConfig(window_size=3, evict_logit_bias=0.0)


@functools.cache
def model():
    return tiny_model(POLICY, 3, num_layers=2)


class Letters:
    """A tokenizer for the tiny vocabulary: each id is one printable character."""

    add_bos, bos_id, eos_id, special_ids = False, None, None, {}

    def encode(self, text, *, control_tokens=True):
        return np.array([ord(c) - 30 for c in text], np.int32)

    def decode(self, ids):
        return "".join(chr(int(i) + 30) for i in ids)


@pytest.fixture
def prompts(rng):
    return [rng.integers(0, TINY.vocab_size, n).tolist() for n in (3, 17, 9)]


def settings(**fields):
    return GenerationConfig(**{"max_new_tokens": 12, "stop_ids": ()} | fields)


def test_greedy_tokens_are_the_best_of_the_mask_path(prompts):
    out = dms_jax.generate(model(), prompts, settings(logprobs=True))
    assert out.finish_reasons == ["length"] * 3 and out.texts is None
    for row, prompt in enumerate(prompts):
        logits, _ = model().hard(np.array([prompt + out.tokens[row].tolist()], np.int32))
        logits = np.asarray(logits[0, len(prompt) - 1 :])
        np.testing.assert_array_equal(out.tokens[row], logits[:-1].argmax(-1))
        np.testing.assert_allclose(out.logits[row], logits[-1], atol=1e-5)
        want = np.take_along_axis(np.asarray(jax.nn.log_softmax(logits[:-1])), out.tokens[row][:, None], axis=1)[:, 0]
        np.testing.assert_allclose(out.logprobs[row], want, atol=1e-5)
        assert np.isfinite(out.logprobs[row]).all()
    np.testing.assert_array_equal(out.cache.seen, [len(p) + 12 for p in prompts])
    np.testing.assert_allclose(out.realised_cr, np.asarray(out.cache.seen) / out.live_pairs)
    assert out.realised_cr.min() > 1 and not out.forced_evictions.any()


@pytest.mark.parametrize(
    "fields",
    [{}, {"temperature": 0.8, "top_p": 0.9, "top_k": 30, "seed": (5, 6, 7), "repetition_penalty": 1.3}],
    ids=["greedy", "sampled"],
)
def test_rows_do_not_depend_on_their_neighbors(prompts, fields):
    together = dms_jax.generate(model(), prompts, settings(**fields))
    order = [2, 0, 1]
    if "seed" in fields:
        fields = fields | {"seed": tuple(fields["seed"][i] for i in order)}
    permuted = dms_jax.generate(model(), [prompts[i] for i in order], settings(**fields))
    for row, i in enumerate(order):
        np.testing.assert_array_equal(permuted.tokens[row], together.tokens[i])


def test_seeds_decide_the_samples(prompts):
    draw = lambda **fields: [
        t.tolist() for t in dms_jax.generate(model(), prompts, settings(temperature=1.0, **fields)).tokens
    ]
    assert draw(seed=1) == draw(seed=1) != draw(seed=2)
    same = [prompts[0]] * 3
    chains = dms_jax.generate(model(), same, settings(temperature=1.0)).tokens
    assert len({tuple(t.tolist()) for t in chains}) == 3, "rows that share a seed must draw differently"


def test_stop_ids_end_a_row_and_freeze_it(prompts):
    free = dms_jax.generate(model(), prompts, settings())
    stop = int(free.tokens[0][4])
    out = dms_jax.generate(model(), prompts, settings(stop_ids=(stop, stop)))  # duplicates are allowed
    for row in range(3):
        places = np.flatnonzero(free.tokens[row] == stop)
        n = places[0] + 1 if places.size else 12
        np.testing.assert_array_equal(out.tokens[row], free.tokens[row][:n])
        assert out.finish_reasons[row] == ("stop_id" if places.size else "length")
        assert int(out.cache.seen[row]) == len(prompts[row]) + n
    assert out.finish_reasons[0] == "stop_id"


def test_stop_strings_leave_a_cache_of_exactly_the_returned_tokens(prompts):
    letters = Letters()
    texts = [letters.decode(p) for p in prompts]
    free = dms_jax.generate(model(), texts, settings(max_new_tokens=40), tokenizer=letters)
    stop = free.texts[0][20:22]
    out = dms_jax.generate(
        model(), texts, settings(max_new_tokens=40, stop_strings=(stop, "no such text")), tokenizer=letters
    )
    for row in range(3):
        at = free.texts[row].find(stop)
        assert out.texts[row] == (free.texts[row][:at] if at >= 0 else free.texts[row])
        assert out.finish_reasons[row] == ("stop_string" if at >= 0 else "length")
        n = at + len(stop) if at >= 0 else 40
        assert int(out.cache.seen[row]) == len(prompts[row]) + n == len(prompts[row]) + len(out.tokens[row])
        logits, _ = model().hard(np.array([prompts[row] + out.tokens[row].tolist()], np.int32))
        np.testing.assert_allclose(out.logits[row], logits[0, -1], atol=1e-5)
    assert out.finish_reasons[0] == "stop_string"


def test_conversation_continues_from_the_returned_cache(prompts):
    first = dms_jax.generate(model(), prompts, settings())
    turn = [[1, 2, 3], [4], [5, 6]]
    second = dms_jax.generate(model(), turn, settings(), cache=first.cache)
    for row in range(3):
        whole = prompts[row] + first.tokens[row].tolist() + turn[row] + second.tokens[row].tolist()
        np.testing.assert_allclose(second.logits[row], model().hard(np.array([whole], np.int32))[0][0, -1], atol=1e-5)
    again = dms_jax.generate(model(), turn, settings(), cache=first.cache)
    np.testing.assert_array_equal(again.logits, second.logits)


def test_dense_setting_equals_the_dense_model(prompts):
    out = dms_jax.generate(model(), prompts, settings(dense=True))
    for row, prompt in enumerate(prompts):
        logits = np.asarray(model().dense(np.array([prompt + out.tokens[row].tolist()], np.int32)))[
            0, len(prompt) - 1 :
        ]
        np.testing.assert_array_equal(out.tokens[row], logits[:-1].argmax(-1))
    assert out.realised_cr.tolist() == [1, 1, 1]


def test_loop_is_compiled_once_for_all_numbers(prompts):
    run = lambda **fields: dms_jax.generate(model(), prompts, settings(**fields))
    run(), run(temperature=1.0), run(temperature=1.0, top_p=0.5)
    warm = decode_loop.num_loop_compilations(), decoding.num_compilations()
    (
        run(max_new_tokens=5, threshold=3.0, stop_ids=(1, 2, 3)),
        run(temperature=0.3, min_p=0.1, seed=9),
        run(temperature=0.7, top_p=0.9, top_k=7, seed=(1, 2, 3)),
    )
    dms_jax.generate(model(), [p[:2] for p in prompts], settings())
    assert (decode_loop.num_loop_compilations(), decoding.num_compilations()) == warm


def test_memory_stays_constant_over_ten_thousand_steps():
    long = tiny_model(DMSConfig(window_size=8, evict_logit_bias=-1e6), 3, num_layers=1, max_position_embeddings=20_000)
    config = GenerationConfig(max_new_tokens=2_500, capacity=64, stop_ids=())
    out = dms_jax.generate(long, [[1, 2, 3]], config)
    warm, size, held = decode_loop.num_loop_compilations(), out.cache.bytes, None
    for _ in range(3):
        out = dms_jax.generate(long, [[1]], config, cache=out.cache)
        now = sum(array.nbytes for array in jax.live_arrays())
        held = held or now
        assert now <= held + 1024 and out.cache.bytes == size
    assert int(out.cache.seen[0]) == 3 + 2_500 + 3 * 2_501 > 10_000
    assert np.all(np.asarray(out.cache.live_counts) == 9) and not np.asarray(out.cache.forced_evictions).any()
    assert decode_loop.num_loop_compilations() == warm


def keeps_everything():
    return tiny_model(DMSConfig(window_size=3, evict_logit_bias=1e6), 3, num_layers=2)


def test_overflow_evict_keeps_the_capacity_and_counts(prompts):
    out = dms_jax.generate(keeps_everything(), prompts, settings(capacity=(8, 10), overflow="evict"))
    assert out.cache.capacities == (8, 10)
    live, seen = np.asarray(out.cache.live_counts), np.asarray(out.cache.seen)
    for layer, capacity in enumerate((8, 10)):
        np.testing.assert_array_equal(
            live[layer], np.broadcast_to(np.minimum(seen, capacity)[:, None], live[layer].shape)
        )
        np.testing.assert_array_equal(
            np.asarray(out.cache.forced_evictions)[layer], np.maximum(seen - capacity, 0)[:, None] + 0 * live[layer]
        )


def test_overflow_grow_equals_a_large_enough_cache(prompts):
    want = dms_jax.generate(keeps_everything(), prompts, settings(max_new_tokens=80))
    got = dms_jax.generate(keeps_everything(), prompts, settings(max_new_tokens=80, capacity=8, overflow="grow"))
    for ours, theirs in zip(got.tokens, want.tokens, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert min(got.cache.capacities) >= 97 and not got.forced_evictions.any()


def test_overflow_raise_states_the_capacity_to_use(prompts):
    with pytest.raises(ConfigError, match=r"layer \d, row \d, KV head \d: capacity 8 .* \d+; use capacity >= 64"):
        dms_jax.generate(keeps_everything(), prompts, settings(capacity=8, overflow="raise"))
    cache = dms_jax.init_cache(keeps_everything(), 1, 8, overflow="raise")
    _, cache = dms_jax.prefill(keeps_everything(), cache, np.ones((1, 8), np.int32))
    with pytest.raises(ConfigError, match="capacity 8 must be at least 9"):
        dms_jax.decode_step(keeps_everything(), cache, np.ones(1, np.int32))
    dense = dms_jax.init_cache(model(), 1, 8, dense=True)
    with pytest.raises(ConfigError, match="capacity 8 of layer 0 .* 9 tokens .* >= 64"):
        dms_jax.prefill(model(), dense, np.ones((1, 9), np.int32))


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"max_new_tokens": 0}, "max_new_tokens .* >= 1, got 0"),
        ({"max_new_tokens": 2.5}, "max_new_tokens .* got 2.5"),
        ({"max_new_tokens": None}, "max_new_tokens .* got None"),
        ({"max_new_tokens": True}, "max_new_tokens .* got True"),
        ({"max_new_tokens": 2**31}, "max_new_tokens"),
        ({"temperature": -0.1}, "temperature .* got -0.1"),
        ({"temperature": float("inf")}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": 10**400}, "temperature"),
        ({"top_p": 0.0}, r"top_p .* \(0, 1\], got 0.0"),
        ({"top_p": 1.1}, "top_p"),
        ({"top_k": -1}, "top_k"),
        ({"min_p": 1.0}, r"min_p .* \[0, 1\), got 1.0"),
        ({"min_p": -0.1}, "min_p"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
        ({"threshold": float("nan")}, "threshold"),
        ({"overflow": "clip"}, "overflow .* evict, raise, grow, got 'clip'"),
        ({"chunk_size": 0}, "chunk_size"),
        ({"stop_strings": ("",)}, "stop_strings"),
        ({"stop_strings": "end"}, "stop_strings"),
        ({"stop_ids": ("x",)}, "stop_ids"),
        ({"seed": -1}, "seed"),
    ],
)
def test_settings_out_of_range_are_refused(fields, message):
    with pytest.raises(ConfigError, match=message) as why:
        GenerationConfig(**fields)
    assert "\n" not in str(why.value)


@pytest.mark.parametrize(
    "prompts, fields, message",
    [
        ([], {}, "at least one prompt"),
        ([[]], {}, "prompt 0 .* empty"),
        ([[1], []], {}, "prompt 1 .* empty"),
        ([[[1]]], {}, r"prompt 0 .* \[1, 1\]"),
        ([[97]], {}, r"prompt 0: token id 97 .* \(0 to 96\)"),
        ([[-1]], {}, r"prompt 0: token id -1 .* \(0 to 96\)"),
        ([[-1, 5]], {}, r"prompt 0: token id -1 .* \(0 to 96\)"),
        ([[1], [5, 300, -2]], {}, r"prompt 1: token id 300 .* \(0 to 96\)"),
        ([[1.5, 2]], {}, "prompt 0: .* got 1.5"),
        ([[2, 1.5]], {}, "prompt 0: .* got 1.5"),
        ([[2.0]], {}, "prompt 0: .* got 2.0"),
        ([[float("nan")]], {}, "prompt 0: .* got nan"),
        ([["a"]], {}, "prompt 0: .* got a"),
        ([[True]], {}, "prompt 0: .* got True"),
        ([[5, True]], {}, "prompt 0: .* whole numbers, got "),
        ([[[1], [1, 2]]], {}, r"prompt 0 must be a list of token ids, got \[\[1\], \[1, 2\]\]"),
        (None, {}, "prompts must be a list .* got None"),
        ({1: 2}, {}, "prompts must be a list"),
        ([[1], "text"], {}, "all strings or all token ids"),
        (["text"], {}, "string prompts .* tokenizer="),
        ([[1]], {"stop_strings": ("x",)}, "stop_strings .* tokenizer="),
        ([[1]], {"stop_ids": (97,)}, "stop_ids: .* 97 "),
        ([[1]], {"seed": (1, 2)}, "seed .* 2 for 1 prompts"),
        ([[1] * 505], {}, "row 0 .* 512 tokens, .* max_position_embeddings, got 517; shorten it by 5"),
        ([[1] * 9], {"capacity": 3}, "capacity 3 of layer 0 .* 4 tokens of a window of 3 .* >= 64"),
        ([[1]], {"capacity": 0}, "capacity .* got 0"),
        ([[1]], {"capacity": (64,)}, r"capacity .* \(2\), got 1"),
        ([[1]], {"dense": True, "policy": "tova:8"}, "dense=True or a policy"),
    ],
)
def test_calls_that_cannot_work_are_refused(prompts, fields, message):
    with pytest.raises(ConfigError, match=message) as why:
        dms_jax.generate(model(), prompts, settings(**fields))
    assert "\n" not in str(why.value)


def test_cache_of_another_batch_size_is_refused():
    with pytest.raises(ConfigError, match="2 rows for 1 prompts"):
        dms_jax.generate(model(), [[1]], settings(), cache=dms_jax.init_cache(model(), 2, 64))


def test_sliding_window_of_the_model_limits_the_context():
    short = tiny_model(POLICY, 3, num_layers=1, sliding_window=20)
    with pytest.raises(ConfigError, match="20 tokens, .* sliding_window, got 21"):
        dms_jax.prefill(short, dms_jax.init_cache(short, 1, 64), np.ones((1, 21), np.int32))


@pytest.mark.parametrize(
    "tokens, options, message",
    [
        (np.ones((1, 4), np.int32), {}, r"tokens .* \[2 rows, .* got \[1, 4\]"),
        (np.ones((2, 0), np.int32), {}, r"tokens .* got \[2, 0\]"),
        (np.ones(2, np.int32), {}, r"tokens .* got \[2\]"),
        (np.ones((2, 4)), {}, "row 0: .* got 1.0"),
        (np.full((2, 4), 97), {}, r"row 0: token id 97 .* \(0 to 96\)"),
        (np.array([[1, 2], [3, -1]]), {}, r"row 1: token id -1 .* \(0 to 96\)"),
        (np.ones((2, 4), int), {"lengths": [4, 5]}, "lengths .* 0 to 4, .* got 5 for row 1"),
        (np.ones((2, 4), int), {"lengths": [4, -1]}, "lengths .* got -1 for row 1"),
        (np.ones((2, 4), int), {"lengths": [4]}, r"lengths .* 2 rows, got \[4\]"),
        (np.ones((2, 4), int), {"padding": "both"}, "padding .* 'both'"),
        (np.ones((2, 4), int), {"mask": [[1, 1, 1, 1], [1, 0, 1, 1]]}, "mask of row 1 has gaps"),
        (np.ones((2, 4), int), {"mask": np.ones((2, 3))}, r"mask .* \[2, 4\], got \[2, 3\]"),
        (np.ones((2, 4), int), {"mask": np.ones((2, 4)), "lengths": [4, 4]}, "either lengths or mask"),
        (np.ones((2, 4), int), {"chunk_size": 0}, "chunk_size .* got 0"),
    ],
)
def test_prefills_that_cannot_work_are_refused(tokens, options, message):
    with pytest.raises(ConfigError, match=message) as why:
        dms_jax.prefill(model(), dms_jax.init_cache(model(), 2, 16), tokens, **options)
    assert "\n" not in str(why.value)


def test_decode_steps_and_caches_that_cannot_work_are_refused():
    cache = dms_jax.init_cache(model(), 2, 16)
    for tokens, options, message in [
        (np.ones((2, 1), np.int32), {}, r"tokens .* \(2,\), got shape \(2, 1\)"),
        (np.ones(3, np.int32), {}, r"tokens .* \(2,\), got shape \(3,\)"),
        (np.array([1, 97]), {}, "token id 97 "),
        (np.ones(2, int), {"active": [True]}, r"active .* \(2,\), got shape \(1,\)"),
    ]:
        with pytest.raises(ConfigError, match=message):
            dms_jax.decode_step(model(), cache, tokens, **options)
    with pytest.raises(ConfigError, match="overflow .* 'clip'"):
        dms_jax.init_cache(model(), 2, 16, overflow="clip")
    with pytest.raises(ConfigError, match="batch_size"):
        dms_jax.init_cache(model(), 0, 16)


def test_pairs_read_counts_what_each_new_token_sees(prompts):
    dense = dms_jax.generate(model(), prompts, settings(dense=True))
    np.testing.assert_allclose(dense.pairs_read, [sum(len(p) + i for i in range(1, 13)) for p in prompts])
    np.testing.assert_allclose(dms_jax.generate(model(), prompts[1:2], settings(policy="tova:5")).pairs_read, [12 * 6])
    out = dms_jax.generate(model(), prompts, settings())
    for row, prompt in enumerate(prompts):
        evict = np.asarray(model().hard(np.array([prompt + out.tokens[row].tolist()], np.int32))[1])[:, 0]
        live = [
            [visible(head, POLICY.window_size, 1)[t].sum() for head in evict.reshape(-1, evict.shape[-1])]
            for t in range(len(prompt), len(prompt) + 12)
        ]
        np.testing.assert_allclose(out.pairs_read[row], np.mean(live, axis=1).sum(), rtol=1e-6)


def test_fully_padded_row_keeps_its_state():
    ids = np.arange(10, dtype=np.int32).reshape(2, 5)
    _, cache = dms_jax.prefill(model(), dms_jax.init_cache(model(), 2, 16), ids)
    logits, after = dms_jax.prefill(model(), cache, ids, [3, 0])
    assert after.seen.tolist() == [8, 5] and not np.asarray(logits[1]).any()
    for old, new in zip(cache.layers, after.layers, strict=True):
        jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[1], b[1]), old, new)


def test_settings_and_text_streams_import_no_jax():
    code = "import sys, dms_jax.engine.generation_config, dms_jax.engine.text_stream; print('jax' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout == "False\n", done.stderr


def test_host_bounds_are_dropped_when_the_cache_changes():
    cache = dms_jax.init_cache(model(), 2, 16)
    assert cache.bounds == HostBounds(0, (0, 0))
    for changed in (replace(cache, overflow="grow"), jax.tree.map(lambda x: x, cache), dms_jax.fork(cache, 2)):
        assert changed.bounds is None


@pytest.mark.parametrize(
    ("policy", "overflow", "more_to_come", "want"),
    [
        ("dense", None, False, (256, "raise")),
        ("dms", None, False, (256, "evict")),
        ("dms", "grow", False, (64, "grow")),  # twice the window, rounded up
        ("dms", None, True, (256, "grow")),
        ("dms", "evict", True, (256, "evict")),
        ("tova:8", None, False, (64, "raise")),  # the budget, rounded up
        ("dms_budget:70", None, False, (128, "raise")),
    ],
)
def test_plan_capacity_follows_policy_and_overflow(policy, overflow, more_to_come, want):
    policy = policy_of(model().config, policy)
    assert plan_capacity(None, [3, 130], 12, policy, overflow, more_to_come) == want
    assert plan_capacity(16, [3, 130], 12, policy, overflow, more_to_come) == (
        16,
        overflow or default_overflow(policy),
    )
