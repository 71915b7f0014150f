"""Which file a weight is read from, and weights that are not numbers."""

import json
import os
import shutil
from pathlib import Path

import gguf
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hf.hf_cases import assert_own_regular_file, write_gguf
from safetensors.numpy import load_file, save_file

import dms_jax
from dms_jax.config import DMSConfig
from dms_jax.errors import ConfigError
from dms_jax.hf.safetensors_files import INDEX
from dms_jax.hf.weight_values import refuse_non_finite
from dms_jax.sharding import make_mesh

GOLDEN = Path(__file__).parents[1] / "golden"
NAME = "model.layers.1.mlp.up_proj.weight"
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def split(folder: Path, source: str = "mistral") -> dict[str, str]:
    """Write a golden model in two shards with an index, and return its weight map."""
    folder.mkdir()
    shutil.copy(GOLDEN / source / "config.json", folder)
    tensors = load_file(GOLDEN / source / "model.safetensors")
    names = sorted(tensors)
    weight_map = {name: FIRST if place < len(names) // 2 else SECOND for place, name in enumerate(names)}
    for file in (FIRST, SECOND):
        save_file({name: tensors[name] for name in names if weight_map[name] == file}, folder / file)
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    return weight_map


def up_proj(folder: Path) -> np.ndarray:
    return np.asarray(dms_jax.load(folder).layers.mlp.up[...][1]).T


@pytest.mark.parametrize("owner, other", [(FIRST, SECOND), (SECOND, FIRST)])
def test_weight_map_decides_which_of_two_files_a_tensor_comes_from(tmp_path, owner, other):
    weight_map = split(tmp_path / "model")
    right = load_file(GOLDEN / "mistral" / "model.safetensors")[NAME]
    for file, value in ((owner, right), (other, right * 2)):
        save_file(load_file(tmp_path / "model" / file) | {NAME: value}, tmp_path / "model" / file)
    (tmp_path / "model" / INDEX).write_text(json.dumps({"weight_map": weight_map | {NAME: owner}}))
    with pytest.warns(UserWarning, match=rf"1 tensors are in two files: {NAME} in {FIRST} and {SECOND}"):
        np.testing.assert_array_equal(up_proj(tmp_path / "model"), right)
    with pytest.warns(UserWarning, match="two files"):  # what is hashed is what is read
        assert dms_jax.base_hash(dms_jax.load(tmp_path / "model")) == dms_jax.base_hash(
            dms_jax.load(GOLDEN / "mistral")
        )


def test_tensor_in_two_files_without_a_decision_is_refused(tmp_path):
    weight_map = split(tmp_path / "model")
    other = SECOND if weight_map[NAME] == FIRST else FIRST
    save_file(load_file(tmp_path / "model" / other) | {NAME: np.zeros((2, 2), np.float32)}, tmp_path / "model" / other)
    del weight_map[NAME]
    (tmp_path / "model" / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ConfigError, match=f"two files.*must say which of them holds {NAME}"):
        dms_jax.load(tmp_path / "model")


def test_index_that_names_the_wrong_file_is_refused_although_another_file_has_the_tensor(tmp_path):
    weight_map = split(tmp_path / "model")
    weight_map[NAME] = SECOND if weight_map[NAME] == FIRST else FIRST
    (tmp_path / "model" / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ConfigError, match=f"names tensors that their files do not contain: {NAME}"):
        dms_jax.load(tmp_path / "model")


def test_file_that_the_index_does_not_know_is_said_and_not_read(tmp_path):
    """Mistral's own repositories have such a file: consolidated.safetensors, under other names."""
    split(tmp_path / "model")
    save_file({NAME: np.zeros((2, 2), np.float32)}, tmp_path / "model" / "consolidated.safetensors")
    with pytest.warns(UserWarning, match=r"consolidated\.safetensors is not read"):
        got = up_proj(tmp_path / "model")
    np.testing.assert_array_equal(got, load_file(GOLDEN / "mistral" / "model.safetensors")[NAME])


def test_two_sets_of_weights_in_one_folder_are_refused(tmp_path):
    """transformers would read model.safetensors, and other readers the index."""
    split(tmp_path / "model")
    shutil.copy(GOLDEN / "mistral" / "model.safetensors", tmp_path / "model")
    with pytest.raises(ConfigError, match="both model.safetensors and .*index.json.*outdated"):
        dms_jax.load(tmp_path / "model")


def single(folder: Path, source: str, change=None) -> Path:
    folder.mkdir()
    shutil.copy(GOLDEN / source / "config.json", folder)
    tensors = load_file(GOLDEN / source / "model.safetensors")
    save_file(change(tensors) if change else tensors, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("file", ["model.safetensors", "config.json", INDEX])
def test_weights_and_index_are_regular_files_of_the_folder_itself(tmp_path, file):
    assert_own_regular_file(dms_jax.load, single(tmp_path / "model", "mistral"), file, tmp_path)


def test_links_of_a_hub_cache_are_followed_to_its_blobs_only(tmp_path):
    model = tmp_path / "models--someone--model"
    (model / "blobs").mkdir(parents=True)
    (model / "snapshots").mkdir()
    folder = single(model / "snapshots" / "0123abc", "mistral")
    for name in os.listdir(folder):
        shutil.move(folder / name, model / "blobs" / name)
        (folder / name).symlink_to(Path("../../blobs") / name)
    assert dms_jax.load(folder).config.model_type == "mistral"
    assert dms_jax.load(shutil.copytree(folder, tmp_path / "copied")).config.model_type == "mistral"
    linked = tmp_path / "local_dir"  # as the hub's library filled a folder with links before its version 0.23
    linked.mkdir()
    for name in os.listdir(folder):
        (linked / name).symlink_to(model / "blobs" / name)
    assert dms_jax.load(linked).config.model_type == "mistral"
    shared = tmp_path / "blobs" / "0a"  # version 2 of the hub's library keeps the blobs of all models here
    shared.mkdir(parents=True)
    shutil.move(model / "blobs" / "model.safetensors", shared / "hash")
    (model / "blobs" / "model.safetensors").symlink_to("../../blobs/0a/hash")
    (tmp_path / "link").symlink_to(folder, target_is_directory=True)
    assert dms_jax.load(tmp_path / "link").config.model_type == "mistral"
    shutil.move(model / "blobs" / "config.json", model / "config.json")
    (folder / "config.json").unlink()
    (folder / "config.json").symlink_to("../../config.json")
    with pytest.raises(ConfigError, match="link that leaves"):
        dms_jax.load(folder)


def test_private_file_behind_a_link_is_not_exported(tmp_path):
    folder = single(tmp_path / "model", "mistral")
    (tmp_path / "secret").write_text("PRIVATE KEY")
    (folder / "LICENSE").symlink_to(tmp_path / "secret")
    (folder / "NOTICE").write_text("a notice")
    with pytest.warns(UserWarning, match="saving without LICENSE: .*link that leaves"):
        dms_jax.save(dms_jax.load(folder), tmp_path / "out")
    assert sorted(os.listdir(tmp_path / "out")) == ["NOTICE", "config.json", "model.safetensors"]


def test_base_hash_is_that_of_the_weights_that_were_loaded(tmp_path):
    folder = single(tmp_path / "model", "mistral")
    model = dms_jax.load(folder)
    os.utime(folder / "config.json")  # holds no weights
    assert dms_jax.base_hash(model) == dms_jax.base_hash(dms_jax.load(GOLDEN / "mistral"))
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {"model.norm.weight": tensors["model.norm.weight"] * 2}, folder / "model.safetensors")
    with pytest.raises(ConfigError, match="changed since this model was loaded; load it again"):
        dms_jax.base_hash(model)
    assert dms_jax.base_hash(dms_jax.load(folder)) != dms_jax.base_hash(dms_jax.load(GOLDEN / "mistral"))


DTYPES = [np.float16, ml_dtypes.bfloat16, np.float32, np.float64]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [np.nan, -np.nan, np.inf, -np.inf, 2.0**63, -(2.0**63)])
@pytest.mark.parametrize("place", [(0, 0), (6, 4), (3, 2)])
def test_one_bad_value_among_ordinary_ones_is_found(dtype, value, place):
    part = np.random.default_rng(0).standard_normal((7, 5)).astype(dtype)
    refuse_non_finite(NAME, part, "here")
    with np.errstate(over="ignore"):
        part[place] = value
    with pytest.raises(ConfigError, match=rf"{NAME} \(layer 1\) in here has (NaN|an infinity|a number beyond)"):
        refuse_non_finite(NAME, part, "here")


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_finite_value_below_the_limit_is_accepted(dtype):
    with np.errstate(over="ignore"):
        values = np.array([0.0, -0.0, 65504.0, -65504.0, 2.0**62, -(2.0**62), 1e-45, -1e-8], dtype)
    values = values[np.isfinite(values)]
    refuse_non_finite(NAME, values, "here")
    refuse_non_finite(NAME, np.empty((0, 3), dtype), "here")
    refuse_non_finite(NAME, values.reshape(-1, 2)[:, 1:], "here")  # not contiguous


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16])
@pytest.mark.parametrize("mesh", [None, (4, 2)])
def test_model_with_a_weight_that_is_no_number_is_refused_unless_allowed(tmp_path, dtype, mesh):
    def damage(tensors):
        tensors = {name: value.astype(dtype) for name, value in tensors.items()}
        tensors[NAME][-1, -1] = np.nan
        return tensors

    folder = single(tmp_path / "model", "qwen3_qk_norm", damage)
    options = {"mesh": mesh and make_mesh(*mesh)}
    with pytest.raises(ConfigError, match=rf"{NAME} \(layer 1\) in .* has NaN.*--allow-non-finite") as refusal:
        dms_jax.load(folder, **options)
    assert "\n" not in str(refusal.value)
    model = dms_jax.load(folder, allow_non_finite=True, **options)
    assert int(jnp.isnan(model.layers.mlp.up[...]).sum()) == 1


