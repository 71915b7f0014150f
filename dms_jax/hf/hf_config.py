"""Translate `config.json` to ModelConfig and back.

Every key is read (HANDLED) or known to be harmless at its value, which `config_keys` decides; a file with any other key
is refused. The spellings of transformers 4 and 5 are both read. `families` holds what differs between model families,
and `dms_keys` reads the `dms_*` keys. Begin with `model_config`.
"""

import dataclasses
import os
from typing import Any

from dms_jax.config import ModelConfig, RopeScaling
from dms_jax.errors import ConfigError, naming, shown
from dms_jax.files import read_json
from dms_jax.hf.config_keys import refuse_unsupported
from dms_jax.hf.config_values import flag, positive_number, token_id, token_ids, whole_number
from dms_jax.hf.dms_keys import DMS_KEYS, FASTDMS_KEYS, READ_KEYS, dms_config, dms_keys, fastdms_metadata, is_fastdms
from dms_jax.hf.families import FAMILIES, Family
from dms_jax.hf.folder_files import member

HANDLED = {
    "model_type",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "rms_norm_eps",
    "rope_theta",
    "rope_scaling",
    "rope_parameters",
    "max_position_embeddings",
    "tie_word_embeddings",
    "attention_bias",
    "mlp_bias",
    "sliding_window",
    "use_sliding_window",
    "max_window_layers",
    "layer_types",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
}
# Further names of what the file already says, or what its model_type says. They must agree.
SYNONYMS = {
    "n_embd": "hidden_size",
    "n_head": "num_attention_heads",
    "n_layer": "num_hidden_layers",
    "num_layers": "num_hidden_layers",
    "n_vocab": "vocab_size",
    "num_kv_heads": "num_key_value_heads",
}
QK_NORM_KEYS = ("qk_norm", "use_qk_norm", "use_qk_layernorm", "qk_layernorm")
QKV_BIAS_KEYS = ("qkv_bias", "use_qkv_bias", "add_qkv_bias", "attention_qkv_bias")
ROPE_KEYS = {"rope_type", "type", "rope_theta", "original_max_position_embeddings"}
ROPE_KIND_KEYS = {
    "default": set(),
    "linear": {"factor"},
    "llama3": {f.name for f in dataclasses.fields(RopeScaling)} - {"kind"},
}


def read_folder(folder: str) -> tuple[dict, ModelConfig, str]:
    """Return the raw `config.json` of a folder, its ModelConfig with the stop tokens of `generation_config.json`, and
    the name of the file that a policy came from."""
    path, generation = (os.path.join(folder, name) for name in ("config.json", "generation_config.json"))
    raw = read_json(member(folder, "config.json"))
    more = None
    if os.path.lexists(generation):
        more = read_json(member(folder, "generation_config.json")).get("eos_token_id")
    fastdms, origin = fastdms_metadata(folder, raw)
    with naming(path):
        config = model_config(raw, fastdms)
    with naming(generation):
        eos = tuple(dict.fromkeys(config.eos_token_ids + token_ids("eos_token_id", more)))
    return raw, dataclasses.replace(config, eos_token_ids=eos), origin


