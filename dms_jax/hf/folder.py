"""Models in and out: `load` a Hugging Face folder, hub id or GGUF file; `save` a folder that others open too."""

import functools
import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from dms_jax.config import DMSConfig, ImplementationName, ModelConfig
from dms_jax.errors import ConfigError, naming
from dms_jax.files import read_json
from dms_jax.hf import gguf_file, hf_config
from dms_jax.hf.hf_weights import EVICT, entries, model_writes, read_model
from dms_jax.hf.safetensors_files import SHARD_BYTES, Tensors, Write, open_folder, row_chunks, write_folder
from dms_jax.kernels.dispatch import KernelQuery, select_implementation

# What belongs to a model but holds no weights: copied as it is.
SIDE_FILES = {
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "LICENSE",
    "LICENSE.txt",
    "NOTICE",
    "USE_POLICY.md",
}
CONFIG_FILES = ("config.json", "generation_config.json")
HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "merges.txt", "tokenizer.model", "LICENSE*", "NOTICE"]
RUN_TIME_FIELDS = {"window_size", "target_cr", "tau"}  # of a trained policy; the others are part of what was trained


@dataclass(frozen=True)
class Source:
    """Where a model came from: static, hashable, and small, because it rides in the graph of the model."""

    path: str  # absolute: a folder, or a .gguf file
    config_json: str | None  # config.json as it was, or None when there was none


def load(
    path: str | os.PathLike[str],
    *,
    dtype: jnp.dtype = jnp.float32,
    mesh: Mesh | None = None,
    dms: DMSConfig | None = None,
    implementation: ImplementationName = "auto",
):
    """A Decoder from a Hugging Face folder, a hub id (when online), or a `.gguf` file.

    Args:
      path: the folder, hub id or file. No remote code is ever run.
      dtype: of weights and activations. The evict head stays fp32.
      mesh: shard the parameters over it as they are read; None puts them on one device.
      dms: the policy to add to a plain model: the projection variant starts as a head that never evicts; the borrowed one
        reads whatever its query channel holds, and needs the ramp of training. For a folder that already has a policy only
        window_size, target_cr and tau may differ from it; they replace the folder's.
      implementation: of attention and cache: "auto", "xla", "mosaic_gpu" (Hopper) or "pallas_tpu"; see `dms_jax.kernels.dispatch`.

    Raises ConfigError, one line, for anything that cannot be read exactly.
    """
    path = resolve(path)
    tensors, config, raw = open_source(path)
    fresh = dms is not None and config.dms is None and dms.variant == "projection"
    # What cannot run is said before the weights are read; these may be master weights of a computation in bf16.
    select_implementation("train_attention", KernelQuery(config.head_dim, jnp.bfloat16), implementation)
    config = replace(config.with_dms(_merge_policy(config.dms, dms)), implementation=implementation)
    model = read_model(tensors, config, jnp.dtype(dtype), mesh, fresh)
    model.source = Source(path, None if raw is None else json.dumps(raw))
    return model


def resolve(path: str | os.PathLike[str], files: Sequence[str] = HUB_FILES) -> str:
    """A local path as it is, absolute; a hub id as the folder to which `files` of it were downloaded."""
    path = os.fspath(path)
    if os.path.exists(path):
        return os.path.abspath(path)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", path) or path.startswith("."):
        raise ConfigError(f"{path}: no such folder or file")
    from huggingface_hub import snapshot_download

    try:
        return snapshot_download(path, allow_patterns=list(files))
    except Exception as why:  # offline, unknown, gated, disk full: the library has dozens of types for them
        reason = str(why).strip().splitlines() or [type(why).__name__]
        raise ConfigError(f"{path} is no folder here, and fetching it from the hub failed: {reason[0]}") from why


