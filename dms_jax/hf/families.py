"""The model families that `config.json` may name: one record each for what transformers' classes do not have in common.

To add a dense family, add its record here, the rows of its tensors to `hf_weights.WEIGHTS` if it has names of its own,
and a folder with reference logits to `tests/golden`.
"""

from dataclasses import dataclass

WINDOW_KEYS = ("use_sliding_window", "sliding_window", "max_window_layers")  # Qwen's way of switching the window on


@dataclass(frozen=True)
class Family:
    """One family's reading of `config.json`. Source: the configuration class of the family in transformers."""

    architecture: str  # the class that transformers opens a folder with
    extra_keys: tuple[str, ...] = ()  # beyond what all families have; `fresh_config` writes them, in this order
    ignored_keys: tuple[str, ...] = ()  # bias keys that a file may set and that change nothing
    qkv_bias: bool = False  # q, k and v have biases and o has none, in every model of the family
    qk_norm: bool = False  # RMSNorm over head_dim of queries and keys
    default_head_dim: int | None = None  # of a file without the key; None: hidden_size / num_attention_heads
    default_kv_heads: bool = False  # a file may leave num_key_value_heads out: one KV head per query head
    default_window: int | None = 4096  # sliding_window of a file without the key
    layer_types_decide: bool = True  # `layer_types` without a sliding layer switches the window off


FAMILIES = {
    "llama": Family(
        "LlamaForCausalLM",
        extra_keys=("attention_bias", "mlp_bias"),
        default_kv_heads=True,  # Llama 1 and 2
        default_window=None,
    ),
    "mistral": Family("MistralForCausalLM", extra_keys=("sliding_window",), layer_types_decide=False),
    "qwen2": Family("Qwen2ForCausalLM", extra_keys=WINDOW_KEYS, ignored_keys=("attention_bias",), qkv_bias=True),
    "qwen3": Family(
        "Qwen3ForCausalLM", extra_keys=("attention_bias", *WINDOW_KEYS), qk_norm=True, default_head_dim=128
    ),
}
