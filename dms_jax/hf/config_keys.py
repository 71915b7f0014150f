"""The keys of a foreign `config.json` that are not read: which are refused, and at which values.

A key of the mathematics is accepted at the values that leave this decoder as it is, and refused at any other:

- SWITCHES and counts (`num_*`, `n_*`) are off at false, null, 0, "default" and "", [] or {}.
- Factors (`*_multiplier`, `*_scale` and the like) are neutral at 1 and null. Zero is not: it would wipe out a term.
- ONLY lists keys with other neutral values, such as `hidden_act` ("silu"), and ALWAYS those where it is true.
- FACTS are given by the caller: what a file says again, such as `num_layers`, must be what the model has.
- ABSOLUTE lists factors that replace the usual one, so that even 1 changes the numbers.

HARMLESS keys may have any value. Any other key is unknown. It is accepted at null, false, "default", "", [] and {},
which cannot switch anything on; false could switch off only what ALWAYS lists. It is refused at any other value,
because ignoring an unknown key is how a port goes silently wrong. That includes 0 and 1, since one of them is neutral
for a count and the other for a factor. A misspelt key is refused at any value but null. Begin with
`refuse_unsupported`.
"""

import re
from collections.abc import Collection
from difflib import get_close_matches

from dms_jax.errors import ConfigError, shown


def _names(text: str) -> set[str]:
    return set(text.split())


# Keys of other models and of forks of these ones.
SWITCHES = _names(
    "add_cross_attention add_swa_attention_sink_bias alibi attention_chunk_size attention_out_bias attention_sink "
    "attn_logit_softcapping attn_output_gate attn_temperature_tuning audio_config clip_qkv cross_attention_hidden_size "
    "dual_chunk_attention_config expert_layer_period final_logit_softcapping gated_attention is_decoder "
    "is_encoder_decoder kv_lora_rank layer_norm_bias lm_head_bias logits_soft_cap mlp_only_layers mrope mrope_section "
    "no_rope_layer_interval no_rope_layers norm_bias normalize_embedding normalize_embeddings parallel_attn "
    "pruned_heads q_lora_rank rope_interleaved rope_traditional sandwich_norm scale_attn_by_inverse_layer_idx "
    "scale_embedding sliding_window_pattern tie_encoder_decoder use_alibi use_bias use_dynamic_ntk use_logn_attn "
    "use_mrope use_mup use_parallel_residual use_post_norm use_sandwich_norm vision_config"
)
COUNTS = ("num_", "n_")  # of experts, extra heads, memory tokens, layers that share keys ...
FACTORS = ("_multiplier", "_scale", "_scaling", "_factor", "_pct", "_scalar")
FACTOR_NAMES = {"factor", "logits_scaling", "rope_ratio", "scale_emb", "scale_lm_head", "width_mult", "rotary_pct"}
ABSOLUTE = _names("attention_multiplier query_pre_attn_scalar attention_scale attn_scale softmax_scale scale_depth")
ONLY: dict[str, tuple] = {
    "hidden_act": ("silu", "swish"),  # two names of one function
    "hidden_activation": ("silu", "swish"),
    "activation_function": ("silu", "swish"),
    "mlp_hidden_act": ("silu", "swish"),
    "activation": ("silu", "swish", "swiglu"),  # Falcon 3 names the whole gated MLP
    "position_embedding_type": ("rope", "rotary"),
    "pos_embedding_type": ("rope", "rotary"),
    "norm_type": ("rms_norm", "rmsnorm"),
    "normalization_type": ("rms_norm", "rmsnorm", "RMSNorm"),
    "scale_attn_weights": (True,),
    "dms_disable_eviction": (False,),
}
# What these models cannot do without; a file may only confirm it.
ALWAYS = re.compile(
    r"(use_|is_|apply_|with_|enable_)?(causal(_mask|_attention)?|rope|rotary(_pos)?(_emb\w*)?|rms_?norm|residual|glu|"
    r"swiglu|silu|gated_mlp|glu_mlp|mlp_gate)"
)
QUANTIZED = ("quantization_config", "compression_config", "quantization", "quant_config")
HARMLESS = {
    "names and versions": "architectures auto_map transformers_version transformers.js_config finetuning_task "
    "task_specific_params problem_type tokenizer_class prefix is_llama_config unsloth_fixed unsloth_version "
    "model_name name_or_path model_name_or_path base_model license language tags library_name version "
    "transformers_weights adapter_config chat_template unsloth_architecture",
    "the tensors carry their own dtype": "torch_dtype dtype use_bfloat16 params_dtype bf16 fp16",
    "training only": "attention_dropout attention_dropout_prob attention_probs_dropout_prob attn_pdrop dropout "
    "embd_pdrop embedding_dropout hidden_dropout hidden_dropout_prob resid_pdrop residual_dropout resid_dropout "
    "classifier_dropout initializer_range initializer_factor init_std tf_legacy_loss loss_type label_smoothing "
    "id2label label2id num_labels gradient_checkpointing use_gradient_checkpointing neftune_alpha "
    "neftune_noise_alpha z_loss_coef aux_loss_coef router_aux_loss_coef router_jitter_noise output_past",
    "how to run, not what to compute": "use_cache pretraining_tp torchscript chunk_size_feed_forward return_dict "
    "output_attentions output_hidden_states output_router_logits attn_implementation attention_implementation "
    "cache_implementation keys_to_ignore_at_inference use_flash_attn use_flash_attention use_flash_attention_2 "
    "use_sdpa use_liger_kernel use_fused_rms_norm use_fused_rope fused_rms_norm fuse_cross_entropy use_kernels "
    "logits_to_keep num_logits_to_keep tensor_parallel_size tp_size sequence_parallel xla_device is_composition",
    "lengths that no computation here depends on": "max_sequence_length model_max_length max_seq_len max_seq_length "
    "seq_length seq_len n_positions n_ctx original_max_position_embeddings",
    "how intermediate_size was computed": "ffn_dim_multiplier multiple_of",
    "generation defaults, which old files keep here": "bad_words_ids begin_suppress_tokens decoder_start_token_id "
    "diversity_penalty do_sample early_stopping encoder_no_repeat_ngram_size exponential_decay_length_penalty "
    "forced_bos_token_id forced_eos_token_id length_penalty max_length min_length no_repeat_ngram_size num_beam_groups "
    "num_beams num_return_sequences output_scores remove_invalid_values repetition_penalty return_dict_in_generate "
    "sep_token_id suppress_tokens temperature top_k top_p typical_p max_new_tokens min_p penalty_alpha "
    "renormalize_logits guidance_scale",
    "special tokens, which the tokenizer knows": "unk_token_id mask_token_id cls_token_id bos_token eos_token "
    "pad_token unk_token image_token_id tokenizer_vocab_size",
    "run-time settings of NVIDIA's own cache": "dms_manual_inference_mode dms_chunked_prefill "
    "dms_paged_attention_block_size dms_preallocate_for_tokens",
}
HARMLESS_KEYS = _names(" ".join(HARMLESS.values()))


