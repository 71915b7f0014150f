"""Rotary position embedding, Hugging Face's rotate-half order: channel i turns with channel i + H/2. Su et al., arXiv:2104.09864."""

import jax.numpy as jnp
from jaxtyping import Float, Int

from dms_jax.axes import Array, typed


@typed
def turns(
    position: Int[Array, "*A"], frequency: Float[Array, "half"]
) -> tuple[Float[Array, "*A half"], Float[Array, "*A half"]]:
    """Cosine and sine of position * frequency, fp32."""
    angle = position[..., None].astype(jnp.float32) * frequency
    return jnp.cos(angle), jnp.sin(angle)


@typed
def rotate(
    x: Float[Array, "*A H"], cos: Float[Array, "*#A half"], sin: Float[Array, "*#A half"]
) -> Float[Array, "*A H"]:
    """Channel pairs (i, i + H/2) turned, in fp32, result in the dtype of x."""
    low, high = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([low * cos - high * sin, high * cos + low * sin], axis=-1).astype(x.dtype)


@typed
def rope(
    x: Float[Array, "B T heads H"], position: Int[Array, "#B T"], frequency: Float[Array, "half"]
) -> Float[Array, "B T heads H"]:
    """Each token turned by its position."""
    cos, sin = turns(position[:, :, None], frequency)
    return rotate(x, cos, sin)
