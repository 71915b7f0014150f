"""`load` a model from a Hugging Face folder, a hub id or a GGUF file; `save` it as a folder that others open too."""

import functools
import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from dms_jax.config import DMSConfig, ImplementationName, ModelConfig
from dms_jax.errors import ConfigError, naming
from dms_jax.files import parse_json, read_json, write_json
from dms_jax.hf import hf_config
from dms_jax.hf.folder_files import member
from dms_jax.hf.folder_swap import check_folder, replacing_folder
from dms_jax.hf.gguf.gguf_file import open_gguf
from dms_jax.hf.gguf.gguf_tokenizer import write_tokenizer
from dms_jax.hf.head_budget_file import HEAD_BUDGETS, save_head_shares
from dms_jax.hf.hf_weights import EVICT, entries, model_writes, read_model
from dms_jax.hf.safetensors_files import (
    INDEX,
    SHARD_BYTES,
    Tensors,
    Write,
    open_folder,
    row_chunks,
    write_folder,
)
from dms_jax.kernels.dispatch import AUTO, KernelQuery, check_name, select_implementation
from dms_jax.policies.head_shares import HeadShares

# Files of a model other than weights and config.json. `save` copies them and LEGAL_FILES unchanged.
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
    "vocab.txt",
}
TEMPLATES = "additional_chat_templates"  # a folder beside them
LEGAL_FILES = {"LICENSE", "LICENSE.txt", "NOTICE", "USE_POLICY.md"}
CONFIG_FILES = ("config.json", "generation_config.json")
HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "merges.txt", "tokenizer.model", "LICENSE*", "NOTICE"]
# Mistral's and Meta's repositories hold the same weights again under other names, and others hold them in subfolders.
HUB_IGNORED = ["consolidated*", "*/*"]
# The fields of a trained DMSConfig that a user may change; the evict head was trained for the values of the others.
RUN_TIME_FIELDS = {"window_size", "target_cr", "tau"}


@dataclass(frozen=True)
class Source:
    """The origin of a model. It is a static attribute of an NNX module, so it must be hashable and small."""

    path: str  # absolute: a folder, or a .gguf file
    config_json: str | None  # the text of config.json, or None for a source without one
    # These two do not matter to compiled functions, so models that differ in them alone share one.
    policy: str = field(default="", compare=False)  # the file that the policy came from; "" if it came from no file
    stamp: tuple = field(default=(), compare=False)  # names, sizes and times of the weight files when they were opened


def load(
    path: str | os.PathLike[str],
    *,
    dtype: jnp.dtype = jnp.float32,
    mesh: Mesh | None = None,
    dms: DMSConfig | None = None,
    implementation: ImplementationName = "auto",
    allow_non_finite: bool = False,
):
    """Load a Decoder from a Hugging Face folder, a hub id (when online), or a `.gguf` file.

    Args:
      path: the folder, hub id or file. No remote code is ever run.
      dtype: the dtype of weights and activations. The evict head stays fp32.
      mesh: shard the parameters over this mesh as they are read; None puts them on one device.
      dms: the learned policy to add to a plain model. The projection variant starts as a head that never evicts. The
        borrowed variant reads its query channel as it is and needs the ramp of training. For a folder that already has
        a policy, only window_size, target_cr and tau may differ, and replace the folder's values.
      implementation: the implementation of attention and cache: "auto", "xla", "mosaic_gpu" (Hopper) or "pallas_tpu";
        see `dms_jax.kernels.dispatch`.
      allow_non_finite: read NaN, infinities and numbers that overflow as they are, instead of refusing them.

    Raises:
      ConfigError: one line, for anything that cannot be read exactly.
    """
    path = resolve(path)
    stamp = _stamp(path)
    tensors, config, raw, origin = _open(path)
    fresh = dms is not None and config.dms is None and dms.variant == "projection"
    # Refuse an implementation that cannot run before reading the weights. The query is for bf16, because fp32 weights
    # may be the master weights of a computation in bf16.
    if check_name(implementation) != AUTO:  # which always finds one, perhaps after a check that takes seconds
        select_implementation("train_attention", KernelQuery(config.head_dim, jnp.bfloat16), implementation)
    if os.path.exists(os.path.join(path, "adapter_config.json")):
        warnings.warn(f"the adapter in {path} is not applied; merge it into the weights first", stacklevel=2)
    policy = os.path.normpath(os.path.join(path, origin)) if config.dms is not None else ""
    config = replace(config.with_dms(_merge_policy(config.dms, dms)), implementation=implementation)
    model = read_model(tensors, config, jnp.dtype(dtype), mesh, fresh, allow_non_finite)
    model.source = Source(path, None if raw is None else json.dumps(raw), policy, stamp)
    return model


