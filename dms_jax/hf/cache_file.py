"""Caches on disk: one safetensors file each, bound to the model that computed its keys and values."""

import hashlib
import json
import os
import re
from typing import Any

import jax.numpy as jnp
import numpy as np

from dms_jax.config import OVERFLOWS, ModelConfig
from dms_jax.core.cache_base import NO_TOKEN, Cache, TokenHistory
from dms_jax.core.compact_cache import CompactCache, LayerCache
from dms_jax.core.page_counts import PageShape
from dms_jax.core.paged_cache import PagedCache
from dms_jax.errors import ConfigError, naming
from dms_jax.files import machine_memory, parse_json
from dms_jax.hf.cache_state import check_layer, check_policy, check_seen
from dms_jax.hf.dms_keys import dms_keys
from dms_jax.hf.folder import base_hash
from dms_jax.hf.hf_weights import EVICT, model_writes
from dms_jax.hf.page_file import cache_of, check_pages, page_fields, page_tensors
from dms_jax.hf.safetensors_files import SafetensorsFiles, new_path, open_own, write_whole
from dms_jax.models.decoder import Decoder
from dms_jax.policies import CachePolicy, describe, restored
from dms_jax.sharding import devices_of

KIND, VERSION = "dms_jax.cache", "3"
FIELDS = ("k", "v", "position", "expiry", "score", "forced_evictions")
HISTORY = ("history.ids", "history.last")


