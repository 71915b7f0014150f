"""Tiny random models, golden models and data that many tests share, and the NumPy oracle of visibility and decoding."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors.numpy import load_file

import dms_jax
from dms_jax.config import DMSConfig, ModelConfig
from dms_jax.models.decoder import Decoder

TINY = ModelConfig(
    model_type="llama",
    vocab_size=97,
    hidden_size=32,
    intermediate_size=48,
    num_layers=3,
    num_q_heads=8,
    num_kv_heads=4,
    head_dim=8,
    max_position_embeddings=512,
)

# Models and outputs of public reference code (tests/golden/README.md).
GOLDEN = Path(__file__).parent / "golden"
GOLDEN_DMS = ["projection_per_head", "projection_per_layer", "borrowed_query_channel", "chunked_prefill"]
GOLDEN_PROMPT = 41  # tokens that the reference trained on and prefilled; it decoded the other 23 one by one


def golden_reference(name: str) -> tuple[Decoder, dict]:
    """Load the model in a golden folder, and the tensors that its reference code computed, by name."""
    model, tensors = dms_jax.load(GOLDEN / name), load_file(GOLDEN / name / "tensors.safetensors")
    return model, tensors | {"input_ids": jnp.asarray(tensors["input_ids"], jnp.int32)}


def tiny_model(dms: DMSConfig | None, seed: int = 0, evict_scale: float = 0.1, **fields) -> Decoder:
    """Make a random model. Its evict head, if it has one, is random too, so that it really evicts."""
    model = Decoder(dataclasses.replace(TINY, dms=dms, **fields), rngs=nnx.Rngs(seed))
    if dms is not None and dms.variant == "projection":
        head = model.layers.attention.evict_proj
        head[...] = evict_scale * jax.random.normal(jax.random.key(seed + 1), head[...].shape)
        if dms.head_units:
            for key, part in enumerate(
                (model.layers.attention.evict_units_bias, model.layers.attention.evict_units_out)
            ):
                part[...] = evict_scale * jax.random.normal(jax.random.key(seed + 2 + key), part[...].shape)
    # Weights of size 0.02 make all logits nearly equal. Larger ones make attention and the KL worth comparing.
    attention = model.layers.attention
    for weights in (model.embed, attention.q, attention.k, attention.v, attention.o):
        weights[...] = weights[...] * 8
    return model


def tokens(rng: np.random.Generator, batch: int, length: int) -> np.ndarray:
    """Draw random token ids [batch, length]."""
    return rng.integers(0, TINY.vocab_size, (batch, length)).astype(np.int32)


def pair_flags(alpha: np.ndarray, shift: int) -> np.ndarray:
    """Turn decisions of tokens [T] into flags of pairs [T]."""
    flags = np.zeros_like(alpha)
    if shift:
        flags[:-1] = alpha[1:]
    else:
        flags[:] = alpha
    return flags


def visible(alpha: np.ndarray, window: int, shift: int) -> np.ndarray:
    """Return which query sees which pair [T, T]. Written from the specification, not from the package."""
    position = np.arange(len(alpha))
    age = position[:, None] - position[None]
    return (age >= 0) & ~((pair_flags(alpha, shift)[None] > 0) & (age > window))


def decode(alpha: np.ndarray, window: int, shift: int) -> tuple[np.ndarray, list[int]]:
    """Return which query sees which pair [T, T] and the live count after each token, by a cache that reuses slots."""
    length = len(alpha)
    slots, flag, seen, live = [], {}, np.zeros((length, length), bool), []
    for t in range(length):
        if shift and t:
            flag[t - 1] = alpha[t]
        if not shift:
            flag[t] = alpha[t]
        old = t - window - 1
        if old >= 0 and flag[old]:
            slots[slots.index(old)] = t
        else:
            slots.append(t)
        seen[t, slots] = True
        live.append(len(slots))
    return seen, live
