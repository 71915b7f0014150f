"""Metadata keys of GGUF files: followed, off at their value, or refused by name."""

import math
import os

import jax.numpy as jnp
import numpy as np
import pytest
from hf.hf_cases import GOLDEN, TOKENS, write_gguf
from safetensors.numpy import load_file

import dms_jax
from dms_jax.config import RopeScaling
from dms_jax.errors import ConfigError
from dms_jax.hf.gguf.gguf_file import GGUFTensors
from dms_jax.hf.gguf.gguf_header import read_gguf
from dms_jax.hf.gguf.gguf_metadata import check_metadata, llama3_scaling, rope_scaling

HEAD = 64
OFF = [
    ("expert_count", 0),
    ("expert_used_count", 0),
    ("logit_scale", 1.0),
    ("residual_scale", 1.0),
    ("embedding_scale", 0.0),
    ("attn_logit_softcapping", 0.0),
    ("final_logit_softcapping", 0.0),
    ("attention.sliding_window", 0),
    ("attention.sliding_window", 4096),
    ("attention.scale", 0.125),
    ("attention.causal", True),
    ("attention.clamp_kqv", 0.0),
    ("attention.max_alibi_bias", 0.0),
    ("use_parallel_residual", False),
    ("rope.dimension_count", HEAD),
    ("attention.value_length", HEAD),
    ("rope.scaling.attn_factor", 1.0),
    ("pooling_type", 0),
    ("vocab_size", 7),
    ("rope.scaling.finetuned", True),
    ("leading_dense_block_count", 0),
    ("n_deepstack_layers", 0),
    ("expert_count", [0, 0]),
]
ON = [
    ("expert_count", 8),
    ("expert_used_count", 2),
    ("logit_scale", 0.1),
    ("residual_scale", 0.22),
    ("embedding_scale", 12.0),
    ("attn_logit_softcapping", 50.0),
    ("final_logit_softcapping", 30.0),
    ("attention.sliding_window", 128),
    ("attention.scale", 0.5),
    ("attention.causal", False),
    ("attention.clamp_kqv", 0.05),
    ("attention.max_alibi_bias", 8.0),
    ("use_parallel_residual", True),
    ("rope.dimension_count", HEAD // 2),
    ("rope.dimension_count", 0),
    ("attention.value_length", HEAD * 2),
    ("rope.scaling.attn_factor", 0.0),
    ("rope.scaling.yarn_log_multiplier", 0.1),
    ("pooling_type", 1),
    ("leading_dense_block_count", 1),
    ("n_deepstack_layers", 3),
    ("unheard_of", 1.0),
    ("logit_scale", float("nan")),
    ("expert_count", [0, 8]),
]


def check(key, value, prefix="llama"):
    check_metadata({"llama.context_length": 4096, f"{prefix}.{key}": value}, "llama", HEAD, "m.gguf")


@pytest.mark.parametrize(("key", "value"), OFF)
def test_keys_that_are_off_are_accepted(key, value):
    check(key, value)


@pytest.mark.parametrize(("key", "value"), ON)
def test_keys_that_change_the_logits_are_refused_by_name_with_their_value(key, value):
    with pytest.raises(ConfigError, match=rf"m\.gguf: .*llama\.{key}") as refusal:
        check(key, value)
    assert "[0, 8]" in str(refusal.value) if isinstance(value, list) else repr(value) in str(refusal.value)


def test_keys_of_other_prefixes():
    check("name", "a model", prefix="general")
    check("quantized_by", "somebody", prefix="somebody")  # notes of those who make such files
    with pytest.raises(ConfigError, match=r"clip\.has_vision_encoder"):
        check("has_vision_encoder", True, prefix="clip")


@pytest.mark.parametrize(
    ("kind", "factor", "want"),
    [(None, 4.0, 4.0), ("linear", 4.0, 4.0), ("none", 4.0, None), (None, 0.0, None), ("linear", 1.0, None)],
)
def test_linear_scaling_as_llama_cpp_reads_it(kind, factor, want):
    scaling = rope_scaling(kind, factor, None, 1e4, HEAD)
    assert scaling == (None if want is None else RopeScaling("linear", want))


def test_other_scaling_is_refused():
    for kind in ("yarn", "longrope", 7):
        with pytest.raises(ConfigError, match=f"rope scaling .?{kind}"):
            rope_scaling(kind, 4.0, None, 1e4, HEAD)
    for factor in (-1.0, math.inf, math.nan):
        with pytest.raises(ConfigError, match="finite number of at least 0"):
            rope_scaling(None, factor, None, 1e4, HEAD)


def llama3_table(scaling, theta, head_dim):
    """The divisors as llama.cpp's converter writes them, one frequency at a time."""
    length, low, high = (
        scaling.original_max_position_embeddings,
        scaling.low_freq_factor,
        scaling.high_freq_factor,
    )
    divisors = []
    for i in range(0, head_dim, 2):
        wavelength = 2 * math.pi * theta ** (i / head_dim)
        if wavelength < length / high:
            divisors.append(1.0)
        elif wavelength > length / low:
            divisors.append(scaling.factor)
        else:
            smooth = (length / wavelength - low) / (high - low)
            divisors.append(1 / ((1 - smooth) / scaling.factor + smooth))
    return np.array(divisors, np.float32)


@pytest.mark.parametrize(
    ("scaling", "head_dim"),
    [
        (RopeScaling("llama3", 8.0, 1.0, 4.0, 8192), 128),  # Llama 3.1 8B
        (RopeScaling("llama3", 32.0, 1.0, 4.0, 8192), 64),  # Llama 3.2 1B
        (RopeScaling("llama3", 5.0, 1.0, 3.0, 6000), 128),  # nobody's
    ],
)
def test_llama3_scaling_is_recognized_from_its_table(scaling, head_dim):
    table = llama3_table(scaling, 500000.0, head_dim)
    found = llama3_scaling(table, 500000.0, head_dim)
    np.testing.assert_allclose(llama3_table(found, 500000.0, head_dim), table, rtol=2e-6)
    assert found.original_max_position_embeddings == scaling.original_max_position_embeddings
    assert found.factor == scaling.factor and abs(found.high_freq_factor - scaling.high_freq_factor) < 1e-3
    with pytest.raises(ConfigError, match="not those of llama3"):
        llama3_scaling(np.linspace(1, 8, head_dim // 2, dtype=np.float32), 500000.0, head_dim)
    assert rope_scaling(None, 0.0, np.ones(head_dim // 2, np.float32), 500000.0, head_dim) is None


def test_a_file_with_a_llama3_table_has_the_logits_of_its_folder(tmp_path):
    folder = GOLDEN / "llama3_rope_scaled"
    scaling = RopeScaling("llama3", 8.0, 1.0, 4.0, 32)
    table = llama3_table(scaling, 500000.0, 16)
    path = write_gguf(
        tmp_path / "m.gguf", folder.name, more=lambda writer: writer.add_tensor("rope_freqs.weight", table)
    )
    model, want = dms_jax.load(path), load_file(folder / "tensors.safetensors")
    assert model.config.rope_scaling == scaling
    np.testing.assert_allclose(model.dense(jnp.asarray(want["input_ids"], jnp.int32)), want["logits"], atol=1e-4)


def test_ids_that_end_a_turn_or_a_message_are_stop_ids(tmp_path):
    def more(writer):
        writer.add_eot_token_id(5)
        writer.add_uint32("tokenizer.ggml.eom_token_id", 6)
        writer.add_pad_token_id(2**32 - 1)

    config = GGUFTensors(str(write_gguf(tmp_path / "m.gguf", "llama_untied", tokenizer="smollm", more=more))).config
    assert config.eos_token_ids == (1, 5, 6) and config.pad_token_id is None


def test_control_tokens_that_end_a_turn_are_stop_ids(tmp_path):
    tensors = GGUFTensors(str(write_gguf(tmp_path / "m.gguf", "llama_untied", tokenizer="smollm")))
    tokens = ["<s>", "</s>", "<|im_end|>", "<|eot_id|>", *TOKENS[4:]]
    tensors.fields["tokenizer.ggml.tokens"] = tokens
    tensors.fields["tokenizer.ggml.token_type"] = [3, 3, 3, 1] + [1] * (len(tokens) - 4)
    assert tensors.stop_ids() == (1, 2)  # <|eot_id|> is plain text in this file


@pytest.mark.parametrize(
    "name", ["blk.0.attn_q_norm.weight", "output_norm.bias", "blk.0.ffn_gate_inp.weight", "rope_factors_long.weight"]
)
def test_tensors_that_the_model_does_not_use_are_refused(tmp_path, name):
    path = write_gguf(
        tmp_path / "m.gguf", "llama_untied", more=lambda writer: writer.add_tensor(name, np.ones(8, np.float32))
    )
    with pytest.raises(ConfigError, match=name):
        dms_jax.load(path)


def test_tensors_of_layers_beyond_the_block_count_are_refused(tmp_path):
    more = lambda writer: writer.add_tensor("blk.7.attn_norm.weight", np.ones(8, np.float32))
    with pytest.raises(ConfigError, match=r"layers\.7"):
        dms_jax.load(write_gguf(tmp_path / "m.gguf", "llama_untied", more=more))


def test_sparse_arrays_and_files_that_are_not_regular_are_refused(tmp_path):
    path, claimed = tmp_path / "m.gguf", 900_000_000
    key = b"tokenizer.ggml.x"
    head = b"GGUF" + np.array([3], "<u4").tobytes() + np.array([0, 1, len(key)], "<u8").tobytes() + key
    path.write_bytes(head + np.array([9, 0], "<u4").tobytes() + np.array([claimed], "<u8").tobytes())
    os.truncate(path, claimed + 1000)
    with pytest.raises(ConfigError, match="lists of more than"):
        read_gguf(str(path))
    os.mkfifo(tmp_path / "pipe.gguf")
    with pytest.raises(ConfigError, match="must be a regular file"):
        read_gguf(str(tmp_path / "pipe.gguf"))
