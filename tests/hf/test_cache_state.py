"""A cache file that was edited and hashed again is refused if no cache can hold what it says."""

import functools

import numpy as np
import pytest
from cases import tiny_model, tokens

import dms_jax
from dms_jax.config import DMSConfig
from dms_jax.errors import ConfigError
from dms_jax.hf.safetensors_files import CONTENT_HASH, SafetensorsFiles, write_whole
from dms_jax.policies import POLICIES

NEVER = 2**31 - 1


@functools.cache
def model():
    return tiny_model(DMSConfig(window_size=3, evict_logit_bias=0.0), 3, num_layers=1)


@functools.cache
def cache_of(policy):
    """A cache of two rows, of 16 and 9 tokens."""
    ids = tokens(np.random.default_rng(0), 2, 16)
    return dms_jax.prefill(model(), dms_jax.init_cache(model(), 2, 32, policy=policy), ids, [16, 9])[1]


@pytest.fixture
def edited(tmp_path):
    """Save a cache; then change tensors or the header, and hash it again."""

    def edit(change, policy=None):
        dms_jax.save_cache(model(), cache_of(policy), tmp_path / "good")
        good = SafetensorsFiles("good", [str(tmp_path / "good")])
        tensors, metadata = {name: np.array(good.read(name)) for name in good.names()}, good.metadata
        metadata.pop(CONTENT_HASH)
        change(tensors, metadata)
        write_whole(str(tmp_path / "edited"), tensors, metadata)
        return dms_jax.load_cache(model(), tmp_path / "edited")

    return edit


def each(name, change):
    """A change of the tensors called `name`."""

    def edit(tensors, _):
        for key in [key for key in tensors if key == name or key.endswith(f".{name}")]:
            tensors[key] = change(tensors[key])

    return edit


def renamed(**metadata):
    return lambda _, header: header.update(metadata)


def repeated(position):
    """Two live slots with one position."""
    position[0, 0, :2] = position[0, 0, 0]
    return position


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (each("k", lambda x: x * np.nan), "layer 0: .*k must be finite"),
        (each("v", lambda x: np.full_like(x, np.inf)), "layer 0: .*v must be finite"),
        (each("score", lambda x: x * np.nan), "score must be finite"),
        (each("seen", lambda x: x * 0 + NEVER), r"seen must be whole numbers from 0 to 512"),
        (each("seen", lambda x: x * 0 - 5), "seen must be"),
        (each("seen", lambda x: x * 0), r"position must be in \[0, seen\)"),
        (each("seen", lambda x: x * 0 + 300), "pairs of the window must be there"),
        (each("seen", lambda x: x + np.float32(0.5)), "seen must be"),
        (each("position", lambda x: x[..., ::-1].copy()), "expiry must not be set in an empty slot"),
        (each("position", lambda x: x * 0 + NEVER), "expiry must not be set in an empty slot"),
        (each("position", lambda x: x * 0 - 7), r"position must be in \[0, seen\)"),
        (each("position", repeated), "position must be different"),
        (each("position", lambda x: x.astype(np.float32)), "position has dtype float32"),
        (each("expiry", lambda x: x * 0 + NEVER), "expiry must not be set in an empty slot"),
        (each("expiry", lambda x: x * 0 - 1), "expiry must not be"),
        (each("expiry", lambda x: x - (x < NEVER) * (x > 0)), "expiry must be position"),
        (each("forced_evictions", lambda x: x * 0 - 10**9), "forced_evictions must be"),
        (each("k", lambda x: x.astype(np.float16)), "has dtype float"),
        (each("k", lambda x: x.astype(np.float64)), "has dtype float"),
        (each("history.ids", lambda x: x + 97), "history.ids and history.last must be token ids, 0 to 96"),
        (each("history.last", lambda x: x - 200), "must be token ids"),
        (each("history.ids", lambda x: x[:1]), "a row for each of 2 rows"),
        (lambda tensors, _: tensors.pop("history.last"), "list of tensors"),
        (renamed(policy='{"name": "tova", "budget": 1099511627776}'), "does not name a known policy .*at most"),
        (renamed(policy='{"name": "tova", "budget": true}'), "does not name a known policy"),
        (renamed(overflow="clip"), "its header"),
    ],
)
def test_impossible_states_are_refused(edited, change, message):
    with pytest.raises(ConfigError, match=f"edited is damaged: .*{message}") as why:
        edited(change)
    assert "\n" not in str(why.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (each("budget", lambda x: x + 1), "live pairs must fill the budget"),
        (each("budget", lambda x: x * 0 + 3), "budget must be at least window_size"),
        (each("budget", lambda x: x.astype(np.int64)), "budget has dtype int64"),
        (each("budget", lambda x: x[:1]), "budget of shape"),
        (each("expiry", lambda x: np.where(x == NEVER, 17, x)), "expiry must be position"),
        (lambda tensors, _: tensors.pop("layers.0.budget"), "list of tensors"),
        (renamed(policy='{"name": "dms_budget", "budget": 3}'), "does not name a known policy"),
        (renamed(policy='{"name": "dms_budget", "budget": 6, "head_budgets": [[6, 6]]}'), "tuple of tuples"),
    ],
)
def test_impossible_budgets_are_refused(edited, change, message):
    with pytest.raises(ConfigError, match=f"edited is damaged: .*{message}"):
        edited(change, "dms_budget:6")


def test_state_of_heads_must_be_finite(edited):
    with pytest.raises(ConfigError, match="layer 0: row 0, KV head 0: head_state must be finite"):
        edited(each("head_state", lambda x: x * np.nan), "expected_attention:16")


def test_files_of_earlier_versions_load_without_a_history(edited):
    def older(tensors, _):
        del tensors["history.ids"], tensors["history.last"]

    old = edited(older)
    assert old.history is None and old.seen.tolist() == [16, 9]


def test_unchanged_file_is_loaded_with_its_history(edited, rng):
    loaded, ids = edited(lambda *_: None), tokens(np.random.default_rng(0), 2, 16)
    assert [row.tolist() for row in loaded.history.ids] == [sorted(set(ids[0])), sorted(set(ids[1, :9]))]
    assert loaded.history.last == (ids[0, 15], ids[1, 8])


@pytest.mark.parametrize("name", [*POLICIES, "prompt:tova", "adakv:h2o"])
def test_caches_of_every_policy_are_loaded(tmp_path, rng, name):
    """Whatever a policy leaves in a cache is possible, also after a learned policy has run out of slots."""
    kind = POLICIES[name.rpartition(":")[2]]
    policy, slots = f"{name}:40" if kind.has_budget else name, 10 if kind.is_learned else 64
    cache = dms_jax.init_cache(model(), 2, slots, policy=policy, overflow="evict", dtype="bfloat16")
    ids, prompt = tokens(rng, 2, 48), 16  # the first turn, which some policies keep whole
    cache = dms_jax.prefill(model(), cache, ids[:, :prompt], [prompt, 5], chunk_size=16, threshold=5.0)[1]
    cache = dms_jax.decode_step(model(), cache, ids[:, prompt], threshold=5.0)[1]
    cache = dms_jax.prefill(model(), cache, ids[:, prompt + 1 :], chunk_size=16, threshold=5.0)[1]
    if name.startswith("prompt:"):
        cache = dms_jax.compress_prompt(cache)
    dms_jax.save_cache(model(), cache, tmp_path / "cache")
    np.testing.assert_array_equal(dms_jax.load_cache(model(), tmp_path / "cache").live_counts, cache.live_counts)
    assert np.asarray(cache.forced_evictions).any() == kind.is_learned
