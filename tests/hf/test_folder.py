"""`load` and `save`: folders that others can open, tensors that come back bit for bit, and refusals."""

import dataclasses
import fnmatch
import json
import os
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

import dms_jax
from dms_jax.config import DMSConfig, ModelConfig
from dms_jax.errors import ConfigError
from dms_jax.hf import folder as folder_module
from dms_jax.models.decoder import Decoder
from dms_jax.sharding import make_mesh

GOLDEN = Path(__file__).parents[1] / "golden"
TOKENS = jnp.arange(1, 41).reshape(2, 20)
PROJECTION = GOLDEN / "qwen3_dms_projection_per_head"
PLAIN = GOLDEN / "qwen3_qk_norm"


def as_dtype(tmp_path: Path, source: Path, dtype) -> Path:
    folder = tmp_path / f"{source.name}_{np.dtype(dtype).name}"
    shutil.copytree(source, folder)
    save_file(
        {k: v.astype(dtype) for k, v in load_file(source / "model.safetensors").items()}, folder / "model.safetensors"
    )
    return folder


def files(folder: Path) -> dict[str, bytes]:
    return {
        name: value.tobytes()
        for file in sorted(folder.glob("model*.safetensors"))
        for name, value in load_file(file).items()
    }


def test_saved_folders_load_to_the_same_policy_and_logits(tmp_path):
    for name in ("qwen3_dms_projection_per_layer", "llama3_rope_scaled"):
        model = dms_jax.load(GOLDEN / name)
        dms_jax.save(model, tmp_path / name)
        again = dms_jax.load(tmp_path / name)
        assert again.config == model.config
        run = type(model).dense if model.config.dms is None else type(model).hard
        jax.tree.map(np.testing.assert_array_equal, run(again, TOKENS), run(model, TOKENS))


def test_borrowed_policy_survives_and_saving_it_warns(tmp_path):
    model = dms_jax.load(GOLDEN / "qwen3_dms_borrowed_query_channel")
    with pytest.warns(UserWarning, match="borrowed-channel"):
        dms_jax.save(model, tmp_path / "out")
    again = dms_jax.load(tmp_path / "out")
    assert again.config.dms == model.config.dms and again.config.dms.variant == "borrowed"
    np.testing.assert_array_equal(again.hard(TOKENS)[0], model.hard(TOKENS)[0])


def test_exported_head_has_the_names_shapes_and_keys_of_model_optimizer(tmp_path):
    """The reference is a golden folder that Model-Optimizer itself wrote."""
    dms = dms_jax.load(PROJECTION).config.dms
    base = {k: v for k, v in load_file(PROJECTION / "model.safetensors").items() if ".dms_proj_alpha" not in k}
    raw = json.loads((PROJECTION / "config.json").read_text())
    (tmp_path / "base").mkdir()
    save_file(base, tmp_path / "base" / "model.safetensors")
    (tmp_path / "base" / "config.json").write_text(
        json.dumps({k: v for k, v in raw.items() if not k.startswith("dms_")})
    )
    dms_jax.save(dms_jax.load(tmp_path / "base", dms=dms), tmp_path / "out")
    theirs, ours = (load_file(folder / "model.safetensors") for folder in (PROJECTION, tmp_path / "out"))
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    for key in (
        "dms_alpha_scale",
        "dms_initial_alpha_offset",
        "dms_window_size",
        "dms_cr",
        "dms_separate_alpha",
        "dms_alpha_per",
        "dms_tau",
    ):
        assert written[key] == raw[key], key
    assert written["architectures"] == ["Qwen3ForCausalLM"]


@pytest.mark.parametrize("source_dtype", [ml_dtypes.bfloat16, np.float16, np.float32])
@pytest.mark.parametrize("dtype, mesh", [(jnp.float32, None), (jnp.bfloat16, None), (jnp.bfloat16, (4, 2))])
def test_untrained_base_is_written_back_bit_for_bit_whatever_dtype_it_was_loaded_in(
    tmp_path, source_dtype, dtype, mesh
):
    source = as_dtype(tmp_path, PLAIN, source_dtype)
    model = dms_jax.load(source, dtype=dtype, mesh=mesh and make_mesh(*mesh), dms=DMSConfig())
    dms_jax.save(model, tmp_path / "out")
    got, want = files(tmp_path / "out"), files(source)
    assert {k: v for k, v in got.items() if ".dms_proj_alpha" not in k} == want
    assert dms_jax.base_hash(dms_jax.load(tmp_path / "out")) == dms_jax.base_hash(model)
    head = load_file(tmp_path / "out" / "model.safetensors")
    assert all(v.dtype == np.float32 for k, v in head.items() if ".dms_proj_alpha" in k)


