"""The tensors and the configuration of a GGUF file, under the names of a Hugging Face folder.

Tensors are dequantized to fp32, one at a time, when they are read. Format: ggml's `gguf.md`; names and the row order of
Q and K: llama.cpp `convert_hf_to_gguf.py`.
"""

import os
from collections.abc import Iterable
from functools import cached_property, lru_cache

import numpy as np

from dms_jax.config import ModelConfig, RopeScaling
from dms_jax.errors import ConfigError, naming, shown
from dms_jax.hf.families import FAMILIES
from dms_jax.hf.gguf.gguf_header import read_gguf
from dms_jax.hf.gguf.gguf_metadata import check_metadata, rope_scaling

ARCHITECTURES = ("llama", "qwen2", "qwen3")
# Names of tensors in the file -> names in a Hugging Face folder: outside of the layers, and inside of a layer.
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
BIASES = {"attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"}
ONLY_WITH_QK_NORM = {"attn_q_norm", "attn_k_norm"}
# Control tokens that llama.cpp takes for an end of generation by their text
ENDS = {
    "<|eot_id|>",
    "<|eom_id|>",
    "<|im_end|>",
    "<|end|>",
    "<end_of_turn>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<EOT>",
    "_<EOT>",
    "<｜end▁of▁sentence｜>",
    "<end_of_utterance>",
}
NO_TOKEN = 0xFFFFFFFF  # llama.cpp's LLAMA_TOKEN_NULL, -1 in 32 bits
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
# Two matrices with a smaller relative difference are quantizations of one tied matrix (0.04 and 0.08 were observed).
SAME_MATRIX = 0.2


