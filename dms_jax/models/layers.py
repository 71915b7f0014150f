"""The small parts of a decoder: parameters with logical axes, RMSNorm, rotary embedding, SwiGLU."""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Float, Int

from dms_jax.axes import EXACT, Array, typed
from dms_jax.config import ModelConfig
from dms_jax.sharding import constrain, to_split


class EvictParam(nnx.Param):
    """A parameter of the evict head: what an adapter retrofit trains, and all that an adapter file holds."""


@dataclass
class ParamFactory:
    """Makes parameters from logical axes: the axes give the shape (through the config) and, later, the sharding."""

    config: ModelConfig
    rngs: nnx.Rngs
    dtype: jnp.dtype

    def size(self, axis: str) -> int:
        c = self.config
        return {
            "layers": c.num_layers,
            "embed": c.hidden_size,
            "mlp": c.intermediate_size,
            "vocab": c.vocab_size,
            "q_heads": c.num_q_heads,
            "kv_heads": c.num_kv_heads,
            "head_dim": c.head_dim,
        }[axis]

    def __call__(self, *axes: str, fill: float | None = None, kind: type[nnx.Param] = nnx.Param) -> nnx.Param:
        """A parameter [sizes of `axes`]: constant `fill`, or normal with deviation 0.02. Evict parameters are fp32."""
        shape = tuple(map(self.size, axes))
        dtype = jnp.float32 if kind is EvictParam else self.dtype
        value = (
            jnp.full(shape, fill, dtype)
            if fill is not None
            else 0.02 * jax.random.normal(self.rngs.params(), shape, dtype)
        )
        return kind(value, axes=axes)


def unit_rms(x: Float[Array, "*A D"], eps: float) -> Float[Array, "*A D"]:
    """x / rms(x), fp32. Written as products, whose gradients are products: XLA's CPU compiler is slow at fused reductions."""
    x32 = x.astype(jnp.float32)
    mean_square = jnp.einsum("...d,...d->...", x32, x32, precision=EXACT) / x.shape[-1]
    return jnp.einsum("...d,...->...d", x32, jax.lax.rsqrt(mean_square + eps), precision=EXACT)


@typed
def rms_norm(x: Float[Array, "*A D"], weight: Float[Array, "D"], eps: float) -> Float[Array, "*A D"]:
    """x / rms(x) * weight, statistics in fp32, result in the dtype of x."""
    return (unit_rms(x, eps).astype(x.dtype) * weight).astype(x.dtype)


def rope_frequencies(config: ModelConfig) -> Float[Array, "half"]:
    """Angular frequency of each channel pair (i, i + H/2). llama3 scaling: transformers `modeling_rope_utils.py`."""
    half = config.head_dim // 2
    frequency = config.rope_theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    scaling = config.rope_scaling
    if scaling is None:
        return frequency
    if scaling.kind == "linear":
        return frequency / scaling.factor
    turns = scaling.original_max_position_embeddings * frequency / (2 * jnp.pi)  # over the original context
    smooth = jnp.clip(
        (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor), 0.0, 1.0
    )
    return frequency * (smooth + (1 - smooth) / scaling.factor)


@typed
def positions(length: int, segment_ids: Int[Array, "B {length}"] | None) -> Int[Array, "#B {length}"]:
    """Rotary positions of a row: counted from the start of each segment, so that a packed document is what it is alone. (The
    zeroed borrowed channel makes attention depend on absolute positions, not on distances only.)"""
    index = jnp.arange(length)[None]
    if segment_ids is None:
        return index
    starts = jnp.concatenate(
        [jnp.zeros_like(segment_ids[:, :1], bool), segment_ids[:, 1:] != segment_ids[:, :-1]], axis=1
    )
    return index - jax.lax.cummax(jnp.where(starts, index, 0), axis=1)


class MLP(nnx.Module):
    """down(silu(gate(x)) * up(x)), weights stacked over layers."""

    def __init__(self, config: ModelConfig, param: Callable[..., nnx.Param]):
        self.gate, self.up = param("layers", "embed", "mlp"), param("layers", "embed", "mlp")
        self.down = param("layers", "mlp", "embed")
        if config.mlp_bias:
            self.gate_bias, self.up_bias = param("layers", "mlp", fill=0.0), param("layers", "mlp", fill=0.0)
            self.down_bias = param("layers", "embed", fill=0.0)
        self.biased = config.mlp_bias

    def __call__(self, x: Float[Array, "B T D"], length: str | None = None) -> Float[Array, "B T D"]:
        """`length` is the logical axis of T."""
        if length is not None:
            x = to_split(x, "mlp", self.gate[...].shape[1])
        gate, up = x @ self.gate[...], x @ self.up[...]
        if self.biased:
            gate, up = gate + self.gate_bias[...], up + self.up_bias[...]
        if length is not None:  # or the gradient of their product is split by length, and exchanged before and after
            gate, up = constrain(gate, "batch", length, "mlp"), constrain(up, "batch", length, "mlp")
        out = (jax.nn.silu(gate) * up) @ self.down[...]
        return out + self.down_bias[...] if self.biased else out