def test_trained_weights_are_written_instead_of_those_of_the_source(tmp_path):
    model = dms_jax.load(as_dtype(tmp_path, PLAIN, np.float32), dtype=jnp.bfloat16)
    model.final_norm[...] = model.final_norm[...] + 1
    dms_jax.save(model, tmp_path / "out")
    written = load_file(tmp_path / "out" / "model.safetensors")["model.norm.weight"]
    np.testing.assert_array_equal(written, np.asarray(model.final_norm[...], np.float32))
    assert dms_jax.base_hash(dms_jax.load(tmp_path / "out")) != dms_jax.base_hash(model)


def test_fresh_evict_head_never_evicts_and_does_not_change_the_teacher():
    model = dms_jax.load(PLAIN, dms=DMSConfig(window_size=2))
    logits, evict = model.hard(TOKENS)
    assert not evict.any()
    np.testing.assert_allclose(logits, dms_jax.load(PLAIN).dense(TOKENS), atol=1e-5)


def test_only_run_time_fields_of_a_trained_policy_may_be_replaced():
    own = dms_jax.load(PROJECTION).config.dms
    assert dms_jax.load(PROJECTION, dms=own).config.dms == own
    assert dms_jax.load(PROJECTION, dms=dataclasses.replace(own, window_size=3)).config.dms.window_size == 3
    for change in ({"variant": "borrowed"}, {"decision_shift": 0}, {"evict_logit_bias": 1.0}, {"granularity": "layer"}):
        with pytest.raises(ConfigError, match=f"dms.{next(iter(change))}="):
            dms_jax.load(PROJECTION, dms=dataclasses.replace(own, **change))


def edited(folder: Path, edit) -> None:
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(edit(raw)))


def test_hidden_units_of_a_folder_must_be_those_of_its_key_and_of_the_request(tmp_path):
    """A linear folder with units asked for, a folder with units and a linear request, and files that contradict."""
    own = dms_jax.load(PROJECTION).config.dms
    with pytest.raises(ConfigError, match="dms.head_units=0, got 8") as refusal:
        dms_jax.load(PROJECTION, dms=dataclasses.replace(own, head_units=8))
    assert "\n" not in str(refusal.value)
    units = dataclasses.replace(own, head_units=8)
    dms_jax.save(dms_jax.load(PLAIN, dms=units), tmp_path / "units")
    assert dms_jax.load(tmp_path / "units").config.dms == units
    with pytest.raises(ConfigError, match="dms.head_units=8, got 0"):
        dms_jax.load(tmp_path / "units", dms=own)
    edited(tmp_path / "units", lambda raw: {k: v for k, v in raw.items() if k != "dms_head_units"})
    with pytest.raises(ConfigError, match="set dms_head_units to its hidden units in config.json"):
        dms_jax.load(tmp_path / "units")
    edited(tmp_path / "units", lambda raw: raw | {"dms_head_units": 9})
    with pytest.raises(ConfigError, match=r"dms_proj_alpha_units_in\.weight .*must have shape \[9, "):
        dms_jax.load(tmp_path / "units")
    dms_jax.save(dms_jax.load(PROJECTION), tmp_path / "linear")
    edited(tmp_path / "linear", lambda raw: raw | {"dms_head_units": 9})
    with pytest.raises(ConfigError, match=r"lacks 9 tensors: .*dms_proj_alpha_units_in"):
        dms_jax.load(tmp_path / "linear")


