"""GGUF files of the llama, qwen2 and qwen3 architectures, read as if they were a Hugging Face folder.

Tensors are dequantised to fp32, one at a time, when they are read. Format: ggml's `gguf.md`; names and the row order of Q and K:
llama.cpp `convert_hf_to_gguf.py`.
"""

import json
import os
from collections.abc import Iterable
from functools import cached_property, lru_cache
from typing import Any

import numpy as np

from dms_jax.config import ModelConfig
from dms_jax.errors import ConfigError, naming, shown
from dms_jax.hf.gguf_header import read_gguf

ARCHITECTURES = ("llama", "qwen2", "qwen3")
OUTSIDE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
INSIDE = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
SAME_MATRIX = 0.2  # relative difference below which two quantisations are of one tied matrix (seen: 0.04 and 0.08)

# Text splitting by `tokenizer.ggml.pre`, as the original tokenizer.json files have it.
QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3_SPLIT = QWEN2_SPLIT.replace(r"|\p{N}|", r"|\p{N}{1,3}|")


class GGUFTensors:
    """The tensors of one GGUF file under Hugging Face names, fp32; `config` is its ModelConfig."""

    def __init__(self, path: str):
        self.where = path
        self.fields, tensors = read_gguf(path)
        architecture = self.fields.get("general.architecture")
        if not isinstance(architecture, str) or architecture not in ARCHITECTURES:
            raise ConfigError(
                f"{path}: GGUF architecture {shown(architecture)} is not supported; supported: {', '.join(ARCHITECTURES)}"
            )
        self.architecture: str = architecture
        self.rope_table = tensors.pop(
            "rope_freqs.weight", None
        )  # llama3 scaling as a table; refused in `config` unless it is known
        self.tensors = {self._hf_name(name): tensor for name, tensor in tensors.items()}
        if EMBED not in self.tensors:
            raise ConfigError(f"{path} lacks the tensor token_embd.weight")
        if bad := [name for name in (EMBED, HEAD) if name in self.tensors and len(self.shape(name)) != 2]:
            raise ConfigError(f"{path}: {bad[0]} is no matrix but has shape {list(self.shape(bad[0]))}")
        if self.tied:
            finer = max((EMBED, HEAD), key=lambda name: self._bits(name))
            self.tensors[EMBED] = self.tensors[finer]
            self.tensors.pop(HEAD, None)

    def names(self) -> Iterable[str]:
        return self.tensors.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return self.tensors[name].shape

    def dtype(self, name: str) -> np.dtype:
        return np.dtype(np.float32)

    def read(self, name: str, index: tuple[slice, ...] = ()) -> np.ndarray:
        rows = index[0] if index else slice(None)
        if self.architecture == "llama" and name.endswith(
            ("q_proj.weight", "k_proj.weight", "q_proj.bias", "k_proj.bias")
        ):
            heads = self.config.num_q_heads if ".q_proj." in name else self.config.num_kv_heads
            value = unpermute(self._dequantize(name, slice(None)), heads)[rows]
        else:
            value = self._dequantize(name, rows)
        return value[(slice(None), *index[1:])]

    def _dequantize(self, name: str, rows: slice) -> np.ndarray:
        from gguf.quants import dequantize

        tensor = self.tensors[name]
        try:
            return np.asarray(dequantize(tensor.data[rows], tensor.kind), np.float32)
        except NotImplementedError as why:
            raise ConfigError(
                f"{self.where}: tensor {name} has quantisation {tensor.kind.name}, which gguf cannot dequantise"
            ) from why

    def _hf_name(self, name: str) -> str:
        parts = name.split(".")
        if len(parts) == 2 and parts[0] in OUTSIDE:
            return f"{OUTSIDE[parts[0]]}.{parts[1]}"
        if len(parts) == 4 and parts[0] == "blk" and parts[2] in INSIDE:
            return f"model.layers.{parts[1]}.{INSIDE[parts[2]]}.{parts[3]}"
        raise ConfigError(f"{self.where}: tensor {name} has no place in a {self.architecture} model")

    def _bits(self, name: str) -> float:
        tensor = self.tensors.get(name)
        return 0.0 if tensor is None else tensor.bits

    @cached_property
    def tied(self) -> bool:
        """No output matrix, or one that is the embedding quantised differently (Qwen 2.5 files hold the tied matrix twice)."""
        if HEAD not in self.tensors:
            return True
        rows = slice(None, None, max(1, self.shape(EMBED)[0] // 4096))
        embed, head = self._dequantize(EMBED, rows), self._dequantize(HEAD, rows)
        return embed.shape == head.shape and bool(np.linalg.norm(embed - head) < SAME_MATRIX * np.linalg.norm(head))

    def _field(self, key: str, default=None):
        value = self.fields.get(f"{self.architecture}.{key}", default)
        if value is None:
            raise ConfigError(f"{self.where} lacks {self.architecture}.{key}")
        if not isinstance(value, int | float | str):
            raise ConfigError(f"{self.where}: {self.architecture}.{key} must be one value, got {shown(value)}")
        return value

    def _size(self, key: str, default: int | None = None) -> int:
        value = self._field(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ConfigError(
                f"{self.where}: {self.architecture}.{key} must be a positive whole number, got {shown(value)}"
            )
        return value

    def _real(self, key: str, default: float | None = None) -> float:
        value = self._field(key, default)
        if not isinstance(value, float):
            raise ConfigError(f"{self.where}: {self.architecture}.{key} must be a real number, got {shown(value)}")
        return _shortest(value)

    def token_id(self, kind: str) -> int | None:
        """Of "bos", "eos", "padding" or "unknown", within the vocabulary."""
        value = self.fields.get(f"tokenizer.ggml.{kind}_token_id")
        if value is not None and (
            not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < self.shape(EMBED)[0]
        ):
            raise ConfigError(f"{self.where}: tokenizer.ggml.{kind}_token_id must be a token id, got {shown(value)}")
        return value

    @cached_property
    def config(self) -> ModelConfig:
        scaling = self._field("rope.scaling.type", "none")
        if scaling != "none" or self.rope_table is not None:
            raise ConfigError(
                f"{self.where}: rope scaling {shown(scaling)} from a GGUF file is not supported; use the Hugging Face folder"
            )
        hidden, heads = self._size("embedding_length"), self._size("attention.head_count")
        eos = self.token_id("eos")
        with naming(self.where):
            return ModelConfig(
                model_type=self.architecture,
                vocab_size=self.shape(EMBED)[0],
                hidden_size=hidden,
                intermediate_size=self._size("feed_forward_length"),
                num_layers=self._size("block_count"),
                num_q_heads=heads,
                num_kv_heads=self._size("attention.head_count_kv", heads),
                head_dim=self._size("attention.key_length", max(1, hidden // heads)),
                rms_norm_eps=self._real("attention.layer_norm_rms_epsilon"),
                rope_theta=self._real("rope.freq_base", 10000.0),
                max_position_embeddings=self._size("context_length"),
                tie_word_embeddings=self.tied,
                qkv_bias="model.layers.0.self_attn.q_proj.bias" in self.tensors,
                o_bias="model.layers.0.self_attn.o_proj.bias" in self.tensors,
                qk_norm=self.architecture == "qwen3",
                bos_token_id=self.token_id("bos"),
                eos_token_ids=() if eos is None else (eos,),
                pad_token_id=self.token_id("padding"),
            )


def open_gguf(path: str) -> GGUFTensors:
    """The tensors of a GGUF file; the last one stays open, since a tokenizer is made from it next."""
    return _opened(path, os.stat(path).st_size, os.stat(path).st_mtime_ns)


@lru_cache(maxsize=1)
def _opened(path: str, size: int, changed: int) -> GGUFTensors:
    return GGUFTensors(path)


def unpermute(rows: np.ndarray, heads: int) -> np.ndarray:
    """Undo llama.cpp's order of Q and K rows: each head (pair, 2) -> (2, pair), which is rotate-half order."""
    return rows.reshape(heads, rows.shape[0] // heads // 2, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def _shortest(value: float) -> float:
    """9.999999747e-06, a float32, as the 1e-05 that was meant."""
    return float(str(np.float32(value)))


def write_tokenizer(path: str, folder: str) -> None:
    """`tokenizer.json` and `tokenizer_config.json` from a GGUF file's metadata; nothing when the file has no tokenizer."""
    tensors = open_gguf(path)
    fields = tensors.fields
    if "tokenizer.ggml.tokens" not in fields:
        return
    ids = {kind: tensors.token_id(kind) for kind in ("bos", "eos", "padding", "unknown")}
    tokens = _checked_vocabulary(fields, path, ids.values())
    try:
        tokenizer = build_tokenizer(fields, path)
    except ConfigError:
        raise
    except Exception as why:  # the library has no types of its own for what it refuses
        raise ConfigError(f"{path}: its vocabulary makes no tokenizer: {why}") from why
    tokenizer.save(os.path.join(folder, "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": tensors.config.max_position_embeddings,
    }
    for name, kind in (("bos_token", "bos"), ("eos_token", "eos"), ("pad_token", "padding"), ("unk_token", "unknown")):
        if (token := ids[kind]) is not None:
            settings[name] = tokens[token]
    if "tokenizer.chat_template" in fields:
        settings["chat_template"] = fields["tokenizer.chat_template"]
    with open(os.path.join(folder, "tokenizer_config.json"), "w", encoding="utf-8") as file:
        json.dump(settings, file, indent=1, ensure_ascii=False)


def _checked_vocabulary(fields: dict, where: str, ids: Iterable[int | None]) -> list[str]:
    """The tokens: different texts, each of a type, with merges and template that are texts, and the special ids among them."""
    texts = lambda value: isinstance(value, list) and all(isinstance(item, str) for item in value)
    found: list[Any] = [fields.get(f"tokenizer.ggml.{key}") for key in ("tokens", "token_type", "merges")]
    tokens, types, merges = found
    wrong = (
        "tokens are no list of texts"
        if not texts(tokens)
        else "a token stands twice"
        if len(set(tokens)) != len(tokens)
        else "token_type is no number for each token"
        if not isinstance(types, list) or len(types) != len(tokens)
        else "merges are no list of pairs"
        if not texts(merges) or not all(" " in merge for merge in merges)
        else "a special token is not among its tokens"
        if any(i is not None and i >= len(tokens) for i in ids)
        else "chat_template is no text"
        if not isinstance(fields.get("tokenizer.chat_template", ""), str)
        else ""
    )
    if wrong:
        raise ConfigError(f"{where}: its tokenizer is damaged: {wrong}")
    return tokens


def build_tokenizer(fields: dict, where: str):
    """The byte-level BPE of a GGUF file. transformers' own conversion ignores `tokenizer.ggml.pre`, which decides the splits."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    kind, split = fields.get("tokenizer.ggml.model"), fields.get("tokenizer.ggml.pre")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split == "smollm")
    first = {
        "smollm": pre_tokenizers.Digits(individual_digits=True),
        "qwen2": pre_tokenizers.Split(Regex(QWEN2_SPLIT), "isolated"),
        "deepseek-r1-qwen": pre_tokenizers.Split(Regex(QWEN2_SPLIT), "isolated"),
        "llama-bpe": pre_tokenizers.Split(Regex(LLAMA3_SPLIT), "isolated"),
    }
    if kind != "gpt2" or not isinstance(split, str) or split not in first:
        raise ConfigError(
            f"{where}: tokenizer {shown(kind)} with splits {shown(split)} is not supported; supported: gpt2 with {', '.join(first)}"
        )
    tokens, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ", 1)) for merge in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(
        models.BPE(
            vocab={token: i for i, token in enumerate(tokens)}, merges=merges, ignore_merges=split == "llama-bpe"
        )
    )
    if split == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([first[split], byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    for number, special in ((3, True), (4, False)):  # control tokens, user-defined tokens
        added = [token for token, kind in zip(tokens, types, strict=True) if kind == number]
        tokenizer.add_tokens([AddedToken(token, special=special, normalized=False) for token in added])
    bos = fields.get("tokenizer.ggml.bos_token_id")
    if bos is not None and fields.get("tokenizer.ggml.add_bos_token", split == "llama-bpe"):
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[tokens[bos], "$A"], special_tokens=[(tokens[bos], bos)]
        )
    return tokenizer