def resolve(path: str | os.PathLike[str], files: Sequence[str] = HUB_FILES) -> str:
    """Return the absolute form of a local path, or the folder to which the `files` of a hub id are downloaded."""
    path = os.fspath(path)
    if os.path.exists(path):
        return os.path.abspath(path)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", path) or path.startswith("."):
        raise ConfigError(f"{path}: no such folder or file")
    from huggingface_hub import snapshot_download

    try:
        return snapshot_download(path, allow_patterns=list(files), ignore_patterns=HUB_IGNORED)
    except Exception as why:  # offline, unknown, gated, disk full: the library raises dozens of types
        reason = str(why).strip().splitlines() or [type(why).__name__]
        raise ConfigError(
            f"{path} is not a local folder, and downloading it from the hub failed: {reason[0]}"
        ) from None


def read_config(path: str | os.PathLike[str]) -> ModelConfig:
    """Return the ModelConfig of a folder, a single `config.json`, a `.gguf` file or a hub id. No weights are read."""
    path = resolve(path, CONFIG_FILES)
    if os.path.isfile(path) and path.endswith(".json"):
        raw = read_json(path)
        with naming(path):
            return hf_config.model_config(raw)
    if os.path.isdir(path) and os.path.lexists(os.path.join(path, "config.json")):
        return hf_config.read_folder(path)[1]
    return open_source(path)[1]


def open_source(path: str) -> tuple[Tensors, ModelConfig, dict | None]:
    """Return the tensors, the config and the raw config.json (None for GGUF) of a local model."""
    return _open(path)[:3]


def _open(path: str) -> tuple[Tensors, ModelConfig, dict | None, str]:
    """Return what `open_source` returns, and the name of the file that a policy came from."""
    if os.path.isfile(path):
        if not path.endswith(".gguf"):
            raise ConfigError(f"{path}: give the folder that contains config.json, or a .gguf file")
        tensors = open_gguf(path)
        return tensors, tensors.config, None, ""
    if not os.path.lexists(os.path.join(path, "config.json")):
        raise ConfigError(f"{path} has no config.json, so it is not a Hugging Face model folder")
    raw, config, origin = hf_config.read_folder(path)
    return open_folder(path), config, raw, origin


def policy_origin(model) -> str:
    """Return a line that says which policy a model has and which file it came from; "" if it came from no file."""
    source = getattr(model, "source", None)
    if model.config.dms is None or source is None or not source.policy:
        return ""
    dms = model.config.dms
    return f"policy: {dms.variant}, window {dms.window_size}, target CR {dms.target_cr:g}, from {source.policy}"


def _merge_policy(own: DMSConfig | None, given: DMSConfig | None) -> DMSConfig | None:
    """Return the folder's own policy with the run-time fields of the given one. Either may be None."""
    if own is None or given is None:
        return given or own
    for name in own.__dataclass_fields__.keys() - RUN_TIME_FIELDS:
        if getattr(own, name) != getattr(given, name):
            raise ConfigError(
                f"the policy of this folder was trained with dms.{name}={getattr(own, name)}, got "
                f"{getattr(given, name)}; only {', '.join(sorted(RUN_TIME_FIELDS))} may differ"
            )
    return given


def save(
    model,
    path: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    shard_bytes: int = SHARD_BYTES,
    head_shares: HeadShares | None = None,
    model_optimizer: bool = False,
) -> None:
    """Write a Hugging Face folder: a model with its policy for `load` and Model-Optimizer, a dense one for
    transformers.

    Tensors get the dtype that they had in the source (fp32 for the evict head), so a base that was not trained is
    written back bit for bit. Tokenizer and generation files are copied. The folder appears whole or not at all.
    `overwrite` replaces the model in an existing model folder; other files and folders in it stay as they are.
    `head_shares` tells `dms_budget:N` how to divide N among the heads (`engine.head_budgets` measures them).

    The borrowed variant has no tensors of its own, so transformers would compute wrong logits from such a folder;
    `save` warns about it. Model-Optimizer has neither hidden units of an evict head, which it would leave out, nor a
    `decision_shift` of 0; with `model_optimizer`, such a model is refused.
    """
    path = os.path.abspath(os.fspath(path))
    check_save(path, overwrite)
    config, source = model.config, getattr(model, "source", None)
    if model_optimizer and config.dms is not None:
        _check_model_optimizer(config.dms)
    if config.dms is not None and config.dms.variant == "borrowed":
        warnings.warn(
            f"{path}: transformers will load this folder without an error but compute wrong logits, because the "
            "borrowed-channel policy is not stored in any tensor that it knows; load it with dms_jax or "
            "Model-Optimizer",
            stacklevel=2,
        )
    original = parse_json(source.config_json, source.path) if source and source.config_json else None
    if jax.process_index() != 0:  # every process must take part in gathering a sharded array
        write_folder("", folder_writes(model), shard_bytes, writer=False)
        return
    with replacing_folder(path) as folder:
        write_folder(folder, folder_writes(model), shard_bytes)
        write_json(os.path.join(folder, "config.json"), hf_config.folder_config(config, original))
        if head_shares is not None:
            save_head_shares(folder, head_shares, config.require_dms().window_size)
        if source is not None:
            copy_side_files(source.path, folder)
        old = os.listdir(path) if os.path.isdir(path) else []
        if kept := sorted((SIDE_FILES | LEGAL_FILES).intersection(old) - set(os.listdir(folder))):
            warnings.warn(
                f"{path} keeps {', '.join(kept)}, which this model does not have; delete them if they belong to "
                "another model",
                stacklevel=2,
            )


