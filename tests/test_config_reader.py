"""Building configurations from plain values: types, ranges, overrides and merging."""

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Annotated, Literal

import pytest

from dms_jax.config import DMSConfig, ModelConfig
from dms_jax.config_reader import Above, AtLeast, Between, build, check_ranges, merge, range_of
from dms_jax.errors import ConfigError


@dataclass(frozen=True)
class Inner:
    share: Annotated[float, Between(0, 1)] = 0.5

    def __post_init__(self):
        check_ranges(self, "inner.")


@dataclass(frozen=True)
class Settings:
    steps: Annotated[int, AtLeast(1)] = 5
    rate: Annotated[float, Above(0)] = 0.1
    every: Annotated[int, AtLeast(1)] | None = None
    kind: Literal["a", 1] = "a"
    names: tuple[str, ...] = ()
    on: bool = False
    inner: Inner = field(default_factory=Inner)

    def __post_init__(self):
        check_ranges(self)


def test_values_are_built_with_their_types():
    raw = {"steps": 7, "rate": "1e-4", "every": None, "kind": 1, "names": "x", "on": True, "inner": {"share": 1}}
    assert build(Settings, raw) == Settings(7, 1e-4, None, 1, ("x",), True, Inner(1.0))
    assert build(Settings, {}) == Settings()


@pytest.mark.parametrize(
    "raw, key, value",
    [
        ({"stepz": 3}, "`stepz`", "did you mean steps"),
        ({"xyz": 3}, "`xyz`", "known: every, inner"),
        ({"inner": {"shares": 1}}, "`inner.shares`", "did you mean share"),
        ({"inner": 3}, "`inner`", "got 3"),
        ({"steps": 0}, "steps", ">= 1, got 0"),
        ({"steps": True}, "`steps`", "whole number, got True"),
        ({"steps": 4.5}, "`steps`", "whole number, got 4.5"),
        ({"steps": 2**31}, "steps", "2147483648"),
        ({"every": 0}, "every", ">= 1, got 0"),
        ({"rate": 0}, "rate", "> 0, got 0"),
        ({"rate": "fast"}, "`rate`", "number, got 'fast'"),
        ({"rate": math.nan}, "`rate`", "nan"),
        ({"inner": {"share": 1.5}}, "inner.share", "[0, 1], got 1.5"),
        ({"kind": True}, "`kind`", "a, 1; got True"),
        ({"on": "false"}, "`on`", "got 'false'"),
        ({"names": [3]}, "`names`", "got 3"),
    ],
)
def test_wrong_value_is_named_with_its_key(raw, key, value):
    with pytest.raises(ConfigError) as refusal:
        build(Settings, raw)
    message = str(refusal.value)
    assert key in message and value in message and "\n" not in message


@pytest.mark.parametrize("change", [{"steps": 0}, {"steps": 1.0}, {"steps": None}, {"rate": math.inf}, {"every": -1}])
def test_instances_made_in_code_are_checked_too(change):
    with pytest.raises(ConfigError, match=next(iter(change))):
        dataclasses.replace(Settings(), **change)


def test_ranges_print_and_contain_their_numbers():
    assert str(range_of(Annotated[int, AtLeast(1)] | None)) == ">= 1" and range_of(int) is None
    assert [x in Above(0) for x in (0, 1e-300, 2**40, math.inf, math.nan)] == [False, True, True, False, False]
    assert [x in Between(0, 1) for x in (0, 1, 1.01, math.nan)] == [True, True, False, False]


def test_merge_keeps_the_neighbors_of_a_given_key():
    into = {"a": {"x": 1, "y": 2}, "b": 3}
    merge(into, {"a": {"y": 4}, "b": {"z": 5}})
    assert into == {"a": {"x": 1, "y": 4}, "b": {"z": 5}}


@pytest.mark.parametrize(
    "key, value",
    [
        ("window_size", -1),
        ("window_size", 2**30 + 1),
        ("window_size", 2.5),
        ("target_cr", 0.99),
        ("target_cr", math.inf),
        ("tau", 0),
        ("evict_logit_scale", math.nan),
        ("evict_logit_bias", -math.inf),
    ],
)
def test_policy_ranges_are_checked_and_named(key, value):
    with pytest.raises(ConfigError, match=rf"dms\.{key} .*{value}"):
        DMSConfig(**{key: value})


@pytest.mark.parametrize(
    "key, value",
    [
        ("vocab_size", 0),
        ("num_layers", 4097),
        ("num_layers", None),
        ("hidden_size", 48.0),
        ("num_q_heads", 5),
        ("head_dim", 7),
        ("rms_norm_eps", -1e-6),
        ("rope_theta", 0.0),
        ("max_position_embeddings", 2**31),
    ],
)
def test_model_sizes_are_checked_and_named(key, value):
    good = ModelConfig("llama", 40, 48, 32, 3, 8, 4, 6, rope_theta=10**10)
    with pytest.raises(ConfigError, match=f"{key} .*{value}"):
        dataclasses.replace(good, **{key: value})
