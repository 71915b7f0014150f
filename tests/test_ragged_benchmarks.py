"""Benchmarks whose heads differ: the counts of live pairs, the caches that hold them, and the files that bring them."""

import dataclasses
import json
import math

import jax.numpy as jnp
import numpy as np
import pytest
from cases import TINY
from flax import nnx
from golden_folders import DMS, model_folder

import dms_jax
from benchmarks import decode, kernels
from benchmarks.filled_cache import allocated_bytes, allocated_page_bytes, filled_cache, filled_pages, max_rows
from benchmarks.ragged import log_normal_counts, quantile_counts, spread
from benchmarks.timing import Ceilings
from dms_jax.commands import evaluate
from dms_jax.config import DMSConfig
from dms_jax.core.eviction import live_counts
from dms_jax.errors import ConfigError
from dms_jax.evaluation.live_counts import LiveCounts, read_live_counts, write_live_counts
from dms_jax.kernels.kernel_cases import page_case, slot_case, update_case
from dms_jax.models.decoder import Decoder

FP32 = jnp.dtype(jnp.float32)


@pytest.mark.parametrize(
    ("heads", "mean", "cv", "low", "high"),
    [
        (90, 2048, 0.92, 129, 4096),  # most heads are at a bound
        (90, 1024, 0.66, 129, 4096),
        (288, 4096, 1.5, 129, 32768),
        (8, 4096, 0.9, 129, 16384),
        (3, 100, 0.4, 10, 400),
        (2, 150, 0.25, 76, 600),
        (90, 2048, 0.0, 129, 4096),
    ],
)
def test_counts_keep_mean_spread_and_bounds_and_repeat(heads, mean, cv, low, high):
    counts = log_normal_counts(heads, mean, cv, low, high)
    assert counts.sum() == heads * mean and abs(spread(counts) - cv) <= 0.01 + 1 / mean
    assert counts.shape == (heads,) and counts.min() >= low and counts.max() <= high
    np.testing.assert_array_equal(counts, log_normal_counts(heads, mean, cv, low, high))
    other = log_normal_counts(heads, mean, cv, low, high, seed=1)
    np.testing.assert_array_equal(np.sort(counts), np.sort(other))
    assert heads < 8 or cv == 0 or (counts != other).any()


def test_counts_far_from_their_bounds_are_log_normal():
    log = np.log(log_normal_counts(4000, 1e6, 0.5, 1, 10**9))
    sigma = math.sqrt(math.log(1 + 0.5**2))
    assert log.std() == pytest.approx(sigma, rel=5e-3)
    assert np.median(log) == pytest.approx(math.log(1e6) - sigma**2 / 2, abs=5e-3)
    assert np.mean(log > np.median(log) + sigma) == pytest.approx(0.1587, abs=5e-3)


def test_counts_reach_the_largest_spread_and_no_more():
    # Half of the heads at each bound have the largest spread that a mean half-way between the bounds allows.
    largest = (1000 - 100) / 550 / 2
    counts = log_normal_counts(10, 550, largest, 100, 1000)
    assert sorted(counts) == [100] * 5 + [1000] * 5
    np.testing.assert_array_equal(log_normal_counts(5, 1000, 0, 100, 1000), [1000] * 5)
    np.testing.assert_array_equal(log_normal_counts(5, 100, 0, 100, 1000), [100] * 5)
    for arguments, named in [
        ((10, 550, largest + 0.02, 100, 1000), "at most 0.82"),
        ((5, 1000, 0.1, 100, 1000), "at most 0.00"),
        ((1, 300, 0.5, 100, 1000), "of 1 heads"),
        ((5, 99, 0, 100, 1000), "from 100"),
        ((5, 1001, 0, 100, 1000), "to 1000"),
    ]:
        with pytest.raises(ConfigError, match=named):
            log_normal_counts(*arguments)


def test_counts_like_measured_ones_are_their_quantiles_scaled():
    measured = np.array([[[130, 400], [700, 910]], [[260, 310], [2000, 90]]])
    np.testing.assert_array_equal(np.sort(quantile_counts(8, 1200, measured)), np.sort(2 * measured, axis=None))
    few = quantile_counts(4, 50, measured)
    assert few.sum() == 200 and few.min() >= 1 and spread(few) == pytest.approx(spread(measured), rel=0.25)