class GGUFTensors:
    """The tensors of one GGUF file under Hugging Face names, fp32; `config` is its ModelConfig."""

    def __init__(self, path: str):
        self.where = path
        self.fields, tensors = read_gguf(path)
        if (kind := self.fields.get("general.type", "model")) != "model":
            raise ConfigError(f"{path}: general.type must be 'model', got {shown(kind)}; give the model's own file")
        architecture = self.fields.get("general.architecture")
        if not isinstance(architecture, str) or architecture not in ARCHITECTURES:
            raise ConfigError(
                f"{path}: GGUF architecture {shown(architecture)} is not supported; supported: "
                f"{', '.join(ARCHITECTURES)}"
            )
        self.architecture: str = architecture
        self.rope_table = tensors.pop("rope_freqs.weight", None)  # llama3 scaling as divisors
        self.tensors = {self._hf_name(name): tensor for name, tensor in tensors.items()}
        if EMBED not in self.tensors:
            raise ConfigError(f"{path} lacks the tensor token_embd.weight")
        if misshapen := [name for name in (EMBED, HEAD) if name in self.tensors and len(self.shape(name)) != 2]:
            raise ConfigError(f"{path}: {misshapen[0]} must be a matrix, got shape {list(self.shape(misshapen[0]))}")
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
                f"{self.where}: tensor {name} has the quantization {tensor.kind.name}, which gguf cannot dequantize"
            ) from why

    def _hf_name(self, name: str) -> str:
        parts = name.split(".")
        if len(parts) == 2 and parts[0] in OUTSIDE and parts[1] == "weight":
            return f"{OUTSIDE[parts[0]]}.{parts[1]}"
        if (
            len(parts) == 4
            and parts[0] == "blk"
            and parts[2] in INSIDE
            and parts[3] in ("weight", *(("bias",) if parts[2] in BIASES else ()))
            and (parts[2] not in ONLY_WITH_QK_NORM or FAMILIES[self.architecture].qk_norm)
        ):
            return f"model.layers.{parts[1]}.{INSIDE[parts[2]]}.{parts[3]}"
        raise ConfigError(f"{self.where}: tensor {name} does not belong to a {self.architecture} model")

    def _bits(self, name: str) -> float:
        """Bits per element of a tensor; 0 if the file does not have it."""
        tensor = self.tensors.get(name)
        return 0.0 if tensor is None else tensor.bits

    @cached_property
    def tied(self) -> bool:
        """Whether the output matrix is the embedding.

        If so, the file has no output matrix, or, like files of Qwen 2.5, repeats the embedding in another quantization.
        """
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
            raise ConfigError(f"{self.where}: {self.architecture}.{key} must be a single value, got {shown(value)}")
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
        """Return the id of the special token "bos", "eos", "eot", "eom", "padding" or "unknown", or None.

        An id outside the vocabulary raises ConfigError.
        """
        value = self.fields.get(f"tokenizer.ggml.{kind}_token_id")
        if value in (NO_TOKEN, -1):
            return None
        if value is not None and (
            not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < self.shape(EMBED)[0]
        ):
            raise ConfigError(f"{self.where}: tokenizer.ggml.{kind}_token_id must be a token id, got {shown(value)}")
        return value

    @cached_property
    def config(self) -> ModelConfig:
        hidden, heads = self._size("embedding_length"), self._size("attention.head_count")
        head_dim = self._size("attention.key_length", max(1, hidden // heads))
        check_metadata(self.fields, self.architecture, head_dim, self.where)
        theta = self._real("rope.freq_base", 10000.0)
        with naming(self.where):
            return ModelConfig(
                model_type=self.architecture,
                vocab_size=self.shape(EMBED)[0],
                hidden_size=hidden,
                intermediate_size=self._size("feed_forward_length"),
                num_layers=self._size("block_count"),
                num_q_heads=heads,
                num_kv_heads=self._size("attention.head_count_kv", heads),
                head_dim=head_dim,
                rms_norm_eps=self._real("attention.layer_norm_rms_epsilon"),
                rope_theta=theta,
                rope_scaling=self._scaling(theta, head_dim),
                max_position_embeddings=self._size("context_length"),
                tie_word_embeddings=self.tied,
                qkv_bias=self._has(("q_proj.bias", "k_proj.bias", "v_proj.bias")),
                o_bias=self._has("o_proj.bias"),
                mlp_bias=self._has(("gate_proj.bias", "up_proj.bias", "down_proj.bias")),
                qk_norm=FAMILIES[self.architecture].qk_norm,
                bos_token_id=self.token_id("bos"),
                eos_token_ids=self.stop_ids(),
                pad_token_id=self.token_id("padding"),
            )

    def _scaling(self, theta: float, head_dim: int) -> RopeScaling | None:
        factor = "rope.scaling.factor"
        if f"{self.architecture}.{factor}" not in self.fields:
            factor = "rope.scale_linear"  # its name in old files
        table = self.rope_table
        if table is not None and table.kind.name != "F32":
            raise ConfigError(f"rope_freqs.weight must be F32, got {table.kind.name}")
        kind = self.fields.get(f"{self.architecture}.rope.scaling.type")
        return rope_scaling(kind, self._real(factor, 0.0), None if table is None else table.data, theta, head_dim)

    def _has(self, endings: str | tuple[str, ...]) -> bool:
        return any(name.endswith(endings) for name in self.tensors)

    def stop_ids(self) -> tuple[int, ...]:
        """Return the ids that end generation.

        They are the end of text, of a turn and of a message, and the control tokens whose text llama.cpp takes for one
        of them.
        """
        named = [self.token_id(kind) for kind in ("eos", "eot", "eom")]
        tokens, types = (self.fields.get(f"tokenizer.ggml.{key}") for key in ("tokens", "token_type"))
        if isinstance(tokens, list) and isinstance(types, list):
            rows = range(min(len(tokens), len(types), self.shape(EMBED)[0]))
            named += [i for i in rows if types[i] == 3 and tokens[i] in ENDS]
        return tuple(dict.fromkeys(i for i in named if i is not None))


def open_gguf(path: str) -> GGUFTensors:
    """Open a GGUF file. The last file stays open, because its tokenizer is usually read next."""
    return _opened(path, os.stat(path).st_size, os.stat(path).st_mtime_ns)


@lru_cache(maxsize=1)
def _opened(path: str, size: int, changed: int) -> GGUFTensors:
    return GGUFTensors(path)


def unpermute(rows: np.ndarray, heads: int) -> np.ndarray:
    """Undo llama.cpp's order of the rows of Q and K: (pair, 2) becomes (2, pair) in each head, as rotate-half needs."""
    return rows.reshape(heads, rows.shape[0] // heads // 2, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def _shortest(value: float) -> float:
    """Return the shortest decimal that rounds to the same float32, the number that was meant: 1e-05 for
    9.999999747e-06."""
    return float(str(np.float32(value)))
