"""Caches on disk: exact, and refused if they belong to another model."""

import jax
import numpy as np
import pytest
from cases import GOLDEN, tiny_model, tokens

import dms_jax
from dms_jax.config import DMSConfig
from dms_jax.errors import ConfigError
from dms_jax.hf import cache_file, safetensors_files

POLICY = DMSConfig(window_size=3, evict_logit_bias=0.0)


@pytest.fixture
def saved(rng, tmp_path):
    model = tiny_model(POLICY, 3, num_layers=1)
    ids = tokens(rng, 2, 20)
    _, cache = dms_jax.prefill(model, dms_jax.init_cache(model, 2, 32), ids, [16, 9])
    path = tmp_path / "prompt.cache"
    dms_jax.save_cache(model, cache, path)
    return model, cache, path


def test_loaded_cache_continues_like_the_saved_one(saved, rng):
    """The decision about the last pair is still pending in the file; the next token makes it."""
    model, cache, path = saved
    loaded = dms_jax.load_cache(model, path)
    assert (loaded.overflow, loaded.policy) == (cache.overflow, cache.policy)
    for ours, theirs in zip(jax.tree.leaves(loaded), jax.tree.leaves(cache), strict=True):
        np.testing.assert_array_equal(ours, theirs)
        assert ours.dtype == theirs.dtype
    more = tokens(rng, 2, 8)
    (a, after_a), (b, after_b) = dms_jax.prefill(model, cache, more), dms_jax.prefill(model, loaded, more)
    np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(after_a.live_counts, after_b.live_counts)


def test_bfloat16_cache_keeps_its_dtype(rng, tmp_path):
    model = tiny_model(POLICY, 3, num_layers=1)
    cache = dms_jax.init_cache(model, 1, 8, dtype="bfloat16", overflow="grow")
    dms_jax.save_cache(model, cache, tmp_path / "c")
    loaded = dms_jax.load_cache(model, tmp_path / "c")
    assert loaded.layers[0].k.dtype == "bfloat16" and loaded.overflow == "grow"


def test_existing_damaged_foreign_and_old_files_are_refused(saved, tmp_path, monkeypatch):
    model, cache, path = saved
    with pytest.raises(ConfigError, match="prompt.cache exists.*overwrite=True"):
        dms_jax.save_cache(model, cache, path)
    dms_jax.save_cache(model, cache, path, overwrite=True)
    with pytest.raises(ConfigError, match="absent"):
        dms_jax.load_cache(model, tmp_path / "absent")
    cut = tmp_path / "cut"
    cut.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ConfigError, match="cut is damaged"):
        dms_jax.load_cache(model, cut)
    with pytest.raises(ConfigError, match="kind=dms_jax.cache"):
        dms_jax.load_cache(model, GOLDEN / "mistral" / "model.safetensors")
    others = [
        tiny_model(POLICY, 4, num_layers=1),
        tiny_model(POLICY, 3, num_layers=1, evict_scale=0.2),
        tiny_model(DMSConfig(window_size=4), 3, num_layers=1),
    ]
    for other in others:
        with pytest.raises(ConfigError, match="belongs to another model"):
            dms_jax.load_cache(other, path)
    with pytest.raises(ConfigError, match="1 layers, the model 2"):
        dms_jax.save_cache(tiny_model(POLICY, 3, num_layers=2), cache, tmp_path / "other")
    monkeypatch.setattr(cache_file, "VERSION", "4")
    with pytest.raises(ConfigError, match="version 4, got version 3"):
        dms_jax.load_cache(model, path)


def test_failed_save_keeps_the_old_file(saved, monkeypatch):
    model, cache, path = saved
    before = path.read_bytes()

    def full_disk(path, *_):
        with open(path, "wb") as file:
            file.write(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(safetensors_files, "save_file", full_disk)
    with pytest.raises(ConfigError, match="cannot write .*No space left"):
        dms_jax.save_cache(model, cache, path, overwrite=True)
    assert path.read_bytes() == before and [p.name for p in path.parent.iterdir()] == ["prompt.cache"]