@pytest.fixture(scope="module")
def model():
    return Decoder(TINY, rngs=nnx.Rngs(0), dtype=FP32)


def test_cache_holds_the_counts_and_allocates_for_the_fullest_head_of_each_layer(model):
    layers, kv_heads, h = TINY.num_layers, TINY.num_kv_heads, TINY.head_dim
    counts = np.random.default_rng(0).integers(5, 200, (layers, 3, kv_heads))
    cache = filled_cache(model, counts, context=300, room=7, dense=False)
    np.testing.assert_array_equal(cache.live_counts, counts)
    assert cache.bytes == allocated_bytes(model, counts, 7, False)
    slots = [-(-(int(layer.max()) + 7) // 64) * 64 for layer in counts]
    assert cache.bytes == sum(3 * kv_heads * (n * (2 * h * 4 + 12) + 4) for n in slots) + 3 * 4
    held = np.asarray(cache.layers[0].position)[0, 0, : counts[0, 0, 0]]
    assert len(set(held.tolist())) == len(held) and held.min() == 0 and held.max() == 299


@pytest.mark.parametrize("dense", [True, False])
def test_pages_hold_the_counts_and_no_page_twice_and_have_room_for_all_steps(model, dense):
    counts = np.random.default_rng(0).integers(129, 200, (TINY.num_layers, 3, TINY.num_kv_heads))
    counts = np.full_like(counts, 300) if dense else counts
    cache = filled_pages(model, counts, context=300, room=40, dense=dense)
    np.testing.assert_array_equal(cache.live_counts, counts)
    assert cache.bytes == allocated_page_bytes(model, counts, 300, 40, dense)
    assert cache.bounds is not None and cache.bounds.tokens >= 40
    used = np.asarray(cache.heads.table)[np.asarray(cache.heads.table) > 0]
    free = np.asarray(cache.arena.free)[0, : int(cache.arena.free_count[0])]
    assert sorted([*used.tolist(), *free.tolist()]) == list(range(1, cache.arena.num_pages))
    for _ in range(3):
        _, cache = dms_jax.decode_step(model, cache, np.zeros(3, np.int32))
    assert not np.asarray(cache.starved).any() and (np.asarray(cache.live_counts) >= 129).all()


def test_rows_at_equal_memory_are_the_most_that_fit():
    for per_row, fixed, budget in [(7, 0, 100), (7, 3, 100), (1, 0, 1000), (9, 0, 9), (64, 0, 64 * 8 - 1)]:
        assert max_rows(lambda rows, a=per_row, b=fixed: a * rows + b, budget) == (budget - fixed) // per_row
    assert max_rows(lambda rows: 10 * rows, 5) == 1


def test_ragged_arms_have_the_mean_of_even_ones(model):
    options = decode.parse(["--ragged", "0.6", "--context", "512", "--batch", "2"])
    config = dataclasses.replace(TINY, dms=DMSConfig(window_size=16))
    arms = decode.arms_of(options, config, [1.0, 2.0, 4.0], None)
    assert [arm.heads.mean() for arm in arms.values()] == [512, 512, 256, 128]
    assert spread(arms["dense"].counts()) == spread(arms["cr 1"].counts()) == 0
    for name in ("cr 2", "cr 4"):
        counts = arms[name].counts()
        assert counts.shape == (config.num_layers, 2, config.num_kv_heads) and (counts[:, 0] == counts[:, 1]).all()
        assert spread(counts) == pytest.approx(0.6, abs=0.02) and counts.min() > config.dms.window_size


def test_rows_take_the_rows_of_a_file_in_turn():
    shape = (TINY.num_layers, 2, TINY.num_kv_heads)
    rows = np.random.default_rng(0).integers(1, 65, shape)
    live = {f"{row}/0": rows[:, row].tolist() for row in range(2)}
    measured = LiveCounts(**counts_file(live=live, realised_cr=64 / rows.mean()))
    options = decode.parse(["--live", "FILE", "--batch", "3"])
    ratios = decode.checked_ratios(options, measured)
    assert ratios == [measured.realised_cr] and options.context == 64
    arms = decode.arms_of(options, TINY, ratios, measured)
    assert list(arms) == ["dense", "live"] and (arms["dense"].counts() == 64).all()
    np.testing.assert_array_equal(arms["live"].counts(), rows[:, [0, 1, 0]])
    np.testing.assert_array_equal(arms["live"].counts(1), rows[:, :1])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return model_folder(tmp_path_factory.mktemp("models") / "dms", DMS)


def test_counts_of_a_real_model_reach_the_benchmarks(folder, tmp_path, capsys, monkeypatch):
    text, path = tmp_path / "words.txt", tmp_path / "live.json"
    text.write_text("".join(f"{i} the quick brown fox jumps over a lazy dog. " for i in range(20)))
    rows = ["--length", "64", "--rows", "1", "--calibration-rows", "0", "--policies", "dms", "--tasks", "kept"]
    texts = ["--text", f"a={text}", "--text", f"b={text}"]
    output = ["--output", str(tmp_path / "kept.jsonl"), "--live-counts", str(path)]
    evaluate.main(["--model", str(folder), *texts, *rows, *output])
    counts, loaded = read_live_counts(path), dms_jax.load(folder)
    tokens = dms_jax.load_tokenizer(folder).encode(text.read_text())[:64][None]
    policy = loaded.config.require_dms()
    want = np.asarray(live_counts(loaded.hard(tokens)[1], policy.window_size, policy.decision_shift))
    np.testing.assert_array_equal(counts.counts, np.repeat(want, 2, axis=1))
    assert list(counts.live) == ["a/0", "b/0"] and counts.policy == "dms@trained" and counts.length == 64
    assert counts.window_size == policy.window_size and counts.realised_cr == pytest.approx(64 / want.mean(), rel=1e-4)
    assert {"command", "date", "texts", "jax", "commit", "base_sha256"} <= counts.provenance.keys()
    assert "--live-counts" in counts.provenance["command"]
    write_live_counts(tmp_path / "again.json", counts)
    assert read_live_counts(tmp_path / "again.json") == counts

    monkeypatch.setattr("benchmarks.timing.measure_ceilings", lambda *_, **__: (Ceilings(1.0, 1.0), []))
    capsys.readouterr()
    live = ["--live", str(path), "--steps", "1", "--repeats", "1", "--json", "--batch", "3"]
    decode.main(["--model", str(folder), *live])
    dense, arm = json.loads(capsys.readouterr().out)["decode"]
    assert dense["tokens_seen"] == 64 and arm["arm"] == "live" and arm["batch"] == 3
    assert arm["live_at_start"] == want.mean() and arm["live_cv"] == pytest.approx(spread(want))
    assert (arm["live_min"], arm["live_max"]) == (want.min(), want.max())


def counts_file(**changes) -> dict:
    fields = {"model": "m", "policy": "dms@trained", "window_size": 4, "length": 64, "realised_cr": 2.0}
    return fields | {"live": {"a/0": [[32, 48], [16, 32]]}, "provenance": {}} | changes


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("{", "not valid JSON"),
        ("[]", "JSON object"),
        ({"model": "m"}, "missing keys: length"),
        (counts_file(lenght=3), "lenght"),
        (counts_file(length="long"), "`length`"),
        (counts_file(window_size=-1), "window_size"),
        (counts_file(live={}), "`live`"),
        (counts_file(live={"a/0": [[32, 48], [16]]}), "`live` of a/0"),
        (counts_file(live={"a/0": [[32, 48], [16, 32.5]]}), "`live` of a/0"),
        (counts_file(live={"a/0": [[32, 48], [0, 48]]}), "from 1 to 64"),
        (counts_file(live={"a/0": [[32, 65], [15, 16]]}), "from 1 to 64"),
        (counts_file(live={"a/0": [[32]], "b/0": [[32, 32]]}), "one shape"),
        (counts_file(realised_cr=3.0), "2.0000"),
    ],
)
def test_bad_file_of_counts_is_named_in_one_line(tmp_path, content, named):
    path = tmp_path / "live.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(ConfigError, match=named) as refusal:
        read_live_counts(path)
    assert "\n" not in str(refusal.value) and str(path) in str(refusal.value)


