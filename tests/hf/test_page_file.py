"""A file of pages that was edited and hashed again is refused if no cache can hold what it says."""

import functools

import numpy as np
import pytest
from cases import tiny_model, tokens

import dms_jax
from dms_jax.config import DMSConfig
from dms_jax.errors import ConfigError
from dms_jax.hf.safetensors_files import CONTENT_HASH, SafetensorsFiles, write_whole


@functools.cache
def model():
    return tiny_model(DMSConfig(window_size=3, evict_logit_bias=0.0), 3, num_layers=1)


@functools.cache
def saved(policy, folder):
    """Save two rows of 16 and 9 tokens, of which each head keeps all, or 9; return the tensors and the header."""
    cache = dms_jax.init_pages(model(), 2, 32, page_size=4, num_pages=80, policy=policy)
    ids = tokens(np.random.default_rng(0), 2, 16)
    cache = dms_jax.prefill(model(), cache, ids, [16, 9], threshold=1e3)[1]
    dms_jax.save_cache(model(), cache, folder / "good", overwrite=True)
    good = SafetensorsFiles("good", [str(folder / "good")])
    metadata = dict(good.metadata)
    metadata.pop(CONTENT_HASH)
    return {name: np.array(good.read(name)) for name in good.names()}, metadata


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("pages")


def with_entry(value):
    """Put a page number into the first column of the table, which is a page of the ring."""

    def change(table):
        table[0, 0, 0, 0] = value if value is not None else table[0, 0, 1, 0]
        return table

    return change


@pytest.mark.parametrize(
    "policy, name, change, message",
    [
        (None, "pages.k", lambda x: x * np.nan, "pages.k must be finite"),
        (None, "pages.v", lambda x: x.astype(np.int32), "pages"),
        (None, "pages.v", lambda x: x[:, :2], "pages.v has shape"),
        (None, "seen", lambda x: x + 10**6, "seen must be"),
        (None, "seen", lambda x: x[:1], "shape"),
        (None, "seen", lambda x: x * 0, "survivors must be pairs that have left the ring"),
        (None, "survivors", lambda x: x - 100, "survivors must be pairs that have left the ring"),
        (None, "survivors", lambda x: x * 0, "table must name pages"),
        (None, "marked", lambda x: x + 2, "marked must be 0 or 1"),
        (None, "marked", lambda x: x[..., :2], "marked has shape"),
        (None, "table", with_entry(-1), "table must name pages"),
        (None, "table", with_entry(2**30), "table must name pages"),
        (None, "table", with_entry(0), "table must name pages"),
        (None, "table", with_entry(None), "must not be shared"),
        (None, "table", lambda x: x[..., :2], "room for all pairs"),
        (None, "table", lambda x: x.astype(np.float32), "table has shape .* float32"),
        ("dms_budget:9", "budget", lambda x: x * 0 + 3, "budget must be at least"),
        ("dms_budget:9", "budget", lambda x: x + 1, "survivors must fill the budget"),
        ("dms_budget:9", "pages.score", lambda x: x * np.nan, "pages.score must be finite"),
        ("dms_budget:9", "pages.position", lambda x: x - 100, "pages.position must be"),
    ],
)
def test_edited_pages_are_refused(policy, name, change, message, folder, tmp_path):
    tensors, metadata = saved(policy, folder)
    tensors = {key: np.array(tensor) for key, tensor in tensors.items()}
    tensors[name] = np.ascontiguousarray(change(tensors[name]))
    write_whole(str(tmp_path / "edited"), tensors, metadata)
    with pytest.raises(ConfigError, match=f"edited is damaged: .*{message}") as why:
        dms_jax.load_cache(model(), tmp_path / "edited")
    assert "\n" not in str(why.value)


@pytest.mark.parametrize(
    "header",
    [{"num_pages": "-1"}, {"num_pages": "many"}, {"overflow": "evict"}, {"policy": '{"name": "knorm", "budget": 9}'}],
)
def test_edited_header_is_refused(header, folder, tmp_path):
    tensors, metadata = saved(None, folder)
    write_whole(str(tmp_path / "edited"), tensors, metadata | header)
    with pytest.raises(ConfigError, match="edited is damaged"):
        dms_jax.load_cache(model(), tmp_path / "edited")


def test_large_number_of_pages_in_the_header_takes_no_memory(folder, tmp_path):
    tensors, metadata = saved(None, folder)
    many = metadata | {"num_pages": "999999999"}
    write_whole(str(tmp_path / "grows"), tensors, many | {"overflow": "grow"})
    assert dms_jax.load_cache(model(), tmp_path / "grows").arena.num_pages == tensors["table"].size + 2
    write_whole(str(tmp_path / "raises"), tensors, many | {"overflow": "raise"})
    with pytest.raises(ConfigError, match=r"raises .*999999999 pages, which take \d+ GiB.*this machine has"):
        dms_jax.load_cache(model(), tmp_path / "raises")
