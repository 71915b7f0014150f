"""Helpers for messages: shortened values, suggested names and the place of an error."""

import pytest

from dms_jax.errors import ConfigError, naming, shown, suggestion


def test_suggestion_is_the_nearest_name_or_all_names():
    assert suggestion("tovaa", ["tova", "h2o"]) == "did you mean tova?"
    assert suggestion("xyz", ["tova", "h2o"]) == "known: h2o, tova"


VALUES = {
    "text": "x" * 10_000,
    "list": list(range(10_000)),
    "number": 10**10_000,
    "depth": {1: {2: {3: {4: {5: 6}}}}},
    "object": object(),
}


@pytest.mark.parametrize("value", VALUES.values(), ids=VALUES)
def test_shown_value_is_short(value):
    assert 0 < len(shown(value)) < 200


def test_shown_value_may_contain_itself():
    loop: list = []
    loop.append(loop)
    assert len(shown(loop)) < 200


def test_naming_puts_the_place_before_the_message_of_config_errors_only():
    with pytest.raises(ConfigError, match="^run.yaml: steps must be >= 1$"), naming("run.yaml"):
        raise ConfigError("steps must be >= 1")
    with pytest.raises(KeyError), naming("run.yaml"):
        raise KeyError("x")