def model_config(raw: dict, fastdms: dict | None = None) -> ModelConfig:
    """Return the ModelConfig of a `config.json`. `fastdms`: the metadata that FastDMS keeps beside it, if any."""
    name = raw.get("model_type")
    if not isinstance(name, str) or name not in FAMILIES:
        raise ConfigError(f"model_type {shown(name)} is not supported; supported: {', '.join(FAMILIES)}")
    family = FAMILIES[name]
    attention_bias = flag(raw, "attention_bias") and "attention_bias" not in family.ignored_keys
    qkv_bias = attention_bias or family.qkv_bias
    facts = {key: raw.get(original) for key, original in SYNONYMS.items()}
    facts |= dict.fromkeys(QK_NORM_KEYS, family.qk_norm) | dict.fromkeys(QKV_BIAS_KEYS, qkv_bias)
    refuse_unsupported(
        raw, HANDLED | READ_KEYS | (FASTDMS_KEYS if is_fastdms(raw) or fastdms is not None else set()), facts
    )
    heads, hidden, layers = (
        whole_number(raw, key) for key in ("num_attention_heads", "hidden_size", "num_hidden_layers")
    )
    head_dim = hidden // heads
    if raw.get("head_dim") is not None:
        head_dim = whole_number(raw, "head_dim")
    elif (
        "head_dim" not in raw and family.default_head_dim
    ):  # a null value does not mean the default of the family, unlike a missing key
        head_dim = family.default_head_dim
    for key in ("attention_bias", "mlp_bias"):
        if flag(raw, key) and key not in family.extra_keys + family.ignored_keys:
            raise ConfigError(f"{key}=true is not supported: a {name} model has no such bias")
    kv_heads = (
        heads
        if family.default_kv_heads and raw.get("num_key_value_heads") is None
        else whole_number(raw, "num_key_value_heads")
    )
    max_positions = 4096 if raw.get("max_position_embeddings") is None else whole_number(raw, "max_position_embeddings")
    theta, scaling = _rope(raw)
    return ModelConfig(
        model_type=name,
        vocab_size=whole_number(raw, "vocab_size"),
        hidden_size=hidden,
        intermediate_size=whole_number(raw, "intermediate_size"),
        num_layers=layers,
        num_q_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        rms_norm_eps=positive_number(raw, "rms_norm_eps", 1e-6),
        rope_theta=theta,
        rope_scaling=scaling,
        max_position_embeddings=max_positions,
        tie_word_embeddings=flag(raw, "tie_word_embeddings"),  # false is the default of all classes in transformers
        qkv_bias=qkv_bias,
        o_bias=attention_bias,
        mlp_bias=flag(raw, "mlp_bias"),
        qk_norm=family.qk_norm,
        sliding_window=_sliding_window(raw, family, layers),
        bos_token_id=token_id("bos_token_id", raw.get("bos_token_id")),
        eos_token_ids=token_ids("eos_token_id", raw.get("eos_token_id")),
        pad_token_id=token_id("pad_token_id", raw.get("pad_token_id")),
        dms=dms_config(raw, fastdms),
    )


def folder_config(config: ModelConfig, original: dict | None = None) -> dict:
    """Return the `config.json` to write: the original with the keys of the policy replaced, or else a fresh one."""
    raw = dict(original) if original is not None else fresh_config(config)
    # `dms_keys` has no `dms_head_units` for a linear head, which may have replaced one with hidden units.
    raw = {key: value for key, value in raw.items() if key not in FASTDMS_KEYS | {DMS_KEYS["head_units"][0]}}
    # `auto_map` names Python files, which are not copied; no remote code is needed to read the policy.
    raw.pop("auto_map", None)
    family = FAMILIES[config.model_type]
    raw |= {"architectures": [family.architecture], "tie_word_embeddings": config.tie_word_embeddings}
    return raw | (dms_keys(config.dms) if config.dms is not None else {})


def fresh_config(config: ModelConfig) -> dict:
    """Make a `config.json` for a model without one (GGUF or random), in a spelling that transformers 4 and 5 both
    read."""
    scaling = config.rope_scaling
    rope = None
    if scaling is not None:
        rope = {"rope_type": scaling.kind} | {
            name: getattr(scaling, name) for name in sorted(ROPE_KIND_KEYS[scaling.kind])
        }
    eos = config.eos_token_ids
    raw = {
        "model_type": config.model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_q_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": rope,
        "max_position_embeddings": config.max_position_embeddings,
        "tie_word_embeddings": config.tie_word_embeddings,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": eos[0] if len(eos) == 1 else list(eos) or None,
        "pad_token_id": config.pad_token_id,
        "use_cache": True,
    }
    window = config.sliding_window
    extra = {
        "attention_bias": config.o_bias,
        "mlp_bias": config.mlp_bias,
        "use_sliding_window": window is not None,
        "sliding_window": window,
        "max_window_layers": 0 if window else config.num_layers,
    }
    return raw | {key: extra[key] for key in FAMILIES[config.model_type].extra_keys}


