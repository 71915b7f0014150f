"""The supported model families: one record each for what differs between their configuration classes in transformers.

To add a dense family, add its record here, rows for its tensors to `hf_weights.WEIGHTS` if it has other names for them,
and a folder with reference logits to `tests/golden`.
"""

from dataclasses import dataclass

WINDOW_KEYS = (
    "use_sliding_window",
    "sliding_window",
    "max_window_layers",
)  # keys with which Qwen switches the window on


@dataclass(frozen=True)
class Family:
    """How to read the `config.json` of one family. Source: the configuration class of the family in transformers."""

    architecture: str  # class with which transformers opens a folder
    extra_keys: tuple[str, ...] = ()  # keys beyond those of all families; `fresh_config` writes them in this order
    ignored_keys: tuple[str, ...] = ()  # bias keys that a file may set but that have no effect
    qkv_bias: bool = False  # q, k and v have biases and o does not, in every model of the family
    qk_norm: bool = False  # RMSNorm over head_dim of queries and keys
    default_head_dim: int | None = None  # head_dim of a file without the key; None: hidden_size / num_attention_heads
    default_kv_heads: bool = False  # num_key_value_heads may be missing; then there is one KV head per query head
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
