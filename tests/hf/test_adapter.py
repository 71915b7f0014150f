"""Adapter files: an evict head in a few small tensors, bound to one base."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import dms_jax
from dms_jax.config import DMSConfig
from dms_jax.errors import ConfigError
from dms_jax.hf.safetensors_files import SafetensorsFiles
from dms_jax.sharding import make_mesh

GOLDEN = Path(__file__).parents[1] / "golden"
TRAINED = GOLDEN / "qwen3_dms_projection_per_head"
TOKENS = jnp.arange(1, 61).reshape(2, 30)


@pytest.fixture
def base(tmp_path) -> Path:
    """The dense base of the trained golden model."""
    folder = tmp_path / "base"
    folder.mkdir()
    save_file(
        {k: v for k, v in load_file(TRAINED / "model.safetensors").items() if "dms_proj" not in k},
        folder / "model.safetensors",
    )
    raw = json.loads((TRAINED / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({k: v for k, v in raw.items() if not k.startswith("dms_")}))
    return folder


@pytest.fixture
def adapter(tmp_path) -> Path:
    dms_jax.save_adapter(dms_jax.load(TRAINED), tmp_path / "policy.safetensors")
    return tmp_path / "policy.safetensors"


def test_adapter_holds_two_tensors_per_layer_under_the_names_of_model_optimizer(adapter):
    assert load_file(adapter).keys() == {k for k in load_file(TRAINED / "model.safetensors") if "dms_proj" in k}
    assert len(load_file(adapter)) == 2 * 3


@pytest.mark.parametrize(
    "dms, dtype, mesh",
    [(None, jnp.float32, None), (DMSConfig(window_size=99), jnp.float32, None), (None, jnp.float32, (4, 2))],
)
def test_base_plus_adapter_equals_the_trained_model(base, adapter, dms, dtype, mesh):
    trained = dms_jax.load(TRAINED)
    plain = dms_jax.load(base, dtype=dtype, dms=dms, mesh=mesh and make_mesh(*mesh))
    adapted = dms_jax.load_adapter(plain, adapter)
    assert adapted.config == trained.config and plain.config.dms == dms
    assert adapted.embed[...] is plain.embed[...], "the base is shared, not copied"
    logits, evict = adapted.hard(TOKENS)
    want, want_evict = trained.hard(TOKENS)
    np.testing.assert_array_equal(evict, want_evict)
    np.testing.assert_allclose(logits, want, atol=1e-5)
    assert evict.any()
    if mesh:
        assert adapted.layers.attention.evict_proj[...].sharding.mesh.shape == {"data": 4, "model": 2}


def test_adapter_fits_its_base_in_another_dtype_and_its_export(base, adapter, tmp_path):
    dms_jax.save(dms_jax.load_adapter(dms_jax.load(base, dtype=jnp.bfloat16), adapter), tmp_path / "merged")
    want, got = load_file(TRAINED / "model.safetensors"), load_file(tmp_path / "merged" / "model.safetensors")
    assert {k: v.tobytes() for k, v in got.items()} == {k: v.tobytes() for k, v in want.items()}
    again = dms_jax.load_adapter(dms_jax.load(tmp_path / "merged"), adapter)
    np.testing.assert_array_equal(again.hard(TOKENS)[1], dms_jax.load(TRAINED).hard(TOKENS)[1])


def test_head_with_hidden_units_round_trips_in_folder_and_adapter(base, adapter, tmp_path):
    """Base plus adapter, the merged folder and the model itself give equal logits and decisions, bit for bit."""
    model = dms_jax.load(base, dms=DMSConfig(window_size=4, head_units=5, evict_logit_bias=0.0, decision_shift=0))
    attention = model.layers.attention
    names = ("evict_proj", "evict_units_bias", "evict_units_out")
    for key, head in zip(jax.random.split(jax.random.key(0), 3), (getattr(attention, n) for n in names), strict=True):
        head[...] = 0.1 * jax.random.normal(key, head[...].shape)
    dms_jax.save_adapter(model, tmp_path / "units.safetensors")
    assert len(load_file(tmp_path / "units.safetensors")) == 5 * model.config.num_layers
    adapted = dms_jax.load_adapter(dms_jax.load(base), tmp_path / "units.safetensors")
    dms_jax.save(adapted, tmp_path / "merged")
    merged = dms_jax.load(tmp_path / "merged")
    want = model.hard(TOKENS)
    assert 0.1 < want[1].mean() < 0.9
    for same in (adapted, merged):
        assert same.config == model.config
        jax.tree.map(np.testing.assert_array_equal, same.hard(TOKENS), want)
    # A linear head in place of one with units, and back; no key of the other is left over.
    linear = dms_jax.load_adapter(merged, adapter)
    dms_jax.save(linear, tmp_path / "linear")
    again = dms_jax.load(tmp_path / "linear")
    assert not again.config.dms.head_units
    np.testing.assert_array_equal(again.hard(TOKENS)[1], dms_jax.load(TRAINED).hard(TOKENS)[1])
    back = dms_jax.load_adapter(again, tmp_path / "units.safetensors")
    np.testing.assert_array_equal(back.hard(TOKENS)[1], want[1])


def test_cache_of_a_model_belongs_to_its_hidden_units(base, tmp_path):
    """A cache of other weights out of the units, or of none, is another model's."""
    dms = DMSConfig(window_size=4, head_units=5)
    model = dms_jax.load(base, dms=dms)
    _, cache = dms_jax.prefill(model, dms_jax.init_cache(model, 2, 40), TOKENS)
    dms_jax.save_cache(model, cache, tmp_path / "cache")
    assert dms_jax.load_cache(model, tmp_path / "cache").seen.tolist() == [30, 30]
    with pytest.raises(ConfigError, match="another model"):
        dms_jax.load_cache(dms_jax.load(base, dms=DMSConfig(window_size=4)), tmp_path / "cache")
    model.layers.attention.evict_units_out[...] = model.layers.attention.evict_units_out[...] + 1e-3
    with pytest.raises(ConfigError, match="evict_head_sha256"):
        dms_jax.load_cache(model, tmp_path / "cache")