def _rope(raw: dict) -> tuple[float, RopeScaling | None]:
    """Return theta and the scaling of rotary frequencies.

    transformers 5 keeps both in `rope_parameters`. Earlier, `rope_theta` was a key of its own, and `rope_scaling` was
    an object with `rope_type`, or with `type` in the oldest files.
    """
    given = [raw[key] for key in ("rope_scaling", "rope_parameters") if raw.get(key) is not None]
    if not all(isinstance(part, dict) for part in given):
        raise ConfigError("rope_scaling and rope_parameters must be objects or null")
    rope = {key: value for part in given for key, value in part.items() if value is not None}
    for part in (*given, {"rope_theta": raw["rope_theta"]} if raw.get("rope_theta") is not None else {}):
        for key, value in part.items():
            if value is not None and key in rope and rope[key] != value:
                raise ConfigError(f"{key} is given as {shown(value)} and as {shown(rope[key])}; keep one")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != rope.get("type", kind):
        raise ConfigError(f"rope_type {shown(kind)} and type {shown(rope['type'])} contradict each other; keep one")
    if not isinstance(kind, str) or kind not in ROPE_KIND_KEYS:
        raise ConfigError(f"rope type {shown(kind)} is not supported; supported: {', '.join(ROPE_KIND_KEYS)}")
    with naming(f"the {kind} rope parameters"):
        refuse_unsupported(rope, ROPE_KEYS | ROPE_KIND_KEYS[kind], {})
    theta = positive_number(rope, "rope_theta", positive_number(raw, "rope_theta", 10000.0))
    if kind == "default":
        return theta, None
    missing = ROPE_KIND_KEYS[kind] - rope.keys()
    if missing:
        raise ConfigError(f"rope type {kind} lacks {', '.join(sorted(missing))}")
    length = "original_max_position_embeddings"
    values: dict[str, Any] = {
        key: whole_number(rope, key) if key == length else positive_number(rope, key, 0.0)
        for key in ROPE_KIND_KEYS[kind]
    }
    return theta, RopeScaling(kind=kind, **values)


def _sliding_window(raw: dict, family: Family, layers: int) -> int | None:
    """Return the attention window of the model itself, if any of its layers has one.

    Rows up to that length are exact, whichever layers have the window. The decoder refuses longer rows.
    """
    kinds = raw.get("layer_types")
    if kinds is not None and not isinstance(kinds, list):
        raise ConfigError(f"layer_types must be a list or null, got {shown(kinds)}")
    for kind in kinds or ():
        if kind not in ("full_attention", "sliding_attention"):
            raise ConfigError(
                f"layer type {shown(kind)} is not supported; supported: full_attention, sliding_attention"
            )
    window = family.default_window
    off = "use_sliding_window" in family.extra_keys and not flag(raw, "use_sliding_window")
    if "sliding_window" in raw:
        # 0 is off for a class that knows no window. For Mistral it would hide every key, so it is refused.
        off = off or raw["sliding_window"] is None or (family.default_window is None and raw["sliding_window"] == 0)
        window = None if off else whole_number(raw, "sliding_window")
    # The first `max_window_layers` layers have full attention; 28 is the default in transformers.
    full_layers = 28 if raw.get("max_window_layers") is None else whole_number(raw, "max_window_layers", min=0)
    if "use_sliding_window" in family.extra_keys and (off or (kinds is None and full_layers >= layers)):
        window = None
    if kinds is not None and "sliding_attention" not in kinds and family.layer_types_decide:
        return None
    if kinds is not None and "sliding_attention" in kinds and window is None:
        raise ConfigError("layer_types has sliding_attention, but no sliding_window is set")
    return window
