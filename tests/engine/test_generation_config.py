"""The sampling settings in generation_config.json."""

import json

import pytest

from dms_jax.engine.generation_config import sampling_defaults
from dms_jax.errors import ConfigError

ALL = {"temperature": 0.6, "top_k": 20, "top_p": 0.95, "min_p": 0.05, "repetition_penalty": 1.1}


@pytest.mark.parametrize(
    ("raw", "want"),
    [
        ({}, {}),
        (ALL | {"do_sample": True}, ALL),
        (ALL | {"do_sample": False}, {"repetition_penalty": 1.1}),
        (ALL, {"repetition_penalty": 1.1}),
        ({"do_sample": True}, {"temperature": 1.0}),
        ({"do_sample": True, "temperature": None, "top_p": 1.0, "top_k": 0}, {"temperature": 1.0}),
        ({"do_sample": True, "temperature": 1, "top_k": -1}, {"temperature": 1}),
        ({"do_sample": False, "temperature": 0.0, "top_p": 7}, {}),  # without an effect, so not checked
        ({"do_sample": None, "repetition_penalty": 1.0, "max_new_tokens": 2048}, {}),
    ],
)
def test_settings_with_an_effect_are_returned(tmp_path, raw, want):
    (tmp_path / "generation_config.json").write_text(json.dumps(raw))
    assert sampling_defaults(tmp_path) == want


def test_sources_without_the_file_have_no_settings(tmp_path):
    assert sampling_defaults(tmp_path) == sampling_defaults(tmp_path / "model.gguf") == {}


@pytest.mark.parametrize("raw", [{"temperature": -1}, {"top_p": 0}, {"top_k": "x"}, {"repetition_penalty": 0}])
def test_settings_out_of_range_are_refused(tmp_path, raw):
    (tmp_path / "generation_config.json").write_text(json.dumps({"do_sample": True} | raw))
    with pytest.raises(ConfigError, match=f"generation_config.json: {next(iter(raw))} .*got"):
        sampling_defaults(tmp_path)


def test_settings_of_the_model_without_effect_are_said_and_wrong_ones_refused(tmp_path):
    path = tmp_path / "generation_config.json"
    path.write_text(json.dumps({"num_beams": 1, "suppress_tokens": [], "typical_p": 1.0}))
    assert sampling_defaults(tmp_path) == {}
    path.write_text(json.dumps({"num_beams": 4, "bad_words_ids": [[3]]}))
    with pytest.warns(UserWarning, match="bad_words_ids, num_beams have no effect"):
        sampling_defaults(tmp_path)
    path.write_text(json.dumps({"do_sample": "true"}))
    with pytest.raises(ConfigError, match="do_sample must be true or false, got 'true'"):
        sampling_defaults(tmp_path)