def test_options_that_cannot_work_are_named_before_anything_is_measured(tmp_path, folder):
    path = tmp_path / "live.json"
    path.write_text(json.dumps(counts_file()))
    live = ["--live", str(path)]
    for command, argv, named in [
        (decode, [*live, "--cr", "2"], "--cr"),
        (decode, [*live, "--context", "128"], "64 tokens"),
        (decode, ["--ragged", "nan"], "--ragged"),
        (decode, ["--ragged", "-1"], "got -1"),
        (decode, ["--live", str(tmp_path / "none.json")], "none.json"),
        (kernels, ["--ragged", "inf"], "--ragged"),
        (kernels, [*live, "--kernel", "compaction"], "--kernel compaction"),
    ]:
        with pytest.raises(ConfigError, match=named):
            command.main(argv)
    for command in (decode, kernels):
        with pytest.raises(SystemExit) as stop:
            command.parse([*live, "--ragged", "1"])
        assert stop.value.code == 2
    options = decode.parse(["--model", "tiny", *live])
    with pytest.raises(ConfigError, match="2 layers of 2 KV heads.*--ragged 0.35"):
        decode.arms_of(options, TINY, [2.0], read_live_counts(path))
    output = ["--output", str(tmp_path / "r.jsonl"), "--text", str(path), "--live-counts"]
    common = ["--model", str(folder), *output, str(tmp_path / "out.json"), "--length", "16", "--rows", "1"]
    for argv, named in [
        ([], "kept"),
        (["--tasks", "kept", "--policies", "dense"], "one learned method, got none"),
        (["--tasks", "kept", "--policies", "dms", "--budgets", "trained,cr2"], "dms@trained, dms@cr2"),
        (["--tasks", "kept", "--live-counts", str(tmp_path / "no" / "out.json")], "existing folder"),
    ]:
        with pytest.raises(ConfigError, match=named):
            evaluate.main([*common, *argv])
    assert not (tmp_path / "out.json").exists()


