"""`config.json` in both spellings, the model families, the refusals, and the `dms_*` keys."""

import dataclasses
import json
from pathlib import Path

import pytest
from hf.hf_cases import LLAMA2

from dms_jax.config import DMSConfig, ModelConfig, RopeScaling
from dms_jax.errors import ConfigError
from dms_jax.hf.dms_keys import DMS_KEYS, dms_config, dms_keys
from dms_jax.hf.families import FAMILIES, Family
from dms_jax.hf.hf_config import folder_config, fresh_config, model_config, read_folder

GOLDEN = Path(__file__).parents[1] / "golden"
# The keys of the folder that NVIDIA released; it has no other `dms_*` keys.
NVIDIA = LLAMA2 | {
    "model_type": "qwen3",
    "num_key_value_heads": 2,
    "head_dim": 16,
    "dms_cr": 8,
    "dms_window_size": 512,
    "dms_alpha_scale": 100.0,
    "dms_initial_alpha_offset": 5.0,
}


@pytest.mark.parametrize(
    "old, new",
    [
        ({"rope_theta": 5e5, "rope_scaling": None}, {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}),
        (
            {"rope_theta": 1e4, "rope_scaling": {"type": "linear", "factor": 2.0}},
            {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
        ),
        (
            {
                "rope_theta": 5e5,
                "rope_scaling": {
                    "rope_type": "llama3",
                    "factor": 8.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 8192,
                },
                "torch_dtype": "bfloat16",
            },
            {
                "rope_parameters": {
                    "rope_type": "llama3",
                    "factor": 8.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "rope_theta": 5e5,
                    "original_max_position_embeddings": 8192,
                },
                "dtype": "bfloat16",
            },
        ),
    ],
)
def test_old_and_new_spellings_give_equal_configs(old, new):
    assert model_config(LLAMA2 | old) == model_config(LLAMA2 | new)


def test_missing_keys_of_a_llama2_file_take_the_class_defaults():
    config = model_config(LLAMA2)
    assert (config.num_kv_heads, config.head_dim, config.rope_theta, config.tie_word_embeddings) == (
        4,
        16,
        10000.0,
        False,
    )
    assert not (config.qkv_bias or config.o_bias or config.mlp_bias or config.qk_norm)


def test_families_differ_in_biases_norms_and_head_dim():
    common = LLAMA2 | {"num_key_value_heads": 2}
    assert (
        model_config(common | {"model_type": "qwen2"}).qkv_bias
        and not model_config(common | {"model_type": "qwen2"}).o_bias
    )
    assert model_config(common | {"model_type": "qwen3"}).qk_norm
    assert model_config(common | {"model_type": "qwen3"}).head_dim == 128
    assert model_config(common | {"model_type": "qwen3", "head_dim": None}).head_dim == 16
    assert not model_config(common | {"model_type": "qwen2", "attention_bias": True}).o_bias
    biased = model_config(common | {"attention_bias": True, "mlp_bias": True})
    assert biased.qkv_bias and biased.o_bias and biased.mlp_bias


@pytest.mark.parametrize(
    "family, keys, window",
    [
        ("mistral", {"sliding_window": None}, None),
        ("mistral", {"sliding_window": 32}, 32),
        ("mistral", {}, 4096),  # the class default, so a file without the key has a window
        ("qwen2", {"sliding_window": 32, "use_sliding_window": False}, None),
        ("qwen2", {"sliding_window": 32, "use_sliding_window": True, "max_window_layers": 2}, None),
        ("qwen2", {"sliding_window": 32, "use_sliding_window": True, "max_window_layers": 1}, 32),
        (
            "qwen3",
            {"sliding_window": 32, "use_sliding_window": True, "layer_types": ["full_attention", "sliding_attention"]},
            32,
        ),
        ("qwen3", {"sliding_window": None, "use_sliding_window": False, "layer_types": ["full_attention"] * 2}, None),
    ],
)
def test_sliding_window_of_the_model(family, keys, window):
    assert model_config(LLAMA2 | {"model_type": family, "num_key_value_heads": 2} | keys).sliding_window == window


@pytest.mark.parametrize(
    "keys, words",
    [
        ({"model_type": "gemma3"}, f"gemma3.*{', '.join(FAMILIES)}"),
        ({"rms_norm_epz": 1e-5}, "rms_norm_epz.*did you mean rms_norm_eps"),
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping=50.0.*only false, null or 0"),
        ({"dms_window_sise": 8}, "dms_window_sise.*did you mean dms_window_size"),
        ({"hidden_act": "gelu"}, "hidden_act.*silu"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "yarn.*default, linear, llama3"),
        ({"rope_scaling": {"type": "dynamic", "factor": 4.0}}, "dynamic"),
        ({"rope_scaling": {"type": "linear"}}, "linear.*factor"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0, "mrope_section": [1]}}, "mrope_section"),
        ({"layer_types": ["full_attention", "linear_attention"]}, "linear_attention"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"pruned_heads": {"0": [1]}}, "pruned_heads"),
        ({"num_hidden_layers": None}, "num_hidden_layers"),
        ({"num_attention_heads": 4, "num_key_value_heads": 3}, "num_kv_heads.* 4 and 3"),
        ({"model_type": "mistral", "num_key_value_heads": 2, "attention_bias": True}, "attention_bias.*mistral"),
        ({"dms_window_size": "big"}, "dms_window_size"),
        ({"dms_window_size": -1}, "dms_window_size.*-1"),
        ({"dms_separate_alpha": True, "dms_head_units": -1}, "dms_head_units.*-1"),
        ({"dms_separate_alpha": True, "dms_head_units": 2.5}, "dms_head_units.*2.5"),
        ({"dms_separate_alpha": False, "dms_head_units": 8}, "dms_head_units.*borrowed.*8"),
        ({"dms_alpha_per": "token"}, "dms_alpha_per.*head, layer"),
        ({"dms_disable_eviction": True}, "dms_disable_eviction"),
    ],
)
def test_refusals_are_one_line_and_name_the_key(keys, words):
    with pytest.raises(ConfigError, match=words) as refusal:
        model_config(LLAMA2 | keys)
    assert "\n" not in str(refusal.value)