def refuse_unsupported(raw: dict, read: Collection[str], facts: dict[str, object]) -> None:
    """Refuse a file with a key that changes the mathematics and that nothing here reads.

    `read`: the keys that the caller reads. `facts`: further keys that may only say what the model has anyway.
    """
    for key in QUANTIZED:
        if not is_empty(raw.get(key)):
            raise ConfigError(
                f"{key}: quantized weights are not supported; give the unquantized folder (bf16, fp16 or fp32)"
            )
    for key in sorted(raw.keys() - set(read) - set(QUANTIZED)):
        reason = refusal(key, raw[key], facts)
        if raw[key] is not None and not _is_known(key, facts) and (meant := _misspelt(key, read)):
            raise ConfigError(f"unknown key `{key}`; did you mean {meant}?")
        if reason:
            raise ConfigError(reason)


def refusal(key: str, value: object, facts: dict[str, object]) -> str | None:
    """Return why the value of a key that is not read must be refused, or None if it changes nothing."""
    if value is None or key in HARMLESS_KEYS or key.startswith("_"):  # `_*`: private to transformers
        return None
    if key in facts:
        neutral, allowed = _same(value, facts[key]), f"{shown(facts[key])}, as the rest of the file says,"
    elif key in ONLY:
        neutral, allowed = any(_same(value, one) for one in ONLY[key]), " or ".join(map(repr, ONLY[key]))
    elif ALWAYS.fullmatch(key):
        neutral, allowed = value is True, "true"
    elif key in ABSOLUTE:
        neutral, allowed = False, "null"
    elif key.startswith("dms_"):  # a key of the policy that is unknown here: even false might change a default
        return f"unknown key `{key}` may change the policy; remove it if it has no effect"
    elif key in FACTOR_NAMES or key.endswith(FACTORS):
        neutral, allowed = _same(value, 1), "1"
    elif key in SWITCHES or key.startswith(COUNTS):
        neutral, allowed = is_empty(value) or _same(value, 0), "false, null or 0"
    elif is_empty(value):
        return None
    else:
        return (
            f"unknown key `{key}` may change the mathematics; remove it if it has no effect, or list it in "
            "dms_jax/hf/config_keys.py"
        )
    return None if neutral else f"{key}={shown(value)} is not supported; only {allowed} is"


def _misspelt(key: str, read: Collection[str]) -> str | None:
    """Return the key that was meant, if `key` is a misspelling and not merely a related word."""
    return next((name for name in get_close_matches(key, read, n=1, cutoff=0.9) if abs(len(name) - len(key)) < 3), None)


def _is_known(key: str, facts: dict[str, object]) -> bool:
    return key.startswith("_") or key in SWITCHES | HARMLESS_KEYS | FACTOR_NAMES | ABSOLUTE | ONLY.keys() | facts.keys()


def is_empty(value: object) -> bool:
    """Whether a value switches nothing on: null, false, "default", or an empty text, list or object."""
    return value is None or value is False or value == "default" or (isinstance(value, str | list | dict) and not value)


def _same(value: object, other: object) -> bool:
    """Whether two values are equal, where 1 is 1.0 but not true."""
    return value == other and isinstance(value, bool) == isinstance(other, bool)