def test_gguf_weight_that_is_no_number_is_refused_unless_allowed(tmp_path):
    def damage(tensors):
        tensors["model.embed_tokens.weight"][5] = np.inf
        return tensors

    path = write_gguf(tmp_path / "x.gguf", "qwen2_qkv_bias", edit=damage, quantize=gguf.GGMLQuantizationType.F16)
    with pytest.raises(ConfigError, match="model.embed_tokens.weight in .*x.gguf has an infinity"):
        dms_jax.load(path)
    assert not jnp.isfinite(dms_jax.load(path, allow_non_finite=True).embed[...]).all()


@pytest.mark.parametrize("value", [np.nan, 1e38, np.inf])
def test_adapter_with_a_weight_that_overflows_is_refused_unless_allowed(tmp_path, value):
    model = dms_jax.load(GOLDEN / "qwen3_dms_projection_per_head")
    head = model.layers.attention.evict_proj
    head[...] = head[...].at[2].set(value)
    dms_jax.save_adapter(model, tmp_path / "policy")
    again = dms_jax.load(GOLDEN / "qwen3_dms_projection_per_head")
    with pytest.raises(ConfigError, match=r"layers.2.self_attn.dms_proj_alpha.weight \(layer 2\)"):
        dms_jax.load_adapter(again, tmp_path / "policy")
    assert dms_jax.load_adapter(again, tmp_path / "policy", allow_non_finite=True).source.policy.endswith("/policy")


@pytest.mark.parametrize("field", ["evict_logit_scale", "evict_logit_bias", "tau", "target_cr"])
@pytest.mark.parametrize("value", [1e300, float("nan")])
def test_policy_number_that_float32_cannot_hold_is_refused(field, value):
    with pytest.raises(ConfigError, match=field):
        DMSConfig(**{field: value})
