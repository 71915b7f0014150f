"""The metadata keys of a GGUF file that change the numbers: each is read, known to be off at its value, or refused.

Meaning of the keys: llama.cpp `llama-model.cpp` (`load_hparams`) and `llama-context.cpp`.
"""

import math
from typing import Any

import numpy as np

from dms_jax.config import RopeScaling
from dms_jax.errors import ConfigError, shown

# Keys that `GGUFTensors.config` and `rope_scaling` read
READ = frozenset(
    [
        "block_count",
        "context_length",
        "embedding_length",
        "feed_forward_length",
        "attention.head_count",
        "attention.head_count_kv",
        "attention.key_length",
        "attention.layer_norm_rms_epsilon",
        "rope.freq_base",
        "rope.scaling.type",
        "rope.scaling.factor",
        "rope.scale_linear",
    ]
)
# Keys without effect in the supported architectures: YaRN and windows are refused by the keys that switch them on.
HARMLESS = frozenset(
    [
        "vocab_size",
        "attention.layer_norm_epsilon",
        "rope.scaling.original_context_length",
        "rope.scaling.finetuned",
        "rope.scaling.yarn_beta_fast",
        "rope.scaling.yarn_beta_slow",
        "attention.sliding_window_pattern",
        "attention.key_length_swa",
        "attention.value_length_swa",
        "rope.freq_base_swa",
        "rope.dimension_count_swa",
    ]
)
# Scales: 1 is off, and llama.cpp takes 0 for a key that is absent
SCALES = frozenset(
    [
        "logit_scale",
        "residual_scale",
        "embedding_scale",
        "attention.output_scale",
        "expert_weights_scale",
        "rope.scaling.alpha",
    ]
)
STANDARD_LENGTHS = tuple(2**power for power in range(13, 4, -1)) + tuple(2**power for power in range(14, 21))


def check_metadata(fields: dict[str, Any], architecture: str, head_dim: int, where: str) -> None:
    """Raise ConfigError for the first key that changes the mathematics and that this reader does not follow."""
    from gguf.constants import MODEL_ARCH_NAMES

    own = f"{architecture}."
    exact = {
        "attention.value_length": (head_dim,),
        "rope.dimension_count": (head_dim,),
        "attention.causal": (True,),
        "rope.scaling.attn_factor": (1.0,),
        "rope.scaling.yarn_attn_factor": (1.0,),
        "attention.scale": (0.0, float(np.float32(1 / math.sqrt(head_dim))), 1 / math.sqrt(head_dim)),
        "embedding_length_out": (0, fields.get(own + "embedding_length")),
        "tensor_data_layout": ("", "Meta AI original pth"),
        "rope.scaling.yarn_ext_factor": (0.0, -1.0),
    }
    for key, value in fields.items():
        prefix = key.partition(".")[0]
        if prefix != architecture and prefix not in MODEL_ARCH_NAMES.values():
            continue  # "general", "tokenizer", "split" and what quantizers note about their work
        name = key.removeprefix(own)
        if key.startswith(own) and name in READ | HARMLESS:
            continue
        off = exact.get(name, (0, False, "", "none", *((1.0,) if name in SCALES else ())))
        values = value if isinstance(value, list) else [value]
        if key.startswith(own) and all(_among(one, off) for one in values):
            continue
        window, context = name == "attention.sliding_window", fields.get(own + "context_length")
        if window and isinstance(value, int) and isinstance(context, int) and value >= context > 0:
            continue
        raise ConfigError(
            f"{where}: the metadata key {shown(key)} = {shown(value)} is not supported for {architecture}, because it "
            "may change the logits; use the Hugging Face folder of the model"
        )


def _among(value: object, accepted: tuple) -> bool:
    return any(value == one and isinstance(value, str) == isinstance(one, str) for one in accepted)


def rope_scaling(
    kind: object, factor: float, table: np.ndarray | None, theta: float, head_dim: int
) -> RopeScaling | None:
    """Return the rotary scaling that a file means. `kind` is None in a file that names no type.

    llama.cpp reads a factor without a type as linear, ignores the factor of type "none", and takes 0 for no factor.
    """
    if kind not in (None, "none", "linear"):
        raise ConfigError(f"rope scaling {shown(kind)} in a GGUF file is not supported; use the Hugging Face folder")
    if not (math.isfinite(factor) and factor >= 0):
        raise ConfigError(f"the factor of rope scaling must be a finite number of at least 0, got {shown(factor)}")
    linear = None
    if kind != "none" and factor not in (0.0, 1.0):
        linear = RopeScaling(kind="linear", factor=factor)
    if table is None or bool(np.all(table == 1)):
        return linear
    if linear is not None:
        raise ConfigError("a rope_freqs table together with linear rope scaling is not supported")
    return llama3_scaling(table, theta, head_dim)


def llama3_scaling(table: np.ndarray, theta: float, head_dim: int) -> RopeScaling:
    """Return the llama3 scaling whose divisors of the frequencies are `table`, equal to float32 precision.

    Between its two plateaus, 1 / table is linear in the frequency, which gives two numbers for three fields (low, high
    and original length). Numbers that are usual come first, then those with a low factor of 1.
    """
    if table.shape != (head_dim // 2,) or not np.all(np.isfinite(table)) or np.any(table < 1):
        raise ConfigError(
            f"rope_freqs.weight must hold {head_dim // 2} finite divisors of at least 1, got shape {list(table.shape)}"
        )
    turns = theta ** (-np.arange(head_dim // 2) * 2 / head_dim) / (2 * math.pi)
    top = float(table.max())
    for factor in (top, *(2.0**power for power in range(1, 7))):
        for length in STANDARD_LENGTHS:
            if _reproduces(found := RopeScaling("llama3", factor, 1.0, 4.0, length), table, turns):
                return found
    between = (table > 1) & (table < top)
    if between.sum() >= 2:
        smooth = (1 / table[between].astype(np.float64) - 1 / top) / (1 - 1 / top)
        slope, offset = np.polyfit(turns[between], smooth, 1)
        if slope > 0 > offset:
            length = round(slope / -offset)
            if _reproduces(found := RopeScaling("llama3", top, 1.0, 1 - 1 / float(offset), length), table, turns):
                return found
            for low in (2.0, 4.0, 8.0):
                high = float(np.round(low - low / offset, 4))
                found = RopeScaling("llama3", top, low, high, round(slope * (high - low)))
                if _reproduces(found, table, turns):
                    return found
    raise ConfigError(
        "the divisors of rope_freqs.weight are not those of llama3 scaling for any factor and original length; use "
        "the Hugging Face folder of the model"
    )


def _reproduces(scaling: RopeScaling, table: np.ndarray, turns: np.ndarray) -> bool:
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    smooth = np.clip((scaling.original_max_position_embeddings * turns - low) / (high - low), 0.0, 1.0)
    return np.allclose(1 / (smooth + (1 - smooth) / scaling.factor), table, rtol=2e-6, atol=0)