def save_cache(model: Decoder, cache: Cache, path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
    """Write a cache to a file that names the model it belongs to: the hashes of base and evict head, and the policy.

    The base weights are read once to compute their hash. The file appears whole or not at all.

    Raises:
      ConfigError: the file exists and `overwrite` is false, it cannot be written, or the cache is another model's.
    """
    path = new_path(path, overwrite)
    if cache.num_layers != model.config.num_layers:
        raise ConfigError(
            f"this cache belongs to another model: it has {cache.num_layers} layers, the model "
            f"{model.config.num_layers}"
        )
    paged = isinstance(cache, PagedCache)
    tensors = page_tensors(cache) if paged else _slot_tensors(cache, model.config)
    metadata = {
        "kind": KIND,
        "version": VERSION,
        "overflow": cache.overflow,
        "policy": json.dumps(describe(cache.policy)),
        **({"num_pages": str(cache.arena.num_pages)} if paged else {}),
        **identity(model),
    }
    write_whole(path, tensors | {"seen": np.asarray(cache.seen)} | _history_tensors(cache.history), metadata)


def load_cache(model: Decoder, path: str | os.PathLike[str]) -> Any:
    """Read the cache in a file that this model wrote: a `CompactCache`, or a `PagedCache` if one was saved.

    Raises:
      ConfigError: the file is damaged, is not a cache, belongs to another model, or holds what no cache can hold.
    """
    tensors = open_own(path, "a cache", KIND, VERSION)
    metadata = tensors.metadata
    for key, expected in identity(model).items():
        if metadata.get(key) != expected:
            raise ConfigError(
                f"{path} belongs to another model: its {key} is {str(metadata.get(key))[:60]}, this model has "
                f"{expected[:60]}"
            )
    config, overflow = model.config, metadata.get("overflow")
    try:
        policy = restored(parse_json(metadata.get("policy", ""), "policy"), config)
        check_policy(policy)
    except (ValueError, KeyError, TypeError) as why:  # a ConfigError is a ValueError
        raise ConfigError(f"{path} is damaged: its header does not name a known policy ({why})") from why
    paged, fields = "num_pages" in metadata, _fields(policy, config)
    names = {"seen", *(f"layers.{i}.{name}" for i in range(config.num_layers) for name in fields)}
    if paged:
        names = {"seen", *page_fields(policy, config)}
    has_history = set(HISTORY) <= set(tensors.names())  # files of earlier versions have none
    if overflow not in OVERFLOWS or names | (set(HISTORY) if has_history else set()) != set(tensors.names()):
        raise ConfigError(
            f"{path} is damaged: its header or its list of tensors does not fit a cache of {config.num_layers} layers"
        )
    if paged:
        return _load_pages(model, path, tensors, policy, overflow, has_history)
    rows = tensors.shape("seen")
    layers = []
    for i in range(config.num_layers):
        shape = tensors.shape(f"layers.{i}.k")
        if len(shape) != 4 or (*shape[:1], shape[1], shape[3]) != (*rows, config.num_kv_heads, config.head_dim):
            raise ConfigError(f"{path} is damaged: layer {i} has keys of shape {list(shape)}")
        shapes = dict.fromkeys(fields, shape[:3]) | {"k": shape, "v": shape}
        shapes |= {"forced_evictions": shape[:2], "budget": shape[:2]}
        if policy.features:
            shapes["statistic"] = (*shape[:3], policy.features)
        if (head_state := policy.head_state(config)) is not None:
            shapes["head_state"] = (*shape[:2], head_state.shape[0])
        if misshapen := [name for name in fields if tensors.shape(f"layers.{i}.{name}") != shapes[name]]:
            raise ConfigError(
                f"{path} is damaged: layer {i} has {misshapen[0]} of shape "
                f"{list(tensors.shape(f'layers.{i}.{misshapen[0]}'))}"
            )
        layers.append({name: tensors.read(f"layers.{i}.{name}") for name in fields})
    tensors.verify()
    state = {name: tensors.read(name) for name in ("seen", *(HISTORY if has_history else ()))}
    with naming(f"{path} is damaged"):
        check_seen(state["seen"], config.context_limit()[0])
        for i, layer in enumerate(layers):
            with naming(f"layer {i}"):
                check_layer(layer, state["seen"], policy)
        history = _history(state, config.vocab_size) if has_history else None
    loaded = tuple(LayerCache(**{name: jnp.asarray(value) for name, value in layer.items()}) for layer in layers)
    return CompactCache(loaded, jnp.asarray(state["seen"]), policy, overflow).with_history(history)


def _load_pages(
    model: Decoder,
    path: str | os.PathLike[str],
    tensors: SafetensorsFiles,
    policy: CachePolicy,
    overflow: str,
    has_history: bool,
) -> PagedCache:
    """Read and check the rest of a file that holds pages."""
    config = model.config
    state = {name: tensors.read(name) for name in ("seen", *page_fields(policy, config), *HISTORY * has_history)}
    tensors.verify()
    with naming(f"{path} is damaged"):
        pages = tensors.metadata["num_pages"]
        if not policy.in_pages or overflow == "evict" or not re.fullmatch("[0-9]{1,9}", pages):
            raise ConfigError("its header does not fit a cache in pages")
        if state["seen"].ndim != 1:
            raise ConfigError(f"seen has shape {list(state['seen'].shape)}")
        check_seen(state["seen"], config.context_limit()[0])
        content = {name: state[name] for name in page_fields(policy, config)}
        check_pages(content, state["seen"], policy, config)
        history = _history(state, config.vocab_size) if has_history else None
    # With "raise", the size of the arena is what its owner chose, and a fork may need more pages than the table has.
    room = int(pages) if overflow == "raise" else min(int(pages), content["table"].size + 2)
    mesh = devices_of(model.embed.get_value())
    _, page_size, head_dim = content["pages.k"].shape
    shape = PageShape(page_size, head_dim, content["pages.k"].dtype.itemsize, "pages.score" in content)
    needed = room * shape.page_bytes * (1 if mesh is None else mesh.size)
    if needed > (has := machine_memory()):
        raise ConfigError(
            f"{path} has room for {room} pages, which take {needed / 2**30:.0f} GiB, but this machine has "
            f"{has / 2**30:.0f} GiB; load it on a larger machine"
        )
    return cache_of(content, state["seen"], policy, overflow, room, mesh).with_history(history)


def _slot_tensors(cache: Cache, config: ModelConfig) -> dict[str, np.ndarray]:
    assert isinstance(cache, CompactCache)
    return {
        f"layers.{i}.{name}": np.asarray(getattr(layer, name))
        for i, layer in enumerate(cache.layers)
        for name in _fields(cache.policy, config)
    }


def _history_tensors(history: TokenHistory | None) -> dict[str, np.ndarray]:
    """Return the tensors of HISTORY, padded with NO_TOKEN; none if the tokens are unknown."""
    if history is None:
        return {}
    ids = np.full((len(history.ids), max(map(len, history.ids), default=0)), NO_TOKEN, np.int32)
    for row, known in zip(ids, history.ids, strict=True):
        row[: len(known)] = known
    return dict(zip(HISTORY, (ids, np.array(history.last, np.int32)), strict=True))


def _history(state: dict[str, np.ndarray], vocab_size: int) -> TokenHistory:
    ids, last = (state[name] for name in HISTORY)
    rows = state["seen"].shape
    if ids.dtype != np.int32 or last.dtype != np.int32 or ids.ndim != 2 or ids.shape[:1] != rows or last.shape != rows:
        raise ConfigError(f"{' and '.join(HISTORY)} must be int32 with a row for each of {rows[0]} rows")
    if any(((part < NO_TOKEN) | (part >= vocab_size)).any() for part in (ids, last)):
        raise ConfigError(f"{' and '.join(HISTORY)} must be token ids, 0 to {vocab_size - 1}, or {NO_TOKEN} for none")
    return TokenHistory(tuple(np.unique(row[row != NO_TOKEN]) for row in ids), tuple(last.tolist()))


def _fields(policy: CachePolicy, config: ModelConfig) -> tuple[str, ...]:
    """The names of the tensors of one layer."""
    has_budgets = policy.budget_table(config.num_layers, config.num_kv_heads) is not None
    has_state = policy.head_state(config) is not None
    return FIELDS + ("statistic",) * bool(policy.features) + ("head_state",) * has_state + ("budget",) * has_budgets


def identity(model: Decoder) -> dict[str, str]:
    """The header entries that must match for stored keys, values and decisions to be valid.

    target_cr and tau are left out, because they matter only in training.
    """
    head, dms = hashlib.sha256(), model.config.dms
    for write in sorted((w for w in model_writes(model) if EVICT in w.name), key=lambda w: w.name):
        head.update(f"{write.name} {list(write.shape)}\n".encode() + np.ascontiguousarray(write.value()).tobytes())
    keys = {} if dms is None else {k: v for k, v in dms_keys(dms).items() if k not in ("dms_cr", "dms_tau")}
    return {
        "base_sha256": base_hash(model),
        "evict_head_sha256": head.hexdigest(),
        "dms": json.dumps(keys, sort_keys=True),
    }
