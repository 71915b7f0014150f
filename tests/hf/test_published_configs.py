"""The `config.json` of a hundred published checkpoints: read with the right numbers, or refused for the right reason.

`published_configs.jsonl` holds one checkpoint a line: its name, its `config.json`, and either `expect`, the numbers
that its model card or another library states, or `refuse`, what the refusal must name.
"""

import json
from pathlib import Path

import pytest

from dms_jax.config import ModelConfig, RopeScaling
from dms_jax.errors import ConfigError
from dms_jax.hf.hf_config import folder_config, model_config

LINES = [json.loads(line) for line in Path(__file__).with_name("published_configs.jsonl").read_text().splitlines()]
READ, REFUSED = ([line for line in LINES if key in line] for key in ("expect", "refuse"))
SHAPE = ("hidden_size", "intermediate_size", "num_layers", "num_q_heads", "num_kv_heads", "head_dim", "vocab_size")


def names(lines: list[dict]) -> list[str]:
    return [line["name"] for line in lines]


def test_at_least_fifty_checkpoints_of_each_outcome_and_family_are_covered():
    families = {family: sum(line["config"]["model_type"] == family for line in READ) for family in ("llama", "mistral")}
    families |= {family: sum(line["config"]["model_type"] == family for line in READ) for family in ("qwen2", "qwen3")}
    assert len(READ) >= 80 and len(REFUSED) >= 15 and min(families.values()) >= 10
    assert len(set(names(LINES))) == len(LINES)


@pytest.mark.parametrize("line", READ, ids=names(READ))
def test_published_checkpoint_is_read_with_the_right_numbers(line):
    config, expect = model_config(line["config"]), line["expect"]
    qwen2 = config.model_type == "qwen2"
    assert [getattr(config, name) for name in SHAPE] == expect["shape"]
    assert config.rope_theta == expect.get("theta", 1e4)
    assert config.rope_scaling == (RopeScaling(*expect["scaling"]) if "scaling" in expect else None)
    assert config.sliding_window == expect.get("window")
    assert config.tie_word_embeddings == expect.get("tied", False)
    assert (config.qkv_bias, config.o_bias, config.mlp_bias) == (expect.get("bias", False), False, False)
    assert config.qkv_bias == qwen2 and config.qk_norm == expect.get("qk_norm", False)
    assert config.rms_norm_eps == expect.get("eps", 1e-6 if config.model_type.startswith("qwen") else 1e-5)
    assert config.context_limit()[0] == expect.get("context", config.context_limit()[0])
    assert list(config.eos_token_ids) == expect["eos"]
    assert ([config.dms.variant, config.dms.window_size] if config.dms else None) == expect.get("dms")


@pytest.mark.parametrize("line", READ, ids=names(READ))
def test_published_checkpoint_reads_back_from_what_save_writes(line):
    config = model_config(line["config"])
    assert isinstance(config, ModelConfig)
    assert model_config(folder_config(config, line["config"])) == config


@pytest.mark.parametrize("line", REFUSED, ids=names(REFUSED))
def test_unsupported_checkpoint_is_refused_for_its_reason_and_without_a_misleading_hint(line):
    with pytest.raises(ConfigError) as refusal:
        model_config(line["config"])
    message = str(refusal.value)
    assert line["refuse"] in message and "did you mean" not in message and "\n" not in message