def test_nvidia_folder_is_borrowed_with_shift_one_and_zeroed_twice():
    dms = model_config(NVIDIA).dms
    assert dms == DMSConfig(
        variant="borrowed", window_size=512, target_cr=8.0, decision_shift=1, zero_borrowed="pre+post"
    )
    assert dms_config(NVIDIA | {"dms_separate_alpha": True}).variant == "projection"
    assert model_config(LLAMA2).dms is None


def write(folder: Path, **files) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in files.items():
        (folder / f"{name}.json").write_text(json.dumps(value))
    return folder


def test_fastdms_folder_has_shift_zero_and_keeps_the_channel(tmp_path):
    want = DMSConfig(variant="borrowed", window_size=128, evict_logit_bias=4.0, decision_shift=0, zero_borrowed="none")
    metadata = {"window_size": 128, "alpha_offset": 4.0, "context_len": 2048}
    assert read_folder(write(tmp_path / "a", config=LLAMA2, dms_metadata=metadata))[1].dms == want
    assert read_folder(write(tmp_path / "b", config=LLAMA2, dms_metadata={"config": metadata}))[1].dms == want
    assert read_folder(write(tmp_path / "c", config=LLAMA2 | metadata))[1].dms == want
    # An explicit key wins, even for decision_shift.
    explicit = read_folder(
        write(tmp_path / "d", config=LLAMA2 | {"dms_window_size": 64, "dms_decision_shift": 1}, dms_metadata=metadata)
    )[1].dms
    assert (explicit.window_size, explicit.decision_shift, explicit.evict_logit_bias, explicit.zero_borrowed) == (
        64,
        1,
        4.0,
        "none",
    )


@pytest.mark.parametrize("variant", ["projection", "borrowed"])
def test_dms_keys_round_trip_with_every_key_explicit(variant):
    units = 5 if variant == "projection" else 0  # which the borrowed variant cannot have
    dms = DMSConfig(variant, 7, 3.5, 0.25, 50.0, 2.0, "layer", 0, "pre", units)
    assert dms_config(dms_keys(dms)) == dms
    assert ("dms_head_units" in dms_keys(dms)) == (units > 0), "Model-Optimizer does not have this key"
    assert all(getattr(dms, field) != default for field, (_, default) in DMS_KEYS.items() if field != "head_units"), (
        "every field must differ from its default in this test"
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_fresh_config_reads_back(family):
    config = ModelConfig(
        family,
        131,
        48,
        96,
        2,
        4,
        2,
        16,
        rope_theta=5e5,
        rope_scaling=RopeScaling("llama3", 8.0, 1.0, 4.0, 32),
        qkv_bias=FAMILIES[family].qkv_bias,
        qk_norm=FAMILIES[family].qk_norm,
        sliding_window=64 if "sliding_window" in FAMILIES[family].extra_keys else None,
        eos_token_ids=(3, 5),
        bos_token_id=1,
        tie_word_embeddings=True,
    )
    assert model_config(fresh_config(config)) == config
    linear = dataclasses.replace(
        config, rope_scaling=RopeScaling("linear", 2.0), sliding_window=None, eos_token_ids=(3,), dms=DMSConfig()
    )
    assert model_config(folder_config(linear)) == linear


def test_new_family_is_one_record(monkeypatch):
    """A family with every extra key, a default for its head size, and no window."""
    extra_keys = ("attention_bias", "mlp_bias", "use_sliding_window", "sliding_window", "max_window_layers")
    family = Family("NewForCausalLM", extra_keys, qk_norm=True, default_head_dim=32, default_window=None)
    monkeypatch.setitem(FAMILIES, "new", family)
    raw = LLAMA2 | {"model_type": "new", "num_key_value_heads": 2}
    assert (model_config(raw).head_dim, model_config(raw).qk_norm, model_config(raw).sliding_window) == (32, True, None)
    window = {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 0}
    config = model_config(raw | window | {"attention_bias": True})
    with pytest.raises(ConfigError, match="num_key_value_heads"):
        model_config(raw | {"num_key_value_heads": None})
    written = folder_config(config)
    assert written["architectures"] == ["NewForCausalLM"] and model_config(written) == config


def test_original_config_is_kept_except_for_the_policy():
    original = json.loads((GOLDEN / "qwen3_dms_projection_per_head" / "config.json").read_text()) | {
        "auto_map": {"AutoConfig": "x.Y"}
    }
    config = model_config(original)
    written = folder_config(config.with_dms(dataclasses.replace(config.dms, window_size=99)), original)
    changed = {key for key in written.keys() | original.keys() if written.get(key) != original.get(key)}
    assert changed == {"architectures", "auto_map", "dms_window_size", "dms_decision_shift", "dms_zero_mode"}


def test_stop_tokens_of_generation_config_are_added(tmp_path):
    folder = write(tmp_path, config=LLAMA2 | {"eos_token_id": 2}, generation_config={"eos_token_id": [7, 2]})
    assert read_folder(folder)[1].eos_token_ids == (2, 7)


@pytest.mark.parametrize("text, words", [("{", "not valid JSON"), ("[1]", "JSON object"), ("", "not valid JSON")])
def test_damaged_json_names_the_file(tmp_path, text, words):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=f"config.json.*{words}"):
        read_folder(tmp_path)
