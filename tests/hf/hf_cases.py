"""GGUF files and tokenizers that several tests read."""

import json
import os
from pathlib import Path

import gguf
import numpy as np
import pytest
from safetensors.numpy import load_file
from tokenizers import Tokenizer, models, pre_tokenizers

from dms_jax.errors import ConfigError

GOLDEN = Path(__file__).parents[1] / "golden"
OURS_TO_GGUF = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "q_proj": "attn_q",
    "k_proj": "attn_k",
    "v_proj": "attn_v",
    "o_proj": "attn_output",
    "q_norm": "attn_q_norm",
    "k_norm": "attn_k_norm",
    "gate_proj": "ffn_gate",
    "up_proj": "ffn_up",
    "down_proj": "ffn_down",
}
# The smallest config.json of Llama 2
LLAMA2 = {
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
}
TOKENS = ["<s>", "</s>", *(chr(97 + i) for i in range(26)), "ab", "Ġ", "Ġab", "1", "2"]


def permute(weights: np.ndarray, heads: int) -> np.ndarray:
    """Permute the rows of Q or K like `LlamaModel.permute` in llama.cpp's `convert_hf_to_gguf.py`."""
    return (
        weights.reshape(heads, 2, weights.shape[0] // heads // 2, *weights.shape[1:])
        .swapaxes(1, 2)
        .reshape(weights.shape)
    )


def write_gguf(path: Path, name: str, *, edit=None, quantize=None, skip_fields=(), tokenizer=None, more=None) -> Path:
    """Write a golden model as a GGUF file, with its tensors changed by `edit` and a tokenizer of this kind, if any.

    `more` is called with the writer before the file is written.
    """
    raw = json.loads((GOLDEN / name / "config.json").read_text())
    tensors, family, heads = (
        load_file(GOLDEN / name / "model.safetensors"),
        raw["model_type"],
        raw["num_attention_heads"],
    )
    writer = gguf.GGUFWriter(path, "llama" if family == "mistral" else family)
    head_dim = raw.get("head_dim", raw["hidden_size"] // heads)
    fields = {
        "block_count": raw["num_hidden_layers"],
        "context_length": raw["max_position_embeddings"],
        "embedding_length": raw["hidden_size"],
        "feed_forward_length": raw["intermediate_size"],
        "head_count": heads,
        "head_count_kv": raw["num_key_value_heads"],
        "layer_norm_rms_eps": raw["rms_norm_eps"],
        "rope_freq_base": raw["rope_parameters"]["rope_theta"],
        "key_length": head_dim,
        "value_length": head_dim,
    }
    for field, value in fields.items():
        if field not in skip_fields:
            getattr(writer, f"add_{field}")(value)
    if tokenizer:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(tokenizer)
        writer.add_token_list(TOKENS)
        writer.add_token_types([3, 3] + [1] * (len(TOKENS) - 2))
        writer.add_token_merges(["a b", "Ġ ab"])
        writer.add_bos_token_id(0)
        writer.add_eos_token_id(1)
        writer.add_chat_template("{% for m in messages %}<s>{{ m['content'] }}{% endfor %}")
    for key, value in (edit(tensors) if edit else tensors).items():
        part, kind = key.rsplit(".", 2)[-2:]
        if family == "llama" and part in ("q_proj", "k_proj"):
            value = permute(value, heads if part == "q_proj" else raw["num_key_value_heads"])
        outside = {"embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output"}.get(part)
        target = f"{outside}.{kind}" if outside else f"blk.{key.split('.')[2]}.{OURS_TO_GGUF[part]}.{kind}"
        if quantize and value.ndim == 2 and value.shape[-1] % 32 == 0:
            writer.add_tensor(target, gguf.quants.quantize(value, quantize), raw_dtype=quantize)
        else:
            writer.add_tensor(target, np.ascontiguousarray(value))
    if more:
        more(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'villain' %}{{ raise_exception('no\n"
    "villains') }}{% endif %}hello {{ m['content'] }} {% endfor %}{% if add_generation_prompt %}reply{% endif %}"
)
VOCABULARY = {"[unk]": 0, "hello": 1, "world": 2, "reply": 3, "</s>": 4}


def write_tokenizer(folder: Path, template: str | None = TEMPLATE, vocabulary: dict = VOCABULARY) -> Path:
    """Write a word-level tokenizer with a chat template into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[unk]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>", "unk_token": "[unk]"}
    settings |= {"chat_template": template} if template else {}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def assert_own_regular_file(load, folder: Path, name: str, tmp_path: Path) -> None:
    """Check that `load` refuses a pipe, and a link out of the folder, in the place of the file `name` of a folder."""
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    with pytest.raises(ConfigError, match=f"{name}: it must be a regular file"):
        load(folder)
    (folder / name).unlink()
    (tmp_path / "private").write_text("{}")
    (folder / name).symlink_to(tmp_path / "private")
    with pytest.raises(ConfigError, match=f"{name} is a link that leaves its folder"):
        load(folder)
