"""Keys of `config.json` that nothing reads: off where their value is off, refused where it changes the mathematics."""

import json
import os
from pathlib import Path

import pytest
from hf.hf_cases import LLAMA2

from dms_jax.errors import ConfigError
from dms_jax.hf.config_keys import HARMLESS_KEYS
from dms_jax.hf.hf_config import model_config, read_folder

BASE = LLAMA2 | {"num_key_value_heads": 2}
QWEN2, QWEN3, MISTRAL = (BASE | {"model_type": name} for name in ("qwen2", "qwen3", "mistral"))

# key, values that leave the model as it is, values that change it
KEYS = [
    ("use_mrope", [False, None], [True]),
    ("use_bias", [False, None, 0], [True]),
    ("attn_logit_softcapping", [None, 0, 0.0, False], [50.0, True]),
    ("final_logit_softcapping", [None], [30.0]),
    ("dual_chunk_attention_config", [None, {}], [{"chunk_size": 8}]),
    ("num_experts", [0, None], [8, 1]),
    ("n_routed_experts", [0, None], [64]),
    ("logits_scaling", [1.0, 1, None], [16.0, 0, True]),
    ("embedding_multiplier", [1, 1.0, None], [12.0, 0]),
    ("residual_multiplier", [1.0], [0.22]),
    ("logit_scale", [1.0], [0.0625]),
    ("attention_multiplier", [None], [1.0, 0.125]),  # replaces 1 / sqrt(head_dim), so even 1 changes the scores
    ("query_pre_attn_scalar", [None], [256, 1]),
    ("partial_rotary_factor", [1, 1.0, None], [0.5, 0]),
    ("rope_interleaved", [False], [True]),
    ("hidden_act", ["silu", "swish", None], ["gelu", "relu2", False, ""]),
    ("use_rope", [True, None], [False]),
    ("use_rotary_embeddings", [True], [False]),
    ("is_causal", [True, None], [False]),
    ("use_rms_norm", [True], [False]),
    ("no_rope_layers", [[], None], [[1, 1, 0]]),
    ("position_embedding_type", ["rope", None], ["alibi"]),
    ("quantization_config", [None, {}], [{"quant_method": "awq"}]),
    ("num_layers", [2, None], [3]),  # another name of num_hidden_layers
    ("sliding_window", [None, 0], [-5, 1.5, True]),
    ("rope_scaling", [None, {}, {"type": "default"}, {"rope_type": "default", "factor": 1.0}], [{"type": "su"}]),
    ("mlp_bias", [None, False], ["false", 1]),
    ("unheard_of", [None, False, "", "default", [], {}], [True, 0, 1, 1.0, "on", [0], {"a": None}]),
    ("dms_unheard_of", [None], [False, 0, "", True]),
]


@pytest.mark.parametrize(
    "key, value", [(key, value) for key, neutral, _ in KEYS for value in neutral], ids=lambda part: str(part)[:30]
)
def test_key_at_its_neutral_value_changes_nothing(key, value):
    assert model_config(BASE | {key: value}) == model_config(BASE)


@pytest.mark.parametrize(
    "key, value", [(key, value) for key, _, others in KEYS for value in others], ids=lambda part: str(part)[:30]
)
def test_key_with_a_value_is_refused_by_name(key, value):
    with pytest.raises(ConfigError, match=key if key != "rope_scaling" else "rope type"):
        model_config(BASE | {key: value})


@pytest.mark.parametrize("key", sorted(HARMLESS_KEYS))
def test_key_of_a_runtime_is_harmless_at_any_value(key):
    base = QWEN3 | {"dms_cr": 8} if key.startswith("dms_") else BASE  # a key of the policy makes a policy
    for value in (True, 0, 3.5, "flash_attention_2", [1], None):
        assert model_config(base | {key: value}) == model_config(base)


def test_keys_of_runtimes_that_published_files_have_are_harmless():
    named = "attn_implementation cache_implementation gradient_checkpointing keys_to_ignore_at_inference"
    named += " max_sequence_length model_max_length neftune_alpha"
    assert set(named.split()) <= HARMLESS_KEYS


def test_what_the_model_type_says_may_be_confirmed_but_not_denied():
    for raw, key, says in ((QWEN3, "use_qk_norm", True), (BASE, "qk_norm", False), (QWEN2, "qkv_bias", True)):
        assert model_config(raw | {key: says}) == model_config(raw)
        with pytest.raises(ConfigError, match=f"{key}={not says}"):
            model_config(raw | {key: not says})


