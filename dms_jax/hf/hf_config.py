"""`config.json` <-> ModelConfig, and the released `dms_*` keys <-> DMSConfig.

Every key is read (HANDLED), may hold one value only (FIXED), or is known not to change the logits (HARMLESS, with a reason).
Any other key is refused: a key nobody reads is how a port goes silently wrong. Old and transformers-5 spellings are both read.
"""

import dataclasses
import json
import os
from difflib import get_close_matches

from dms_jax.config import ConfigError, DMSConfig, ModelConfig, RopeScaling, build

FAMILIES = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}

HANDLED = {
    "model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "head_dim", "hidden_act", "rms_norm_eps", "rope_theta", "rope_scaling", "rope_parameters", "max_position_embeddings",
    "tie_word_embeddings", "attention_bias", "mlp_bias", "sliding_window", "use_sliding_window", "max_window_layers", "layer_types",
    "bos_token_id", "eos_token_id", "pad_token_id",
}  # fmt: skip
# One value each; null and absence mean the same. Any other value changes the logits in a way the decoder does not have.
FIXED = {"hidden_act": "silu", "partial_rotary_factor": 1.0, "rope_interleaved": False, "pruned_heads": {}, "add_cross_attention": False,
         "is_encoder_decoder": False, "is_decoder": False, "tie_encoder_decoder": False, "cross_attention_hidden_size": None,
         "dms_disable_eviction": False}  # fmt: skip
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
ROPE_KIND_KEYS = {"default": set(), "linear": {"factor"}, "llama3": {f.name for f in dataclasses.fields(RopeScaling)} - {"kind"}}

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
FASTDMS_SPELLINGS = {"window_size": ("window_size",), "target_cr": ("target_cr",), "tau": ("tau",), "evict_logit_scale": ("alpha_scale",),
                     "evict_logit_bias": ("alpha_offset", "dms_alpha_offset")}  # fmt: skip
FASTDMS_HINTS = {name for names in FASTDMS_SPELLINGS.values() for name in names}
FASTDMS_HARMLESS = {"context_len", "compression_mode"}


def read_json(path: str) -> dict:
    """The mapping in a JSON file."""
    try:
        with open(path, encoding="utf-8") as file:
            raw = json.load(file)
    except (OSError, UnicodeDecodeError) as why:
        raise ConfigError(f"cannot read {path}: {why}") from why
    except json.JSONDecodeError as why:
        raise ConfigError(f"{path} is not valid JSON: {why}") from why
    if not isinstance(raw, dict):
        raise ConfigError(f"{path} must hold a JSON object, got {type(raw).__name__}")
    return raw


def read_folder(folder: str) -> tuple[dict, ModelConfig]:
    """The raw `config.json` of a folder and what it means, with the stop tokens of `generation_config.json` added."""
    raw = read_json(os.path.join(folder, "config.json"))
    generation = os.path.join(folder, "generation_config.json")
    more = read_json(generation).get("eos_token_id") if os.path.exists(generation) else None
    config = model_config(raw, fastdms=_fastdms_metadata(folder, log_above=not any(key.startswith("dms_") for key in raw)))
    eos = tuple(dict.fromkeys(config.eos_token_ids + _as_tuple(more)))
    return raw, dataclasses.replace(config, eos_token_ids=eos)


def model_config(raw: dict, fastdms: dict | None = None) -> ModelConfig:
    """`config.json` as a ModelConfig. `fastdms`: the metadata FastDMS keeps beside it, when there is any."""
    family = raw.get("model_type")
    if family not in FAMILIES:
        raise ConfigError(f"model_type {family!r} is not supported; supported: {', '.join(FAMILIES)}")
    _refuse_unknown(raw)
    heads, hidden, layers = _need(raw, "num_attention_heads"), _need(raw, "hidden_size"), _need(raw, "num_hidden_layers")
    head_dim = raw.get("head_dim") or (128 if family == "qwen3" and "head_dim" not in raw else hidden // heads)
    for key, having in BIASES.items():
        if raw.get(key) and family not in having:
            raise ConfigError(f"{key}=true in config.json: a {family} model has no such bias")
    bias = bool(raw.get("attention_bias")) and family != "qwen2"  # Qwen 2 has q, k, v biases and no o bias whatever the key says
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
        rms_norm_eps=float(raw.get("rms_norm_eps", 1e-6)),
        rope_theta=theta,
        rope_scaling=scaling,
        max_position_embeddings=raw.get("max_position_embeddings") or 4096,
        tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),  # the class default of all four families
        qkv_bias=bias or family == "qwen2",
        o_bias=bias,
        mlp_bias=bool(raw.get("mlp_bias")),
        qk_norm=family == "qwen3",
        sliding_window=_sliding_window(raw, family, layers),
        bos_token_id=raw.get("bos_token_id"),
        eos_token_ids=_as_tuple(raw.get("eos_token_id")),
        pad_token_id=raw.get("pad_token_id"),
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
    values["variant"] = "projection" if raw.get(SEPARATE) else "borrowed"
    return _checked_dms(values)


