"""Tests of train.plan --inference: closed forms, budgets and advice."""

import dataclasses
import json
import math

import numpy as np
import pytest
from cases import tiny_model

import dms_jax
from dms_jax import init_pages
from dms_jax.commands import plan
from dms_jax.config import DMSConfig
from dms_jax.core.page_counts import MARGIN
from dms_jax.errors import ConfigError
from dms_jax.hf.folder import read_config
from dms_jax.planning import roofline
from dms_jax.planning import serving_plan as serving_plan_module
from dms_jax.planning.flops import matmul_parameters
from dms_jax.planning.hardware import hardware_of
from dms_jax.planning.serving_plan import parse_bytes, serving_plan
from dms_jax.platform_defaults import platform_defaults
from dms_jax.policies import BudgetedEviction
from dms_jax.training.planning.plan_text import serving_json, serving_text

MODELS = "configs/models"
QWEN = f"{MODELS}/qwen3-8b.json"


def test_serving_plan_follows_from_bytes():
    config, context, users = read_config(QWEN), 32768, 8
    config = config.with_dms(DMSConfig(window_size=512))
    made = serving_plan(config, hardware_of("h200x1"), (1, 1), None, users, context, 1.5, (2, 4, 8))
    found = serving_json(made)
    arms = {arm["arm"]: arm for arm in found["arms"]}
    # The same roofline as published for this model, window and batch at the whole 4.8 TB/s: 714 / 1520 / 1873 tokens/s.
    fraction = roofline.DECODE["gpu"].fraction
    for name, ceiling in (("dense", 714), ("cr 4", 1520), ("cr 8", 1873)):
        assert arms[name]["tokens_per_second"] / fraction == pytest.approx(ceiling, rel=0.03), name
    live = 513 + (context - 513) / 8
    assert arms["cr 8"]["realised_cr"] == pytest.approx(context / live, rel=1e-3)
    # A head has 9 pages of 64 for its newest 513 pairs. The number of pages is rounded up by at most a 32nd.
    pages = users * 36 * 8 * (9 + math.ceil(1.5 * (context - 513) / 8 / 64))
    assert pages < arms["cr 8"]["pages_per_device"] <= pages * 33 / 32
    page = 64 * 2 * 128 * 2 + 8  # and its references, and its place among the free pages
    dense = users * 36 * 8 * (page * context // 64 + 4 * (context // 64 + 1))
    assert dense < arms["dense"]["cache_bytes_per_user"] * users <= dense * 33 / 32
    free = found["memory_bytes"] - found["weight_bytes"]
    assert free / dense * 32 / 33 - 1 < arms["dense"]["most_users"] / users <= free / dense
    assert f"{arms['dense']['most_users']} users" in serving_text(made)


def test_exact_budgets_allocate_the_budget_of_each_head():
    config = dataclasses.replace(read_config(QWEN), num_layers=2).with_dms(DMSConfig(window_size=512))
    budgets = ((700,) * 8, (600, 3600, *[900] * 6))
    made = serving_plan(config, hardware_of("h200x1"), (1, 1), 1e11, 4, 3000, 1.5, (8,), budgets)
    arm = serving_json(made)["arms"][-1]
    # Behind the 9 pages for the window, with a score and a position for each pair: 187, 87, 3000 - 513 and 387 pairs.
    pages = 4 * (16 * 9 + 8 * 3 + 2 + 39 + 6 * 7)
    assert arm["arm"] == "950 pairs" and pages < arm["pages_per_device"] <= pages * 9 / 8
    assert arm["realised_cr"] == pytest.approx(3000 * 16 / (8 * 700 + 600 + 3000 + 5400))
    columns = 9 + math.ceil(3000 / 64)
    heads = 4 * 16 * (4 * columns + 4 + 513 + 1 + 4) + 4 * 4 + 4
    assert arm["cache_bytes_per_user"] * 4 == arm["pages_per_device"] * (64 * (2 * 128 * 2 + 8) + 8) + heads
    assert str(arm["pages_per_device"]) in serving_text(made) and "CR 8" in " ".join(made.advice)


@pytest.mark.parametrize(("users", "context"), [(1, 1000), (3, 130), (7, 2000)])
def test_plan_has_the_bytes_that_init_pages_allocates(monkeypatch, users, context):
    monkeypatch.setattr(serving_plan_module, "copy_bandwidth", lambda: 1e10)
    model = tiny_model(DMSConfig(window_size=100, target_cr=4.0), 0, num_layers=3, max_position_embeddings=4000)
    budgets = ((200, 150, 101, 901),) * 3
    policies = {"dense": "dense", "cr 4": None, "338 pairs": BudgetedEviction(model.config.dms, 338, budgets)}
    plan = serving_plan(model.config, hardware_of("cpu"), (1, 1), 1e9, users, context, MARGIN, (4,), budgets)
    for arm in serving_json(plan)["arms"]:
        cache = init_pages(model, users, context, policy=policies[arm["arm"]])
        assert round(arm["cache_bytes_per_user"] * users) == int(cache.bytes), arm["arm"]
        assert arm["pages_per_device"] == cache.arena.num_pages


KEPT = np.array([[0, 250, 1000, 7], [33, 500, 125, 990]])  # of the 1000 pairs behind a ring of 101


def counts_file(path, window=100, length=1101, less=0):
    """Write live counts of two rows, whose mean is the ring and KEPT."""
    more = np.minimum(KEPT, 1000 - KEPT) // 2
    live = {"a/0": (101 + KEPT - more - less).tolist(), "b/0": (101 + KEPT + more - less).tolist()}
    fields = {"model": "m", "policy": "dms@trained", "window_size": window, "length": length, "provenance": {}}
    path.write_text(json.dumps(fields | {"live": live, "realised_cr": length / np.mean([*live.values()])}))
    return str(path)


@pytest.mark.parametrize(("users", "context"), [(1, 1000), (3, 130), (5, 3000)])
def test_plan_with_measured_counts_has_the_bytes_that_init_pages_allocates(
    monkeypatch, tmp_path, capsys, users, context
):
    monkeypatch.setattr(serving_plan_module, "copy_bandwidth", lambda: 1e10)
    model = tiny_model(DMSConfig(window_size=100, target_cr=4.0), 0, num_layers=2, max_position_embeddings=4000)
    dms_jax.save(model, tmp_path / "model")
    argv = ["--model", str(tmp_path / "model"), "--hardware", "cpu", "--inference", "--json", "--memory", "30MB"]
    argv += ["--context", str(context), "--live", counts_file(tmp_path / "live.json"), "--headroom", "1.25"]

    def planned(users):
        assert plan.main([*argv, "--users", str(users)]) == 0
        return json.loads(capsys.readouterr().out)

    def cache_of(users):
        arm = planned(users)["arms"][1]
        cache = init_pages(model, users, context, num_pages=arm["pages_per_device"])
        assert round(arm["cache_bytes_per_user"] * users) == int(cache.bytes)
        return int(cache.bytes)

    found = planned(users)
    assert [arm["arm"] for arm in found["arms"]] == ["dense", "live"] and "CR 2.75" in " ".join(found["advice"])
    arm = found["arms"][1]
    assert arm["realised_cr"] == pytest.approx(context / (101 + (context - 101) * KEPT.mean() / 1000))
    # A head has 4 pages of 32 for its ring, and its own part of the other pairs with the headroom.
    behind = np.array([[math.ceil(min(1000, 1.25 * n) * (context - 101) / 1000 - 1e-9) for n in row] for row in KEPT])
    pages = 1 + users * int(np.sum(4 + np.ceil(behind / 32)))
    assert pages <= arm["pages_per_device"] <= math.ceil(pages * 9 / 8)
    cache_of(users)
    free = found["memory_bytes"] - found["weight_bytes"]
    assert cache_of(arm["most_users"]) <= free < cache_of(arm["most_users"] + 1)


def test_counts_that_every_head_keeps_alike_plan_like_a_ratio(monkeypatch):
    monkeypatch.setattr(serving_plan_module, "copy_bandwidth", lambda: 1e10)
    config = read_config(f"{MODELS}/smollm2-135m.json").with_dms(DMSConfig(window_size=128))
    arms = [
        serving_json(serving_plan(config, hardware_of("cpu"), (1, 1), 8e9, 3, 4096, 1.5, (4,), None, kept))["arms"][1]
        for kept in (None, np.full((30, 3), 1 / 4))
    ]
    assert arms[0] | {"arm": "live"} == arms[1] | {"realised_cr": pytest.approx(arms[0]["realised_cr"])}


@pytest.mark.parametrize(
    ("model", "fields", "named"),
    [
        ("smollm2-135m.json", {}, r"live.json has 2 layers of 4 KV heads, but --model has 30 of 3; measure"),
        ("tiny", {"window": 99}, r"live.json was measured with a window of 99, but the model has 100; .*--window 99"),
        ("tiny", {"less": 5}, r"live.json must have rows of more than 101 tokens .* 1101 tokens and 96 pairs"),
        ("tiny", {"length": 10}, r"live.json: .*from 1 to 10"),
    ],
)
def test_counts_that_do_not_fit_the_model_are_refused_in_one_line(tmp_path, model, fields, named):
    if model == "tiny":
        dms_jax.save(tiny_model(DMSConfig(window_size=100), 0, num_layers=2), tmp_path / "tiny")
    path = tmp_path / "tiny" if model == "tiny" else f"{MODELS}/{model}"
    argv = ["--model", str(path), "--hardware", "cpu", "--inference", "--context", "200", "--live"]
    with pytest.raises(ConfigError, match=named) as refusal:
        plan.main([*argv, counts_file(tmp_path / "live.json", **fields)])
    assert "\n" not in str(refusal.value)
    with pytest.raises(ConfigError, match="qwen3-8b.json: not a file of live counts"):
        plan.main([*argv, QWEN])


def test_serving_advice_says_where_compression_does_not_help():
    config = read_config(QWEN).with_dms(DMSConfig(window_size=512))
    told = lambda users, context: " ".join(
        serving_plan(config, hardware_of("h200x1"), (1, 1), None, users, context, 1.5, (2, 8)).advice
    )
    assert "will not help" in told(8, 400)
    assert "will not make this faster" in told(1, 2048)
    assert "Only DMS fits" in told(80, 32768)
    assert "times" not in told(8, 32768) and "x as fast as dense" in told(8, 32768)
    # With this many short rows, the matrix products are the bottleneck, and they do not depend on the cache.
    full = serving_json(serving_plan(config, hardware_of("h200x1"), (1, 1), 10**14, 10**6, 128, 1.5, (8,)))["arms"]
    rate = 0.74 * 989e12 / (2 * matmul_parameters(config) + 4 * 36 * 32 * 128 * 128)
    assert full[0]["tokens_per_second"] == pytest.approx(rate, rel=0.01)
    with pytest.raises(ConfigError, match=r"8\.0 GiB .* 1 x 15"):
        serving_plan(config, hardware_of("h200x1"), (1, 1), parse_bytes("8GiB"), 1, 4096, 1.5, (2,))


@pytest.mark.parametrize(("hardware", "size"), [("h200x1", 64), ("v5p-8", 128), ("cpu", 32)])
def test_serving_plan_has_pages_of_the_platform(hardware, size, monkeypatch):
    monkeypatch.setattr(serving_plan_module, "copy_bandwidth", lambda: 1e10)
    config, target = read_config(QWEN).with_dms(DMSConfig(window_size=512)), hardware_of(hardware)
    assert platform_defaults(target.platform).page_size == size
    found = serving_json(serving_plan(config, target, (target.count, 1), 1e12, 1, 20000, 1.5, (2, 4, 8)))
    ring = math.ceil(513 / size)
    for arm, ratio in zip(found["arms"][1:], (2, 4, 8), strict=True):
        pages = 36 * 8 * (ring + math.ceil((20000 - 513) * min(1, 1.5 / ratio) / size))
        assert pages < arm["pages_per_device"] <= pages * 33 / 32 + 1


def test_cpu_serving_plan_uses_the_measured_bandwidth(monkeypatch):
    monkeypatch.setattr(serving_plan_module, "copy_bandwidth", lambda: 1e10)
    config = read_config(f"{MODELS}/smollm2-135m.json").with_dms(DMSConfig(window_size=128))
    found = serving_json(serving_plan(config, hardware_of("cpu"), (1, 1), 8e9, 1, 4096, 1.5, (8,)))
    weights, pairs = 4 * matmul_parameters(config), 4096 * 30 * 3 * 2 * 64 * 4
    assert found["arms"][0]["tokens_per_second"] == pytest.approx(1e10 / (weights + pairs))
    assert "measured here" in found["source"]["tokens_per_second"]
    monkeypatch.undo()
    assert serving_plan_module.copy_bandwidth(1 << 20) > 0


def test_memory_sizes_are_parsed_with_their_units():
    assert parse_bytes("80GiB") == 80 * 2**30 and parse_bytes("1.5 gb") == 1.5e9 and parse_bytes("1000") == 1000
    for wrong in ("", "80 parsecs", "-3GiB", "0"):
        with pytest.raises(ConfigError, match="--memory"):
            parse_bytes(wrong)