@pytest.mark.parametrize(
    "key, hint",
    [
        ("rms_norm_epz", "rms_norm_eps"),
        ("rope_teta", "rope_theta"),
        ("num_key_value_head", "num_key_value_heads"),
        ("use_slidng_window", "use_sliding_window"),
        ("dms_window_sise", "dms_window_size"),
        ("dual_chunk_attention_config", None),  # not a misspelt quantization_config
        ("v_head_dim", None),
        ("moe_intermediate_size", None),
        ("swa_num_attention_heads", None),
        ("attn_bias", None),
        ("rope_theta_local", None),
    ],
)
def test_only_a_true_misspelling_gets_a_hint(key, hint):
    with pytest.raises(ConfigError, match=key) as refusal:
        model_config(BASE | {key: 7})
    assert (f"did you mean {hint}?" in str(refusal.value)) if hint else ("did you mean" not in str(refusal.value))


def test_misspelt_switch_is_refused_even_if_it_is_off():
    with pytest.raises(ConfigError, match="did you mean max_window_layers"):
        model_config(QWEN2 | {"max_window_layer": 0})


@pytest.mark.parametrize(
    "raw, window", [(MISTRAL, 0), (MISTRAL, -1), (QWEN2 | {"use_sliding_window": True, "max_window_layers": 0}, 0)]
)
def test_window_that_would_hide_every_key_is_refused(raw, window):
    """transformers computes a mask without a single key for a window of 0."""
    with pytest.raises(ConfigError, match="sliding_window"):
        model_config(raw | {"sliding_window": window})
    assert model_config(QWEN2 | {"use_sliding_window": False, "sliding_window": 0}).sliding_window is None


@pytest.mark.parametrize("value", [1e300, 1e-300, float("inf"), float("nan"), 10**400])
def test_number_that_float32_cannot_hold_is_refused(value):
    for key in ("rope_theta", "rms_norm_eps"):
        with pytest.raises(ConfigError, match=f"{key}.*float32"):
            model_config(BASE | {key: value})


def test_no_such_token_is_none():
    config = model_config(BASE | {"bos_token_id": -1, "eos_token_id": [2, -1], "pad_token_id": -1})
    assert (config.bos_token_id, config.eos_token_ids, config.pad_token_id) == (None, (2,), None)


def test_contradicting_rope_types_are_refused():
    with pytest.raises(ConfigError, match="contradict"):
        model_config(BASE | {"rope_scaling": {"rope_type": "default", "type": "mrope"}})


def folder_with(path: Path, **files) -> Path:
    path.mkdir(parents=True)
    for name, value in files.items():
        (path / f"{name}.json").write_text(json.dumps(value))
    return path


@pytest.mark.parametrize(
    "log", [{"tau": 0.7, "lr": 1e-4}, {"window_size": 5}, {"alpha_scale": 50.0, "alpha_offset": 4.0, "window_size": 5}]
)
def test_training_log_one_level_up_does_not_decide_for_a_plain_folder(tmp_path, log):
    folder = folder_with(tmp_path / "run" / "model", config=BASE)
    (tmp_path / "run" / "training_log.json").write_text(json.dumps({"config": log}))
    assert read_folder(str(folder))[1:] == (model_config(BASE), "config.json")


def test_training_log_of_a_folder_that_says_it_is_fastdms_completes_its_own_keys(tmp_path):
    folder = folder_with(tmp_path / "run" / "model", config=BASE | {"alpha_offset": 4.0})
    (tmp_path / "run" / "training_log.json").write_text(
        json.dumps({"config": {"alpha_scale": 50.0, "alpha_offset": 3.0, "window_size": 64}})
    )
    _, config, origin = read_folder(str(folder))
    assert (config.dms.variant, config.dms.decision_shift, config.dms.window_size) == ("borrowed", 0, 64)
    assert (config.dms.evict_logit_scale, config.dms.evict_logit_bias) == (50.0, 4.0)
    assert origin == "../training_log.json"


@pytest.mark.parametrize("key", ["tau", "window_size", "context_len"])
def test_word_that_other_tools_use_too_makes_no_policy(key):
    with pytest.raises(ConfigError, match=f"unknown key `{key}`"):
        model_config(BASE | {key: 0.5})


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "dms_metadata.json"])
def test_pipe_in_place_of_a_file_is_refused_at_once(tmp_path, name):
    folder = folder_with(tmp_path / "model", config=BASE)
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    with pytest.raises(ConfigError, match=f"{name}: it must be a regular file"):
        read_folder(str(folder))


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "dms_metadata.json"])
def test_link_that_leaves_the_folder_is_not_followed(tmp_path, name):
    folder = folder_with(tmp_path / "model", config=BASE)
    (tmp_path / "elsewhere.json").write_text(json.dumps(BASE))
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(tmp_path / "elsewhere.json")
    with pytest.raises(ConfigError, match=f"{name} is a link that leaves its folder"):
        read_folder(str(folder))


@pytest.mark.parametrize(
    "keys",
    [
        {"rope_theta": 5e5, "rope_parameters": {"rope_theta": 1e4}},
        {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": {"type": "linear", "factor": 4.0}},
    ],
)
def test_rotary_numbers_that_contradict_each_other_are_refused(keys):
    with pytest.raises(ConfigError, match="keep one"):
        model_config({key: value for key, value in BASE.items() if key != "rope_theta"} | keys)
