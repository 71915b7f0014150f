"""Opening a model with its tokenizer for a command: which file is to blame, and where the policy came from."""

import shutil
import sys
import warnings
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from hf.hf_cases import assert_own_regular_file, write_tokenizer
from safetensors.numpy import load_file, save_file

import dms_jax
from dms_jax.command import run_command
from dms_jax.commands import evaluate, generate, hyperscale
from dms_jax.errors import ConfigError
from dms_jax.hf.folder import policy_origin
from dms_jax.hf.open_model import open_model

GOLDEN = Path(__file__).parents[1] / "golden"
PROJECTION = "qwen3_dms_projection_per_head"


@pytest.fixture
def folder(tmp_path) -> Path:
    path = shutil.copytree(GOLDEN / PROJECTION, tmp_path / "model", ignore=shutil.ignore_patterns("tensors.*"))
    return write_tokenizer(path)


def test_policy_and_its_file_are_printed_once(folder, tmp_path, capsys):
    model, _ = open_model(str(folder), None, jnp.float32)
    line = f"policy: projection, window {model.config.dms.window_size}, target CR {model.config.dms.target_cr:g}, from "
    assert capsys.readouterr().err == f"{line}{folder / 'config.json'}\n"
    dms_jax.save_adapter(model, tmp_path / "policy.safetensors")
    open_model(str(folder), str(tmp_path / "policy.safetensors"), jnp.float32)
    assert capsys.readouterr().err == f"{line}{tmp_path / 'policy.safetensors'}\n"


def test_model_without_a_policy_or_with_one_given_in_code_names_no_file(capsys):
    plain = dms_jax.load(GOLDEN / "mistral")
    assert policy_origin(plain) == "" == policy_origin(dms_jax.load(GOLDEN / "mistral", dms=dms_jax.DMSConfig()))
    given = dms_jax.load(GOLDEN / PROJECTION, dms=dms_jax.load(GOLDEN / PROJECTION).config.dms)
    assert policy_origin(given).endswith(f"{PROJECTION}/config.json")


@pytest.mark.parametrize("text", ["{", "[]", '{"model_type": "llama", "model_type": "qwen2"}', '{"model_type": 5}'])
def test_damaged_config_is_blamed_on_itself_and_not_on_the_tokenizer(folder, text):
    (folder / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=r"config\.json|model_type") as refusal:
        open_model(str(folder), None, jnp.float32)
    assert "tokenizer" not in str(refusal.value)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"])
def test_tokenizer_files_are_regular_files_of_the_folder_itself(folder, tmp_path, name):
    assert_own_regular_file(dms_jax.load_tokenizer, folder, name, tmp_path)


def test_commands_that_load_a_model_allow_weights_that_are_no_numbers_only_when_told(folder):
    for command in (generate, evaluate, hyperscale):
        assert command.parse(["--model", "x", "--allow-non-finite"]).allow_non_finite
        assert not command.parse(["--model", "x"]).allow_non_finite
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {"model.norm.weight": tensors["model.norm.weight"] * np.nan}, folder / "model.safetensors")
    with pytest.raises(ConfigError, match="model.norm.weight in .* has NaN"):
        open_model(str(folder), None, jnp.float32)
    model, _ = open_model(str(folder), None, jnp.float32, allow_non_finite=True)
    assert jnp.isnan(model.final_norm[...]).all()


def test_warning_of_a_command_is_one_line(capsys, monkeypatch):
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)  # put back afterwards

    def main():  # pytest itself records warnings, so this asks only for the text
        sys.stderr.write(warnings.formatwarning(UserWarning("a file is\nnot read"), UserWarning, "code.py", 1))

    with pytest.raises(SystemExit):
        run_command("generate", main)
    assert capsys.readouterr().err.endswith("generate: warning: a file is not read\n")
