"""Adapters: files that hold only the evict head of a model, bound by a hash to the base that it was trained on."""

import dataclasses
import json
import os

import jax

from dms_jax.errors import ConfigError
from dms_jax.files import parse_json
from dms_jax.hf.dms_keys import dms_config, dms_keys
from dms_jax.hf.folder import Source, base_hash
from dms_jax.hf.hf_weights import EVICT, model_writes, with_evict_head
from dms_jax.hf.safetensors_files import new_path, open_own, write_whole
from dms_jax.models.decoder import Decoder

KIND, VERSION = "dms_jax.adapter", "2"


def save_adapter(model: Decoder, path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
    """Write the evict head of a model as one safetensors file, with its DMSConfig and the hash of its base.

    The file holds two small fp32 tensors per layer, or five if the head has hidden units. It suits a projection policy
    whose base was not trained; a borrowed policy or a fully trained model changes the base weights themselves, so use
    `save` for it. The base is read once to compute its hash. The file appears whole or not at all.
    """
    dms = model.config.dms
    if dms is None or dms.variant == "borrowed":
        why = "has no policy" if dms is None else "keeps its policy in the query projection"
        raise ConfigError(f"this model {why}, so it has no evict head to save; use dms_jax.save for the whole model")
    path = new_path(path, overwrite)
    tensors = {write.name: write.value() for write in model_writes(model) if EVICT in write.name}
    if jax.process_index() != 0:
        return
    metadata = {
        "kind": KIND,
        "version": VERSION,
        "base_sha256": base_hash(model),
        "dms": json.dumps(dms_keys(dms)),
    }
    write_whole(path, tensors, metadata)


def load_adapter(model: Decoder, path: str | os.PathLike[str], *, allow_non_finite: bool = False) -> Decoder:
    """Return a model with the policy of an adapter file instead of its own. It shares its base arrays with `model`.

    Args:
      allow_non_finite: read NaN, infinities and numbers that overflow as they are.

    Raises:
      ConfigError: the file is damaged, is not an adapter, belongs to another base, does not fit or is not finite.
    """
    tensors = open_own(path, "an adapter", KIND, VERSION)
    metadata = tensors.metadata
    try:
        keys, trained_on = parse_json(metadata["dms"], "dms"), metadata["base_sha256"]
        dms = dms_config(keys) if isinstance(keys, dict) else None
    except KeyError as why:
        raise ConfigError(f"{path} is damaged: its header lacks the policy or the base hash") from why
    except ConfigError as why:
        raise ConfigError(f"{path} is damaged: its header does not hold a policy ({why})") from why
    if dms is None or dms.variant != "projection":
        raise ConfigError(f"{path} is damaged: its header does not hold a projection policy")
    base = base_hash(model)
    if trained_on != base:
        raise ConfigError(
            f"{path} was trained on another base: sha256 {trained_on[:12]}..., but this model has {base[:12]}..."
        )
    adapted = with_evict_head(model, tensors, model.config.with_dms(dms), allow_non_finite)
    tensors.verify()
    source = getattr(model, "source", None)
    if isinstance(source, Source):
        adapted.source = dataclasses.replace(source, policy=os.path.abspath(path))
    return adapted