def read_config(path: str | os.PathLike[str]) -> ModelConfig:
    """What `config.json` says of a model: of a folder, of such a file alone, of a .gguf file or of a hub id. No weights are read."""
    path = resolve(path, CONFIG_FILES)
    if os.path.isfile(path) and path.endswith(".json"):
        with naming(path):
            return hf_config.model_config(read_json(path))
    if os.path.isdir(path) and os.path.exists(os.path.join(path, "config.json")):
        return hf_config.read_folder(path)[1]
    return open_source(path)[1]


def open_source(path: str) -> tuple[Tensors, ModelConfig, dict | None]:
    """The tensors, the config and the raw config.json (None for GGUF) of a local model."""
    if os.path.isfile(path):
        if not path.endswith(".gguf"):
            raise ConfigError(f"{path}: give the folder that holds config.json, or a .gguf file")
        tensors = gguf_file.open_gguf(path)
        return tensors, tensors.config, None
    if not os.path.exists(os.path.join(path, "config.json")):
        raise ConfigError(f"{path} has no config.json: not a Hugging Face model folder")
    raw, config = hf_config.read_folder(path)
    return open_folder(path), config, raw


def _merge_policy(own: DMSConfig | None, given: DMSConfig | None) -> DMSConfig | None:
    if own is None or given is None:
        return given or own
    for field in own.__dataclass_fields__.keys() - RUN_TIME_FIELDS:
        if getattr(own, field) != getattr(given, field):
            raise ConfigError(
                f"this folder's policy was trained with dms.{field}={getattr(own, field)}, dms= gives {getattr(given, field)}; "
                f"only {', '.join(sorted(RUN_TIME_FIELDS))} may differ"
            )
    return given


def save(model, path: str | os.PathLike[str], *, overwrite: bool = False, shard_bytes: int = SHARD_BYTES) -> None:
    """Write a Hugging Face folder: our `load` and Model-Optimizer read it with its policy, plain transformers as the dense base.

    Tensors get the dtype they had in the source (fp32 for the evict head), so a base that training left alone is written
    back bit for bit. Tokenizer and generation files are copied. The folder appears whole or not at all; an existing one is
    refused unless `overwrite`, which only replaces a model folder.

    The borrowed variant has no tensors of its own: opened as a plain model it runs, and is wrong. It warns.
    """
    path = os.path.abspath(os.fspath(path))
    _refuse_existing(path, overwrite)
    config, source = model.config, getattr(model, "source", None)
    if config.dms is not None and config.dms.variant == "borrowed":
        warnings.warn(
            f"{path}: a borrowed-channel policy is read only by dms_jax and Model-Optimizer; plain transformers opens this "
            f"folder without a word and computes wrong logits",
            stacklevel=2,
        )
    original = json.loads(source.config_json) if source and source.config_json else None
    writer = jax.process_index() == 0

    def fill(folder: str) -> None:
        write_folder(folder, folder_writes(model), shard_bytes, writer)
        if writer:
            with open(os.path.join(folder, "config.json"), "w", encoding="utf-8") as file:
                json.dump(hf_config.folder_config(config, original), file, indent=2, ensure_ascii=False)
            if source is not None:
                copy_side_files(source.path, folder)

    if writer:
        write_atomically(path, fill)
    else:
        fill("")


def folder_writes(model) -> list[Write]:
    """The tensors to write, with the source's dtypes, and the source's bits where loading rounded them and nothing changed since."""
    source = getattr(model, "source", None)
    if source is None or not os.path.exists(source.path):
        return model_writes(model)
    tensors, _, _ = open_source(source.path)
    held = set(tensors.names())

    def dtype_of(name, ours):
        return tensors.dtype(name) if name in held and EVICT not in name else ours

    def untouched(name, value):
        if name not in held or jnp.promote_types(tensors.dtype(name), value.dtype) == value.dtype:
            return None  # loading was exact, so casting back is
        original = tensors.read(name)
        return original if np.array_equal(original.astype(value.dtype), value) else None

    return model_writes(model, dtype_of, untouched)