def test_other_base_is_refused(base, adapter):
    tensors = load_file(base / "model.safetensors")
    tensors["model.norm.weight"] = np.nextafter(tensors["model.norm.weight"], np.float32(2))
    save_file(tensors, base / "model.safetensors")
    with pytest.raises(ConfigError, match="sha256 [0-9a-f]{12}"):
        dms_jax.load_adapter(dms_jax.load(base), adapter)


def rewrite(path: Path, tensors=None, **metadata) -> None:
    header = SafetensorsFiles("", [str(path)]).metadata | metadata
    save_file(tensors or load_file(path), path, {k: v for k, v in header.items() if v is not None})


def another_scale(path: Path) -> str:
    policy = json.loads(SafetensorsFiles("", [str(path)]).metadata["dms"])
    return json.dumps(policy | {"dms_alpha_scale": policy["dms_alpha_scale"] + 1})


@pytest.mark.parametrize(
    "damage, words",
    [
        (lambda p: p.write_bytes(b""), "damaged"),
        (lambda p: p.write_bytes(p.read_bytes()[:-10]), "damaged"),
        (lambda p: p.unlink(), "policy.safetensors: no such"),
        (lambda p: rewrite(p, kind=None), "kind=dms_jax.adapter"),
        (lambda p: rewrite(p, version="1"), "version 2, got version 1"),
        (lambda p: rewrite(p, dms="{"), "damaged"),
        (lambda p: rewrite(p, base_sha256=None), "damaged"),
        (lambda p: rewrite(p, dms=json.dumps({"dms_separate_alpha": False})), "projection policy"),
        (
            lambda p: rewrite(p, {k: v for k, v in load_file(p).items() if ".2." not in k}),
            r"2 tensors.*model\.layers\.2",
        ),
        (
            lambda p: rewrite(p, {k: np.nextafter(v, np.float32(2)) for k, v in load_file(p).items()}),
            "damaged.*content_sha256",
        ),
        (lambda p: rewrite(p, dms=another_scale(p)), "damaged.*content_sha256"),
        (lambda p: rewrite(p, {k: v[..., :-1].copy() for k, v in load_file(p).items()}), r"dms_proj_alpha.* shape"),
    ],
)
def test_damaged_or_foreign_file_is_refused_in_one_line(base, adapter, damage, words):
    damage(adapter)
    with pytest.raises(ConfigError, match=words) as refusal:
        dms_jax.load_adapter(dms_jax.load(base), adapter)
    assert "\n" not in str(refusal.value)


def test_model_without_an_evict_head_cannot_be_saved_as_adapter(base, tmp_path):
    with pytest.raises(ConfigError, match="dms_jax.save"):
        dms_jax.save_adapter(dms_jax.load(base), tmp_path / "x")
    with pytest.raises(ConfigError, match="query projection.*dms_jax.save"):
        dms_jax.save_adapter(dms_jax.load(GOLDEN / "qwen3_dms_borrowed_query_channel"), tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_existing_file_is_kept_unless_overwrite(adapter):
    before = adapter.read_bytes()
    with pytest.raises(ConfigError, match="overwrite=True"):
        dms_jax.save_adapter(dms_jax.load(TRAINED), adapter)
    assert adapter.read_bytes() == before
    dms_jax.save_adapter(dms_jax.load(TRAINED), adapter, overwrite=True)
    assert load_file(adapter).keys() == {k for k in load_file(TRAINED / "model.safetensors") if "dms_proj" in k}
