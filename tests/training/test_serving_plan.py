"""Tests of train.plan --inference: closed forms, budgets and advice."""

import dataclasses
import math

import pytest

from dms_jax.config import DMSConfig
from dms_jax.errors import ConfigError
from dms_jax.hf.folder import read_config
from dms_jax.planning import roofline
from dms_jax.planning import serving_plan as serving_plan_module
from dms_jax.planning.flops import matmul_parameters
from dms_jax.planning.hardware import hardware_of
from dms_jax.planning.serving_plan import parse_bytes, serving_plan
from dms_jax.platform_defaults import platform_defaults
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
    assert arms["cr 8"]["capacity_per_layer"] == [math.ceil(1.5 * live / 64) * 64] * 36
    pair = 36 * 8 * (2 * 128 * 2 + 12)
    assert arms["dense"]["cache_bytes_per_user"] == context * pair
    assert arms["dense"]["most_users"] == int((found["memory_bytes"] - found["weight_bytes"]) // (context * pair))
    assert f"{arms['dense']['most_users']} users" in serving_text(made)


def test_exact_budgets_allocate_the_largest_budget_of_each_layer():
    config = dataclasses.replace(read_config(QWEN), num_layers=2).with_dms(DMSConfig(window_size=512))
    budgets = ((700,) * 8, (600, 3600, *[900] * 6))
    made = serving_plan(config, hardware_of("h200x1"), (1, 1), 1e11, 4, 3000, 1.5, (8,), budgets)
    arm = serving_json(made)["arms"][-1]
    assert arm["arm"] == "950 pairs" and arm["capacity_per_layer"] == [704, 3008]
    assert arm["realised_cr"] == pytest.approx(3000 * 16 / (8 * 700 + 600 + 3000 + 5400))
    assert arm["cache_bytes_per_user"] == 8 * (2 * 128 * 2 + 12) * (704 + 3008)
    assert "704 to 3008" in serving_text(made) and "CR 8" in " ".join(made.advice)


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


@pytest.mark.parametrize(("hardware", "multiple"), [("h200x1", 64), ("v5p-8", 128), ("cpu", 64)])
def test_serving_plan_rounds_capacity_as_the_platform_does(hardware, multiple, monkeypatch):
    monkeypatch.setattr(serving_plan_module, "copy_bandwidth", lambda: 1e10)
    config, target = read_config(QWEN).with_dms(DMSConfig(window_size=512)), hardware_of(hardware)
    assert platform_defaults(target.platform).capacity_multiple == multiple
    found = serving_json(serving_plan(config, target, (target.count, 1), 1e12, 1, 20000, 1.5, (2, 4, 8)))
    live = [20000, *(513 + (20000 - 513) / ratio for ratio in (2, 4, 8))]
    wanted = [live[0], *(1.5 * pairs for pairs in live[1:])]
    assert [arm["capacity_per_layer"][0] for arm in found["arms"]] == [
        math.ceil(min(20000, slots) / multiple) * multiple for slots in wanted
    ]


def test_cpu_serving_plan_uses_the_measured_bandwidth(monkeypatch):
    monkeypatch.setattr(serving_plan_module, "copy_bandwidth", lambda: 1e10)
    config = read_config(f"{MODELS}/smollm2-135m.json").with_dms(DMSConfig(window_size=128))
    found = serving_json(serving_plan(config, hardware_of("cpu"), (1, 1), 8e9, 1, 4096, 1.5, (8,)))
    weights, pairs = 4 * matmul_parameters(config), 4096 * 30 * 3 * (2 * 64 * 4 + 8)
    assert found["arms"][0]["tokens_per_second"] == pytest.approx(1e10 / (weights + pairs))
    assert "measured here" in found["source"]["tokens_per_second"]
    monkeypatch.undo()
    assert serving_plan_module.copy_bandwidth(1 << 20) > 0


def test_memory_sizes_are_parsed_with_their_units():
    assert parse_bytes("80GiB") == 80 * 2**30 and parse_bytes("1.5 gb") == 1.5e9 and parse_bytes("1000") == 1000
    for wrong in ("", "80 parsecs", "-3GiB", "0"):
        with pytest.raises(ConfigError, match="--memory"):
            parse_bytes(wrong)