def copy_side_files(source: str, folder: str) -> None:
    """Tokenizer, generation settings and license of a source, into `folder`."""
    if os.path.isfile(source):
        try:
            gguf_file.write_tokenizer(source, folder)
        except ConfigError as why:  # the weights are fine without it
            warnings.warn(f"no tokenizer is written: {why}", stacklevel=3)
    elif os.path.isdir(source):
        for name in sorted(SIDE_FILES & set(os.listdir(source))):
            shutil.copyfile(os.path.join(source, name), os.path.join(folder, name))


def _refuse_existing(path: str, overwrite: bool) -> None:
    if not os.path.exists(path) or (os.path.isdir(path) and not os.listdir(path)):
        return
    if not overwrite:
        raise ConfigError(f"{path} exists; give another folder, or overwrite=True")
    if not os.path.exists(os.path.join(path, "config.json")):
        raise ConfigError(f"{path} exists and is not a model folder; it is not overwritten")


def write_atomically(path: str, fill) -> None:
    """`fill(folder)` a temporary sibling of `path`, then rename it: a crash leaves the old folder, or none."""
    from safetensors import SafetensorError

    parent, name = os.path.split(path)
    temporary, old = (os.path.join(parent, f".{name}.{kind}-{os.getpid()}") for kind in ("tmp", "old"))
    try:
        os.makedirs(temporary)
        fill(temporary)
        if os.path.isdir(path) and os.listdir(path):
            os.rename(path, old)
        os.rename(temporary, path)
    except (OSError, SafetensorError) as why:  # the library wraps a full disk in its own type
        raise ConfigError(f"cannot write {path}: {getattr(why, 'strerror', None) or why}") from why
    finally:
        if os.path.isdir(old) and not os.path.exists(path):
            os.rename(old, path)
        for leftover in (temporary, old):
            shutil.rmtree(leftover, ignore_errors=True)


def base_hash(model) -> str:
    """sha256 over name, dtype, shape and bytes of every base tensor (no evict head) of the model's source, in name order.

    The same for a base folder and for every export of it, whatever dtype and mesh it was loaded with. Reads all weights
    once (about 1 GB/s) and remembers. A model that came from nowhere (random) is hashed as it stands.
    """
    source = getattr(model, "source", None)
    if source is None:
        return _hash(
            sorted(
                (w.name, w.dtype, w.shape, lambda w=w: [w.value()]) for w in model_writes(model) if EVICT not in w.name
            )
        )
    if not os.path.exists(source.path):
        raise ConfigError(f"the base of this model, {source.path}, is not there any more; load it from where it is now")
    return _source_hash(source.path, _stamp(source.path))


@functools.lru_cache
def _source_hash(path: str, stamp: tuple) -> str:
    del stamp  # part of the key: a changed file is hashed anew
    tensors, config, _ = open_source(path)
    names = sorted(name for entry in entries(config.with_dms(None)) for name in entry.names)

    def chunks(name):
        return lambda: (
            tensors.read(name, index) for index in row_chunks(tensors.shape(name), tensors.dtype(name).itemsize)
        )

    return _hash((name, tensors.dtype(name), tensors.shape(name), chunks(name)) for name in names)


def _hash(items) -> str:
    digest = hashlib.sha256()
    for name, dtype, shape, chunks in items:
        digest.update(f"{name} {dtype} {list(shape)}\n".encode())
        for chunk in chunks():
            digest.update(np.ascontiguousarray(chunk).view(np.uint8))
    return digest.hexdigest()


def _stamp(path: str) -> tuple:
    files = (
        [path]
        if os.path.isfile(path)
        else [os.path.join(path, n) for n in sorted(os.listdir(path)) if n.endswith((".safetensors", ".json"))]
    )
    return tuple((file, os.stat(file).st_size, os.stat(file).st_mtime_ns) for file in files)