def dms_keys(dms: DMSConfig) -> dict:
    """The `dms_*` keys of a policy, all of them explicit: what `dms_config` reads back to an equal DMSConfig."""
    keys = {SEPARATE: dms.variant == "projection"} | {key: getattr(dms, field) for field, (key, _) in DMS_KEYS.items()}
    return keys | {"dms_cr": int(dms.target_cr) if dms.target_cr == int(dms.target_cr) else dms.target_cr}  # a whole number elsewhere


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
        rope = {"rope_type": scaling.kind} | {name: getattr(scaling, name) for name in sorted(ROPE_KIND_KEYS[scaling.kind])}
    eos = config.eos_token_ids
    raw = {
        "model_type": config.model_type, "vocab_size": config.vocab_size, "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size, "num_hidden_layers": config.num_layers, "num_attention_heads": config.num_q_heads,
        "num_key_value_heads": config.num_kv_heads, "head_dim": config.head_dim, "hidden_act": "silu",
        "rms_norm_eps": config.rms_norm_eps, "rope_theta": config.rope_theta, "rope_scaling": rope,
        "max_position_embeddings": config.max_position_embeddings, "tie_word_embeddings": config.tie_word_embeddings,
        "bos_token_id": config.bos_token_id, "eos_token_id": eos[0] if len(eos) == 1 else list(eos) or None,
        "pad_token_id": config.pad_token_id, "use_cache": True,
    }  # fmt: skip
    if config.model_type in ("llama", "qwen3"):
        raw["attention_bias"] = config.o_bias
    if config.model_type == "llama":
        raw["mlp_bias"] = config.mlp_bias
    if config.model_type == "mistral":
        raw["sliding_window"] = config.sliding_window
    if config.model_type in ("qwen2", "qwen3"):
        window = config.sliding_window
        raw |= {"use_sliding_window": window is not None, "sliding_window": window, "max_window_layers": 0 if window else config.num_layers}
    return raw


def _refuse_unknown(raw: dict) -> None:
    if raw.get("quantization_config") is not None:
        raise ConfigError("config.json has quantization_config: give the unquantized folder (bf16, fp16 or fp32 weights)")
    for key, value in FIXED.items():
        if raw.get(key) is not None and raw[key] != value:
            raise ConfigError(f"{key}={raw[key]!r} in config.json is not supported; only {value!r} is")
    read = {SEPARATE, "quantization_config", *FIXED, *HANDLED, *(key for key, _ in DMS_KEYS.values())}
    known = read | HARMLESS_KEYS | FASTDMS_HINTS | FASTDMS_HARMLESS
    for key in sorted(raw.keys() - known):
        if key.startswith("_"):  # private to transformers: paths, hashes, attention implementation
            continue
        near = get_close_matches(key, read, n=1)
        hint = f"did you mean {near[0]}?" if near else "handle it in dms_jax/hf/hf_config.py, or list it as HARMLESS there with the reason"
        raise ConfigError(f"unknown key `{key}` in config.json may change the mathematics; {hint}")


def _rope(raw: dict) -> tuple[float, RopeScaling | None]:
    """Theta and scaling. transformers 5 holds both in `rope_parameters`; before, theta stood alone and `rope_scaling` was a
    dict with `rope_type`, or `type` in the oldest files."""
    rope = (raw.get("rope_scaling") or {}) | (raw.get("rope_parameters") or {})
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ROPE_KIND_KEYS:
        raise ConfigError(f"rope type {kind!r} in config.json is not supported; supported: {', '.join(ROPE_KIND_KEYS)}")
    for key in sorted(rope.keys() - ROPE_KEYS - ROPE_KIND_KEYS[kind]):
        if rope[key] is not None:
            raise ConfigError(f"unknown key `{key}` in the {kind} rope parameters of config.json")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ConfigError(f"partial_rotary_factor {rope['partial_rotary_factor']} is not supported; only 1.0 is")
    theta = float(rope.get("rope_theta") or raw.get("rope_theta") or 10000.0)
    if kind == "default":
        return theta, None
    missing = ROPE_KIND_KEYS[kind] - rope.keys()
    if missing:
        raise ConfigError(f"rope type {kind} in config.json lacks {', '.join(sorted(missing))}")
    return theta, RopeScaling(kind=kind, **{key: rope[key] for key in ROPE_KIND_KEYS[kind]})


def _sliding_window(raw: dict, family: str, layers: int) -> int | None:
    """The model's own window, if any layer has one. Rows up to it are exact whichever layers those are: longer ones are refused."""
    kinds = raw.get("layer_types")
    for kind in kinds or ():
        if kind not in ("full_attention", "sliding_attention"):
            raise ConfigError(f"layer type {kind!r} in config.json is not supported; supported: full_attention, sliding_attention")
    window = raw.get("sliding_window", None if family == "llama" else 4096)  # the class default of the other three
    if family in ("qwen2", "qwen3"):
        if not raw.get("use_sliding_window", False):
            window = None
        elif kinds is None and raw.get("max_window_layers", 28) >= layers:
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


def _need(raw: dict, key: str) -> int:
    value = raw.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"config.json needs a positive whole number `{key}`, got {value!r}")
    return value


def _as_tuple(ids: int | list | None) -> tuple[int, ...]:
    return () if ids is None else tuple(ids) if isinstance(ids, list | tuple) else (ids,)
