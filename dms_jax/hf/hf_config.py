"""`config.json` <-> ModelConfig, and the released `dms_*` keys <-> DMSConfig.

Every key is read (HANDLED), may hold one value only (FIXED), or is known not to change the logits (HARMLESS, with a reason).
Any other key is refused: a key nobody reads is how a port goes silently wrong. Old and transformers-5 spellings are both read.
"""

import dataclasses
import math
import os
from difflib import get_close_matches
from typing import Any

from dms_jax.config import DMSConfig, ModelConfig, RopeScaling
from dms_jax.config_reader import MAX_INT, build
from dms_jax.errors import ConfigError, naming, shown
from dms_jax.files import read_json

FAMILIES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}

HANDLED = {
    "model_type",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
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
# One value each; null and absence mean the same. Any other value changes the logits in a way the decoder does not have.
FIXED = {
    "hidden_act": "silu",
    "partial_rotary_factor": 1.0,
    "rope_interleaved": False,
    "pruned_heads": {},
    "add_cross_attention": False,
    "is_encoder_decoder": False,
    "is_decoder": False,
    "tie_encoder_decoder": False,
    "cross_attention_hidden_size": None,
    "dms_disable_eviction": False,
}
HARMLESS = {
    "names and versions": "architectures auto_map transformers_version transformers.js_config finetuning_task task_specific_params "
    "problem_type tokenizer_class prefix is_llama_config unsloth_fixed unsloth_version model_name",
    "the tensors carry their own dtype": "torch_dtype dtype use_bfloat16",
    "training only": "attention_dropout initializer_range tf_legacy_loss id2label label2id num_labels",
    "how to run, not what to compute": "use_cache pretraining_tp torchscript chunk_size_feed_forward return_dict output_attentions "
    "output_hidden_states output_router_logits",
    "generation defaults, which old files keep here": "bad_words_ids begin_suppress_tokens decoder_start_token_id diversity_penalty "
    "do_sample early_stopping encoder_no_repeat_ngram_size exponential_decay_length_penalty forced_bos_token_id forced_eos_token_id "
    "length_penalty max_length min_length no_repeat_ngram_size num_beam_groups num_beams num_return_sequences output_scores "
    "remove_invalid_values repetition_penalty return_dict_in_generate sep_token_id suppress_tokens temperature top_k top_p typical_p",
    "run-time settings of NVIDIA's own cache": "dms_manual_inference_mode dms_chunked_prefill dms_paged_attention_block_size "
    "dms_preallocate_for_tokens",
}
BIASES = {"attention_bias": ("llama", "qwen2", "qwen3"), "mlp_bias": ("llama",)}
HARMLESS_KEYS = {key for keys in HARMLESS.values() for key in keys.split()}
ROPE_KEYS = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
ROPE_KIND_KEYS = {
    "default": set(),
    "linear": {"factor"},
    "llama3": {f.name for f in dataclasses.fields(RopeScaling)} - {"kind"},
}

# DMSConfig field -> the key in config.json, and its value when absent (the class defaults of Model-Optimizer's Qwen3ConfigDMS).
DMS_KEYS = {
    "window_size": ("dms_window_size", 512),
    "target_cr": ("dms_cr", 8.0),
    "tau": ("dms_tau", 0.1),
    "evict_logit_scale": ("dms_alpha_scale", 100.0),
    "evict_logit_bias": ("dms_initial_alpha_offset", 5.0),
    "granularity": ("dms_alpha_per", "head"),
    "decision_shift": ("dms_decision_shift", 1),
    "zero_borrowed": ("dms_zero_mode", "pre+post"),
}
SEPARATE = "dms_separate_alpha"  # true: own projection; false: the borrowed query channel
# FastDMS trains token t to decide pair t, with the borrowed channel live in the scores (`dms.md` 1.5, 3.4, 8.2).
FASTDMS_DEFAULTS = {"window_size": 256, "decision_shift": 0, "zero_borrowed": "none"}
FASTDMS_SPELLINGS = {
    "window_size": ("window_size",),
    "target_cr": ("target_cr",),
    "tau": ("tau",),
    "evict_logit_scale": ("alpha_scale",),
    "evict_logit_bias": ("alpha_offset", "dms_alpha_offset"),
}
FASTDMS_HINTS = {name for names in FASTDMS_SPELLINGS.values() for name in names}
FASTDMS_HARMLESS = {"context_len", "compression_mode"}


def read_folder(folder: str) -> tuple[dict, ModelConfig]:
    """The raw `config.json` of a folder and what it means, with the stop tokens of `generation_config.json` added."""
    path, generation = (os.path.join(folder, name) for name in ("config.json", "generation_config.json"))
    raw = read_json(path)
    more = read_json(generation).get("eos_token_id") if os.path.lexists(generation) else None
    fastdms = _fastdms_metadata(folder, log_above=not any(key.startswith("dms_") for key in raw))
    with naming(path):
        config = model_config(raw, fastdms)
    with naming(generation):
        eos = tuple(dict.fromkeys(config.eos_token_ids + _token_ids("eos_token_id", more)))
    return raw, dataclasses.replace(config, eos_token_ids=eos)


def model_config(raw: dict, fastdms: dict | None = None) -> ModelConfig:
    """`config.json` as a ModelConfig. `fastdms`: the metadata FastDMS keeps beside it, when there is any."""
    family = raw.get("model_type")
    if not isinstance(family, str) or family not in FAMILIES:
        raise ConfigError(f"model_type {shown(family)} is not supported; supported: {', '.join(FAMILIES)}")
    _refuse_unknown(raw)
    heads, hidden, layers = (
        _need(raw, "num_attention_heads"),
        _need(raw, "hidden_size"),
        _need(raw, "num_hidden_layers"),
    )
    # An explicit null is not the class default of Qwen 3.
    head_dim = (
        _need(raw, "head_dim")
        if raw.get("head_dim") is not None
        else (128 if family == "qwen3" and "head_dim" not in raw else hidden // heads)
    )
    for key, having in BIASES.items():
        if _flag(raw, key) and family not in having:
            raise ConfigError(f"{key}=true in config.json: a {family} model has no such bias")
    bias = (
        _flag(raw, "attention_bias") and family != "qwen2"
    )  # Qwen 2 has q, k, v biases and no o bias whatever the key says
    no_groups = family == "llama" and raw.get("num_key_value_heads") is None  # Llama 1 and 2 files leave it out
    theta, scaling = _rope(raw)
    return ModelConfig(
        model_type=family,
        vocab_size=_need(raw, "vocab_size"),
        hidden_size=hidden,
        intermediate_size=_need(raw, "intermediate_size"),
        num_layers=layers,
        num_q_heads=heads,
        num_kv_heads=heads if no_groups else _need(raw, "num_key_value_heads"),
        head_dim=head_dim,
        rms_norm_eps=_number(raw, "rms_norm_eps", 1e-6),
        rope_theta=theta,
        rope_scaling=scaling,
        max_position_embeddings=4096
        if raw.get("max_position_embeddings") is None
        else _need(raw, "max_position_embeddings"),
        tie_word_embeddings=_flag(raw, "tie_word_embeddings"),  # false is the class default of all four families
        qkv_bias=bias or family == "qwen2",
        o_bias=bias,
        mlp_bias=_flag(raw, "mlp_bias"),
        qk_norm=family == "qwen3",
        sliding_window=_sliding_window(raw, family, layers),
        bos_token_id=_token_id("bos_token_id", raw.get("bos_token_id")),
        eos_token_ids=_token_ids("eos_token_id", raw.get("eos_token_id")),
        pad_token_id=_token_id("pad_token_id", raw.get("pad_token_id")),
        dms=dms_config(raw, fastdms),
    )


def dms_config(raw: dict, fastdms: dict | None = None) -> DMSConfig | None:
    """The policy that a `config.json` declares, or None. An explicit `dms_*` key wins, then FastDMS metadata, then the
    defaults of whoever wrote the folder."""
    written = {key for key in raw if key.startswith("dms_")}
    if fastdms is None and raw.keys() & FASTDMS_HINTS:
        fastdms = raw
    if not written and fastdms is None:
        return None
    values = {field: default for field, (_, default) in DMS_KEYS.items()}
    if fastdms is not None:
        values |= FASTDMS_DEFAULTS
        for field, (key, _) in DMS_KEYS.items():
            for name in (*FASTDMS_SPELLINGS.get(field, ()), key):  # the last one found wins: the explicit key
                values[field] = fastdms.get(name, values[field])
    values |= {field: raw[key] for field, (key, _) in DMS_KEYS.items() if key in raw}
    values["variant"] = "projection" if _flag(raw, SEPARATE) else "borrowed"
    return _checked_dms(values)


def dms_keys(dms: DMSConfig) -> dict:
    """The `dms_*` keys of a policy, all of them explicit: what `dms_config` reads back to an equal DMSConfig."""
    keys = {SEPARATE: dms.variant == "projection"} | {key: getattr(dms, field) for field, (key, _) in DMS_KEYS.items()}
    return keys | {
        "dms_cr": int(dms.target_cr) if dms.target_cr == int(dms.target_cr) else dms.target_cr
    }  # a whole number elsewhere


def folder_config(config: ModelConfig, original: dict | None = None) -> dict:
    """`config.json` to write: the original, unchanged but for the policy, or a fresh one for a model that came without."""
    raw = dict(original) if original is not None else fresh_config(config)
    raw = {key: value for key, value in raw.items() if key not in FASTDMS_HINTS | FASTDMS_HARMLESS}
    # `auto_map` names Python files that do not travel with the weights; the policy needs no remote code to be read.
    raw.pop("auto_map", None)
    raw |= {"architectures": [FAMILIES[config.model_type]], "tie_word_embeddings": config.tie_word_embeddings}
    return raw | (dms_keys(config.dms) if config.dms is not None else {})


def fresh_config(config: ModelConfig) -> dict:
    """`config.json` of a model that has none (from GGUF, or random), in the spelling both transformers 4 and 5 read."""
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
    if config.model_type in ("llama", "qwen3"):
        raw["attention_bias"] = config.o_bias
    if config.model_type == "llama":
        raw["mlp_bias"] = config.mlp_bias
    if config.model_type == "mistral":
        raw["sliding_window"] = config.sliding_window
    if config.model_type in ("qwen2", "qwen3"):
        window = config.sliding_window
        raw |= {
            "use_sliding_window": window is not None,
            "sliding_window": window,
            "max_window_layers": 0 if window else config.num_layers,
        }
    return raw


def _refuse_unknown(raw: dict) -> None:
    if raw.get("quantization_config") is not None:
        raise ConfigError(
            "config.json has quantization_config: give the unquantized folder (bf16, fp16 or fp32 weights)"
        )
    for key, value in FIXED.items():
        if raw.get(key) is not None and (raw[key] != value or isinstance(raw[key], bool) != isinstance(value, bool)):
            raise ConfigError(f"{key}={shown(raw[key])} in config.json is not supported; only {value!r} is")
    read = {SEPARATE, "quantization_config", *FIXED, *HANDLED, *(key for key, _ in DMS_KEYS.values())}
    known = read | HARMLESS_KEYS | FASTDMS_HINTS | FASTDMS_HARMLESS
    for key in sorted(raw.keys() - known):
        if key.startswith("_"):  # private to transformers: paths, hashes, attention implementation
            continue
        near = get_close_matches(key, read, n=1)
        hint = (
            f"did you mean {near[0]}?"
            if near
            else "handle it in dms_jax/hf/hf_config.py, or list it as HARMLESS there with the reason"
        )
        raise ConfigError(f"unknown key `{key}` in config.json may change the mathematics; {hint}")


def _rope(raw: dict) -> tuple[float, RopeScaling | None]:
    """Theta and scaling. transformers 5 holds both in `rope_parameters`; before, theta stood alone and `rope_scaling` was a
    dict with `rope_type`, or `type` in the oldest files."""
    given = [raw[key] for key in ("rope_scaling", "rope_parameters") if raw.get(key) is not None]
    if not all(isinstance(part, dict) for part in given):
        raise ConfigError("rope_scaling and rope_parameters in config.json must be objects or null")
    rope = {key: value for part in given for key, value in part.items() if value is not None}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if not isinstance(kind, str) or kind not in ROPE_KIND_KEYS:
        raise ConfigError(
            f"rope type {shown(kind)} in config.json is not supported; supported: {', '.join(ROPE_KIND_KEYS)}"
        )
    for key in sorted(rope.keys() - ROPE_KEYS - ROPE_KIND_KEYS[kind]):
        raise ConfigError(f"unknown key `{key}` in the {kind} rope parameters of config.json")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ConfigError(f"partial_rotary_factor {shown(rope['partial_rotary_factor'])} is not supported; only 1.0 is")
    theta = _number(rope, "rope_theta", _number(raw, "rope_theta", 10000.0))
    if kind == "default":
        return theta, None
    missing = ROPE_KIND_KEYS[kind] - rope.keys()
    if missing:
        raise ConfigError(f"rope type {kind} in config.json lacks {', '.join(sorted(missing))}")
    length = "original_max_position_embeddings"
    values: dict[str, Any] = {
        key: _need(rope, key) if key == length else _number(rope, key, 0.0) for key in ROPE_KIND_KEYS[kind]
    }
    return theta, RopeScaling(kind=kind, **values)


def _sliding_window(raw: dict, family: str, layers: int) -> int | None:
    """The model's own window, if any layer has one. Rows up to it are exact whichever layers those are: longer ones are refused."""
    kinds = raw.get("layer_types")
    if kinds is not None and not isinstance(kinds, list):
        raise ConfigError(f"layer_types in config.json must be a list or null, got {shown(kinds)}")
    for kind in kinds or ():
        if kind not in ("full_attention", "sliding_attention"):
            raise ConfigError(
                f"layer type {shown(kind)} in config.json is not supported; supported: full_attention, sliding_attention"
            )
    window = None if family == "llama" else 4096  # the class default of the other three
    if "sliding_window" in raw:
        window = None if raw["sliding_window"] is None else _need(raw, "sliding_window")
    first = 28 if raw.get("max_window_layers") is None else _need(raw, "max_window_layers", 0)
    if family in ("qwen2", "qwen3"):
        if not _flag(raw, "use_sliding_window"):
            window = None
        elif kinds is None and first >= layers:
            window = None  # the first `max_window_layers` layers have full attention
    if kinds is not None and "sliding_attention" not in kinds and family != "mistral":
        return None
    if kinds is not None and "sliding_attention" in kinds and window is None:
        raise ConfigError("layer_types in config.json has sliding_attention, but no sliding_window is set")
    return window


def _fastdms_metadata(folder: str, log_above: bool) -> dict | None:
    """What FastDMS keeps beside the weights: `dms_metadata.json`, or (`log_above`) the training log's config one folder up."""
    beside = os.path.join(folder, "dms_metadata.json")
    if os.path.exists(beside):
        raw = read_json(beside)
        return raw["config"] if isinstance(raw.get("config"), dict) else raw
    above = os.path.join(os.path.dirname(os.path.abspath(folder)), "training_log.json")
    if log_above and os.path.exists(above):
        config = read_json(above).get("config")
        if isinstance(config, dict) and config.keys() & FASTDMS_HINTS:
            return config
    return None


def _checked_dms(values: dict) -> DMSConfig:
    try:
        return build(DMSConfig, values)
    except ConfigError as why:
        names = {f"`{field}`": f"`{key}`" for field, (key, _) in DMS_KEYS.items()}
        text = str(why)
        for ours, theirs in names.items():
            text = text.replace(ours, theirs)
        raise ConfigError(f"config.json: {text}") from why


def _need(raw: dict, key: str, least: int = 1) -> int:
    value = raw.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= MAX_INT:
        rule = "a positive whole number" if least else "a whole number"
        raise ConfigError(f"config.json needs {rule} `{key}`, got {shown(value)}")
    return value


def _number(raw: dict, key: str, default: float) -> float:
    """A positive finite number; null and absence mean the default."""
    value = raw.get(key)
    if value is None:
        return default
    if (
        isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf or value > 1e300
    ):  # a larger int is no float
        raise ConfigError(f"`{key}` in config.json must be a positive number, got {shown(value)}")
    return float(value)


def _flag(raw: dict, key: str) -> bool:
    """true or false; null and absence mean false. "false" is a text, and true to Python."""
    value = raw.get(key)
    if value is not None and not isinstance(value, bool):
        raise ConfigError(f"`{key}` in config.json must be true or false, got {shown(value)}")
    return bool(value)


def _token_id(key: str, value: object) -> int | None:
    if value is None:
        return None
    if (
        not isinstance(value, int) or isinstance(value, bool) or not -1 <= value <= MAX_INT
    ):  # -1: old files mean none by it
        raise ConfigError(f"`{key}` must be a token id, got {shown(value)}")
    return value


def _token_ids(key: str, values: object) -> tuple[int, ...]:
    ids = [] if values is None else values if isinstance(values, list) else [values]
    return tuple(value for item in ids if (value := _token_id(key, item)) is not None)
