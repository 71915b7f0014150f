"""Rotary position embedding in Hugging Face's rotate-half order: channels i and i + H/2 are a pair.

Source: Su et al., arXiv:2104.09864.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Float, Int

from dms_jax.axes import Array, typed


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