def test_folder_for_model_optimizer_has_a_policy_that_it_can_run(tmp_path):
    dms_jax.save(dms_jax.load(PROJECTION), tmp_path / "linear", model_optimizer=True)
    assert files(tmp_path / "linear") == files(PROJECTION)
    dms_jax.save(dms_jax.load(PLAIN), tmp_path / "dense", model_optimizer=True)
    for changed in ({"head_units": 8}, {"decision_shift": 0}):
        model = dms_jax.load(PLAIN, dms=DMSConfig(**changed))
        with pytest.raises(ConfigError, match=f"Model-Optimizer.*dms.{next(iter(changed))}=") as refusal:
            dms_jax.save(model, tmp_path / "out", model_optimizer=True)
        assert "\n" not in str(refusal.value) and not (tmp_path / "out").exists()


def test_source_survives_split_merge_and_jit():
    model = dms_jax.load(PLAIN)
    graph, state = nnx.split(model)
    assert nnx.merge(graph, state).source == model.source
    assert hash(graph) == hash(nnx.split(dms_jax.load(PLAIN))[0]), (
        "two loads of one folder must share compiled functions"
    )
    np.testing.assert_allclose(jax.jit(lambda t: model.dense(t))(TOKENS), model.dense(TOKENS), atol=1e-5)
    np.testing.assert_allclose(
        jax.jit(lambda s: nnx.merge(graph, s).dense(TOKENS))(state), model.dense(TOKENS), atol=1e-5
    )


def test_shards_have_an_index_and_load_back(tmp_path):
    model = dms_jax.load(PLAIN)
    dms_jax.save(model, tmp_path / "out", shard_bytes=60_000)
    names = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert len(names) > 2 and names[0] == f"model-00001-of-{len(names):05d}.safetensors"
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert sorted(set(index["weight_map"].values())) == names
    assert index["metadata"]["total_size"] == sum(map(len, files(tmp_path / "out").values()))
    assert files(tmp_path / "out") == files(PLAIN)
    np.testing.assert_array_equal(dms_jax.load(tmp_path / "out").dense(TOKENS), model.dense(TOKENS))


def test_tokenizer_files_are_copied_and_nothing_else(tmp_path):
    source = as_dtype(tmp_path, PLAIN, np.float32)
    for name in (
        "tokenizer.json",
        "tokenizer_config.json",
        "generation_config.json",
        "chat_template.jinja",
        "README.md",
        "evil.py",
    ):
        (source / name).write_text("{}")
    dms_jax.save(dms_jax.load(source), tmp_path / "out")
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        "tokenizer.json",
        "tokenizer_config.json",
        "generation_config.json",
        "chat_template.jinja",
        "config.json",
        "model.safetensors",
    }


def test_random_model_saves_and_loads(tmp_path):
    config = ModelConfig(
        "llama", 40, 48, 32, 3, 8, 4, 6, qkv_bias=True, o_bias=True, mlp_bias=True, dms=DMSConfig(window_size=4)
    )
    model = Decoder(config, rngs=nnx.Rngs(0))
    dms_jax.save(model, tmp_path / "out")
    again = dms_jax.load(tmp_path / "out")
    assert again.config == config
    np.testing.assert_array_equal(again.dense(TOKENS % 40), model.dense(TOKENS % 40))
    assert dms_jax.base_hash(again) == dms_jax.base_hash(model)


