"""Rotary position embedding in Hugging Face's rotate-half order: channels i and i + H/2 are a pair.

Source: Su et al., arXiv:2104.09864.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Float, Int

from dms_jax.axes import Array, typed
from dms_jax.config import ModelConfig


def rope_frequencies(config: ModelConfig) -> Float[Array, "half"]:
    """Return the angular frequency of each channel pair (i, i + H/2).

    Source of the llama3 scaling: transformers `modeling_rope_utils.py`.
    """
    half = config.head_dim // 2
    frequency = config.rope_theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    scaling = config.rope_scaling
    if scaling is None:
        return frequency
    if scaling.kind == "linear":
        return frequency / scaling.factor
    rotations = scaling.original_max_position_embeddings * frequency / (2 * jnp.pi)  # over the original context
    smooth = jnp.clip(
        (rotations - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor), 0.0, 1.0
    )
    return frequency * (smooth + (1 - smooth) / scaling.factor)


@typed
def rope_cos_sin(
    position: Int[Array, "*A"], frequency: Float[Array, "half"]
) -> tuple[Float[Array, "*A half"], Float[Array, "*A half"]]:
    """Return cosine and sine of position * frequency, fp32."""
    angle = position[..., None].astype(jnp.float32) * lax.broadcast_to_rank(frequency, position.ndim + 1)
    return jnp.cos(angle), jnp.sin(angle)


@typed
def apply_rope(
    x: Float[Array, "*A H"], cos: Float[Array, "*#A half"], sin: Float[Array, "*#A half"]
) -> Float[Array, "*A H"]:
    """Rotate the channel pairs (i, i + H/2) in fp32; the result has the dtype of x."""
    low, high = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([low * cos - high * sin, high * cos + low * sin], axis=-1).astype(x.dtype)


@typed
def rope(
    x: Float[Array, "B T heads H"], position: Int[Array, "#B T"], frequency: Float[Array, "half"]
) -> Float[Array, "B T heads H"]:
    """Rotate the vector of each token by its position."""
    cos, sin = rope_cos_sin(position[:, :, None], frequency)
    return apply_rope(x, cos, sin)
