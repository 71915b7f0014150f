"""The small parts of a decoder: parameters with logical axes, RMSNorm, rotary frequencies, the SwiGLU MLP."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Float, Int

from dms_jax.axes import EXACT, Array, typed
from dms_jax.config import ModelConfig
from dms_jax.core.visibility import segment_bounds
from dms_jax.sharding import constrain, gather_for_matmul


class EvictParam(nnx.Param):
    """A parameter of the evict head. An adapter retrofit trains these only, and an adapter file holds nothing else."""


@dataclass
class ParamFactory:
    """Factory of parameters. Their logical axes determine the shape, through `config`, and the sharding on a mesh."""

    config: ModelConfig
    rngs: nnx.Rngs
    dtype: jnp.dtype

    def size(self, axis: str) -> int:
        """Return the size of a logical axis."""
        c = self.config
        return {
            "layers": c.num_layers,
            "embed": c.hidden_size,
            "mlp": c.intermediate_size,
            "vocab": c.vocab_size,
            "q_heads": c.num_q_heads,
            "kv_heads": c.num_kv_heads,
            "head_dim": c.head_dim,
            "evict_units": c.dms.head_units if c.dms is not None else 0,
        }[axis]

    def __call__(self, *axes: str, fill: float | None = None) -> nnx.Param:
        """Make a parameter: constant `fill`, or normal with standard deviation 0.02."""
        shape = tuple(map(self.size, axes))
        value = (
            jnp.full(shape, fill, self.dtype)
            if fill is not None
            else 0.02 * jax.random.normal(self.rngs.params(), shape, self.dtype)
        )
        return nnx.Param(value, axes=axes)

    def evict_head(self) -> dict[str, EvictParam]:
        """Make the parameters of a fresh evict head by name, fp32; none for a model without one.

        Zero weights: every logit starts at -bias, so the untrained student keeps (almost) everything. Only the weights
        into the hidden units are random, because units that are all alike would stay so. They are the same in every
        model of a shape, so that neither the seed of the base nor the mesh changes them.
        """
        dms = self.config.dms
        if dms is None or dms.variant != "projection":
            return {}
        filled = lambda fill, *axes: EvictParam(jnp.full(tuple(map(self.size, axes)), fill, jnp.float32), axes=axes)
        head = {
            "evict_norm": filled(1.0, "layers", "embed"),
            "evict_proj": filled(0.0, "layers", "embed", "kv_heads"),
        }
        if self.config.o_bias:  # Model-Optimizer ties the bias of the evict head to `attention_bias`
            head["evict_bias"] = filled(0.0, "layers", "kv_heads")
        if dms.head_units:
            axes = ("layers", "embed", "evict_units")
            normal = jax.random.normal(jax.random.key(0), tuple(map(self.size, axes)), jnp.float32)
            head["evict_units_in"] = EvictParam(normal * self.config.hidden_size**-0.5, axes=axes)
            head["evict_units_bias"] = filled(0.0, "layers", "evict_units")
            head["evict_units_out"] = filled(0.0, "layers", "evict_units", "kv_heads")
        return head


def unit_rms(x: Float[Array, "*A D"], eps: float) -> Float[Array, "*A D"]:
    """Return x / rms(x), fp32."""
    # Written as products, whose gradients are products too, because XLA on a CPU is slow at fused reductions.
    x32 = x.astype(jnp.float32)
    mean_square = jnp.einsum("...d,...d->...", x32, x32, precision=EXACT) / x.shape[-1]
    return jnp.einsum("...d,...->...d", x32, jax.lax.rsqrt(mean_square + eps), precision=EXACT)


@typed
def rms_norm(x: Float[Array, "*A D"], weight: Float[Array, "D"], eps: float) -> Float[Array, "*A D"]:
    """Return x / rms(x) * weight, with statistics in fp32 and the result in the dtype of x."""
    return (unit_rms(x, eps).astype(x.dtype) * jax.lax.broadcast_to_rank(weight, x.ndim)).astype(x.dtype)


@typed
def positions(length: int, segment_ids: Int[Array, "B {length}"] | None) -> Int[Array, "#B {length}"]:
    """Return the rotary positions of a row, counted from the start of each segment.

    A packed document thus gets the same logits as it would alone. This matters because, with a zeroed borrowed channel,
    attention depends on absolute positions and not only on distances.
    """
    index = jnp.arange(length)[None]
    if segment_ids is None:
        return index
    return index - segment_bounds(segment_ids)[0]


class MLP(nnx.Module):
    """SwiGLU, down(silu(gate(x)) * up(x)), with weights stacked over layers."""

    def __init__(self, config: ModelConfig, param: ParamFactory):
        self.gate, self.up = param("layers", "embed", "mlp"), param("layers", "embed", "mlp")
        self.down = param("layers", "mlp", "embed")
        if config.mlp_bias:
            self.gate_bias, self.up_bias = param("layers", "mlp", fill=0.0), param("layers", "mlp", fill=0.0)
            self.down_bias = param("layers", "embed", fill=0.0)
        self.biased = config.mlp_bias

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Run the MLP for inference, where T is not sharded."""
        return self._down(*self._gate_and_up(x))

    def for_training(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Run the MLP for training, where T is sharded along "sequence" before and after."""
        gate, up = self._gate_and_up(gather_for_matmul(x, "mlp", self.gate[...].shape[1]))
        # Unconstrained, the gradient of silu(gate) * up would be sharded along T and exchanged before and after.
        return self._down(constrain(gate, "batch", "sequence", "mlp"), constrain(up, "batch", "sequence", "mlp"))

    def _gate_and_up(self, x: Float[Array, "B T D"]) -> tuple[Float[Array, "B T F"], Float[Array, "B T F"]]:
        gate, up = x @ self.gate[...], x @ self.up[...]
        return (gate + self.gate_bias[None, None], up + self.up_bias[None, None]) if self.biased else (gate, up)

    def _down(self, gate: Float[Array, "B T F"], up: Float[Array, "B T F"]) -> Float[Array, "B T D"]:
        out = (jax.nn.silu(gate) * up) @ self.down[...]
        return out + self.down_bias[None, None] if self.biased else out