def test_existing_folder_is_refused_and_overwrite_replaces_model_folders_only(tmp_path):
    model = dms_jax.load(PLAIN)
    (tmp_path / "empty").mkdir()
    dms_jax.save(model, tmp_path / "empty")
    with pytest.raises(ConfigError, match="overwrite=True"):
        dms_jax.save(model, tmp_path / "empty")
    dms_jax.save(dms_jax.load(PLAIN, dms=DMSConfig()), tmp_path / "empty", overwrite=True)
    assert dms_jax.load(tmp_path / "empty").config.dms == DMSConfig()
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "thesis.txt").write_text("years of work")
    with pytest.raises(ConfigError, match="notes.*model folder"):
        dms_jax.save(model, tmp_path / "notes", overwrite=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty", "notes"]


def test_source_folder_can_be_overwritten(tmp_path):
    source = as_dtype(tmp_path, PLAIN, np.float32)
    want = files(source)
    dms_jax.save(dms_jax.load(source, dtype=jnp.bfloat16), source, overwrite=True)
    assert files(source) == want


def test_failed_save_keeps_the_old_folder_and_leaves_no_temporary_one(tmp_path, monkeypatch):
    dms_jax.save(dms_jax.load(PLAIN), tmp_path / "out")
    before = files(tmp_path / "out")

    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(folder_module, "write_folder", full_disk)
    with pytest.raises(ConfigError, match="cannot write .*No space left"):
        dms_jax.save(dms_jax.load(PLAIN), tmp_path / "out", overwrite=True)
    with pytest.raises(ConfigError, match="No space left"):
        dms_jax.save(dms_jax.load(PLAIN), tmp_path / "new")
    assert [p.name for p in tmp_path.iterdir()] == ["out"] and files(tmp_path / "out") == before


def test_base_hash_covers_the_base_alone(tmp_path):
    assert dms_jax.base_hash(dms_jax.load(PLAIN)) == dms_jax.base_hash(
        dms_jax.load(PLAIN, dtype=jnp.bfloat16, dms=DMSConfig())
    )
    other = as_dtype(tmp_path, PLAIN, ml_dtypes.bfloat16)
    assert dms_jax.base_hash(dms_jax.load(other)) != dms_jax.base_hash(dms_jax.load(PLAIN))
    model = dms_jax.load(other)
    shutil.rmtree(other)
    with pytest.raises(ConfigError, match="no longer exists"):
        dms_jax.base_hash(model)


@pytest.mark.parametrize(
    "path, words",
    [
        ("nowhere", "no such folder"),
        ("/no/such/place", "no such folder"),
        ("./a/b", "no such folder"),
        (GOLDEN, "no config.json"),
        (PLAIN / "config.json", "give the folder"),
    ],
)
def test_wrong_paths_are_distinguished(path, words):
    with pytest.raises(ConfigError, match=words):
        dms_jax.load(path)


def test_hub_id_without_a_network_gives_one_line(monkeypatch):
    import huggingface_hub

    def offline(*_, **__):
        raise OSError("Cannot reach the hub\nand a long explanation")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(ConfigError, match="someone/model.*Cannot reach the hub$"):
        dms_jax.load("someone/model")


def test_second_copies_of_the_weights_in_a_hub_repository_are_not_downloaded(monkeypatch, tmp_path):
    import huggingface_hub

    names = ["config.json", "model.safetensors", "consolidated.safetensors", "original/params.json", "tokenizer.json"]

    def download(name, *, allow_patterns, ignore_patterns):
        matches = lambda file, patterns: any(fnmatch.fnmatch(file, pattern) for pattern in patterns)
        wanted.extend(f for f in names if matches(f, allow_patterns) and not matches(f, ignore_patterns))
        return str(tmp_path)

    wanted = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert folder_module.resolve("someone/model") == str(tmp_path)
    assert wanted == ["config.json", "model.safetensors", "tokenizer.json"]


def test_path_may_be_non_ascii_and_relative(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    dms_jax.save(dms_jax.load(PLAIN), "模型 é")
    assert dms_jax.load("模型 é").source.path == os.path.join(str(tmp_path), "模型 é")


@pytest.mark.parity
@pytest.mark.parametrize(
    "name", ["qwen3_dms_projection_per_head", "llama3_rope_scaled", "qwen2_qkv_bias", "mistral", "biased"]
)
def test_transformers_opens_a_saved_folder_as_the_dense_base(tmp_path, name):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    if name == "biased":  # every bias, with a config.json of our own
        model = Decoder(
            ModelConfig("llama", 64, 48, 32, 3, 8, 4, 6, qkv_bias=True, o_bias=True, mlp_bias=True), rngs=nnx.Rngs(0)
        )
        for part in (model.layers.attention, model.layers.mlp):
            for key in [key for key in vars(part) if key.endswith("_bias")]:
                getattr(part, key)[...] = 0.1 * jax.random.normal(jax.random.key(len(key)), getattr(part, key).shape)
    else:
        model = dms_jax.load(GOLDEN / name)
    dms_jax.save(model, tmp_path / "out")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32, attn_implementation="eager")
    logits = theirs(torch.tensor(np.array(TOKENS))).logits.detach().numpy()
    np.testing.assert_allclose(model.dense(TOKENS), logits, atol=1e-4)