def test_kernel_cases_take_the_counts_of_heads():
    live = {"a/0": [[30, 10], [20, 20]]}
    measured = LiveCounts(**counts_file(live=live, realised_cr=3.2))
    for head_counts, cv in ((kernels.kernel_counts(0.5, None), 0.5), (kernels.kernel_counts(None, measured), 0.354)):
        for case in (
            slot_case(2, 1, 256, 100, 8, 4, 8, FP32, FP32, head_counts),
            slot_case(2, 8, 256, 100, 8, 4, 8, FP32, FP32, head_counts),
            update_case(2, 256, 100, 8, 4, 8, FP32, FP32, head_counts),
        ):
            memory, layer = kernels.memory_of(case), case.inputs[6 if case.kernel == "decode_update" else 1]
            slots = -(-(memory["live_max"] + 1) // 64) * 64
            assert case.shape["capacity"] == layer.capacity == slots and case.shape["live"] == 100
            assert memory["live_bytes"] == 2 * 4 * 100 * 2 * 8 * 4
            assert memory["allocated_bytes"] == 2 * 4 * (slots * (2 * 8 * 4 + 12) + 4)
            assert memory["live_cv"] == pytest.approx(cv, abs=0.03)
    read = {kernel for kernel, _ in kernels.cases(True, kernels.KERNELS, FP32, head_counts)}
    assert read == {"decode_attention", "chunk_attention", "page_attention", "decode_update"}


def test_pages_of_a_kernel_case_hold_the_counts_of_heads():
    case = page_case(2, 1, 256, 100, 8, 4, 8, FP32, FP32, kernels.kernel_counts(0.2, None))
    memory, (_, k_pages, _, table, in_ring, survivors) = kernels.memory_of(case), case.inputs
    assert memory["live_bytes"] == 2 * 4 * 100 * 2 * 8 * 4 and memory["live_cv"] == pytest.approx(0.2, abs=0.03)
    size, used = k_pages.shape[1], int((table > 0).sum())
    assert used == (-(-in_ring // size)).sum() + (-(-survivors // size)).sum()
    assert memory["allocated_bytes"] == (used + 1) * size * 2 * 8 * 4 + table.nbytes + in_ring.nbytes + survivors.nbytes


def test_kernel_case_with_too_few_heads_is_left_out_with_a_reason(monkeypatch):
    monkeypatch.setattr("benchmarks.timing.measure_ceilings", lambda *_: (None, []))
    options = kernels.parse(["--quick", "--kernel", "chunk_attention", "--ragged", "0.9"])
    (record,) = kernels.run(options, math.inf, kernels.kernel_counts(0.9, None))
    assert record["kernel"] == "chunk_attention" and "1 heads" in record["skipped"]
    assert "skipped" in kernels.described(record)