def _check_model_optimizer(dms: DMSConfig) -> None:
    """Refuse a policy that Model-Optimizer cannot run."""
    for name, needed in (("head_units", 0), ("decision_shift", 1)):
        if getattr(dms, name) != needed:
            raise ConfigError(
                f"Model-Optimizer can only run a policy with dms.{name}={needed}, this one has {getattr(dms, name)}; "
                "save it without model_optimizer=True for dms_jax"
            )


def check_save(path: str | os.PathLike[str], overwrite: bool) -> None:
    """Raise ConfigError if `save` would refuse to write to `path`, whatever the model is."""
    check_folder(os.fspath(path), overwrite, SIDE_FILES | LEGAL_FILES | {HEAD_BUDGETS})


def folder_writes(model) -> list[Write]:
    """List the tensors to write, in the dtypes of the source.

    A tensor that only loading has rounded gets the bits of the source.
    """
    source = getattr(model, "source", None)
    if source is None or not os.path.exists(source.path):
        return model_writes(model)
    tensors, _, _ = open_source(source.path)
    source_names = set(tensors.names())

    def dtype_of(name, ours):
        return tensors.dtype(name) if name in source_names and EVICT not in name else ours

    def untouched(name, value):
        if name not in source_names:
            return None
        with jax.numpy_dtype_promotion("standard"):
            common = jnp.promote_types(tensors.dtype(name), value.dtype)
        if common == value.dtype:
            return None  # loading was exact, so casting back is exact too
        original = tensors.read(name)
        return original if np.array_equal(original.astype(value.dtype), value) else None

    return model_writes(model, dtype_of, untouched)


def copy_side_files(source: str, folder: str) -> None:
    """Copy tokenizer, generation settings and license of a source into `folder`."""
    if os.path.isfile(source):
        try:
            write_tokenizer(source, folder)
        except ConfigError as why:  # the weights are fine without it
            warnings.warn(f"saving without a tokenizer: {why}", stacklevel=3)
    elif os.path.isdir(source):
        for name in sorted((SIDE_FILES | LEGAL_FILES) & set(os.listdir(source))):
            try:
                shutil.copyfile(member(source, name), os.path.join(folder, name))
            except ConfigError as why:  # a link out of the folder must not put a private file into an export
                warnings.warn(f"saving without {name}: {why}", stacklevel=3)
        for path in template_files(source):
            os.makedirs(os.path.join(folder, TEMPLATES), exist_ok=True)
            shutil.copyfile(path, os.path.join(folder, TEMPLATES, os.path.basename(path)))


def template_files(folder: str) -> list[str]:
    """Return the paths of the further chat templates of a folder. Raises ConfigError for a link that leaves it."""
    if not os.path.isdir(beside := os.path.join(folder, TEMPLATES)):
        return []
    names = sorted(name for name in os.listdir(beside) if name.endswith(".jinja"))
    return [member(folder, os.path.join(TEMPLATES, name)) for name in names]


def base_hash(model) -> str:
    """Return the sha256 over name, dtype, shape and bytes of every base tensor of a model's source, sorted by name.

    The evict head is left out, so that a base folder and every export of it have the same hash, whatever dtype and mesh
    they are loaded with. All weights are read once (about 1 GB/s) and the result is remembered. A model without a
    source (random weights) is hashed as it is in memory.
    """
    source = getattr(model, "source", None)
    if source is None:
        return _hash(
            sorted(
                (w.name, w.dtype, w.shape, lambda w=w: [w.value()]) for w in model_writes(model) if EVICT not in w.name
            )
        )
    if not os.path.exists(source.path):
        raise ConfigError(
            f"the base of this model, {source.path}, no longer exists; load the model from where it is now"
        )
    if source.stamp and source.stamp != _stamp(source.path):  # its hash would be that of other weights than are in use
        raise ConfigError(f"the weights in {source.path} have changed since this model was loaded; load it again")
    return _source_hash(source.path, _stamp(source.path))


@functools.lru_cache
def _source_hash(path: str, stamp: tuple) -> str:
    del stamp  # part of the cache's key, so that a changed file is hashed again
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
    """Return the names, sizes and modification times of the files that hold a model's weights."""
    files = [path]
    if os.path.isdir(path):
        files = [os.path.join(path, n) for n in sorted(os.listdir(path)) if n.endswith(".safetensors") or n == INDEX]
    status = [(file, os.stat(file)) for file in files if os.path.exists(file)]
    return tuple((os.path.basename(file), stat.st_size, stat.st_mtime_ns) for file, stat in status)
