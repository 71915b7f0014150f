"""A decoder laid out for decoding: the layers one after the other, each with a cache of its own capacity.

On a CPU, XLA copies a layer's weights out of a stacked array before it multiplies by them: three times the memory traffic of
a step that does nothing else (measured: 0.26 s sliced, 0.08 s scanned, 0.03 s as separate arrays). There the layers are
separated once and kept as long as the model. Accelerators read a slice in place, so there the stack stays as it is.
"""

import weakref
from dataclasses import dataclass, field, replace

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Float, Int

from dms_jax.axes import Array
from dms_jax.config import ModelConfig
from dms_jax.core.compact_cache import CompactCache
from dms_jax.models.attention_layer import Chunk, channel_scale
from dms_jax.models.decoder import Decoder
from dms_jax.models.layers import rms_norm, rope_frequencies
from dms_jax.sharding import target_device

_separated: weakref.WeakKeyDictionary = (
    weakref.WeakKeyDictionary()
)  # model -> (its weights, the same as UnrolledDecoder)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class UnrolledDecoder:
    """Arrays and structure of a Decoder; a pytree, so it is an argument of jitted functions."""

    layers: tuple[nnx.State, ...] | nnx.State  # one by one, or stacked [L, ...]
    embed: Float[Array, "V D"]
    final_norm: Float[Array, "D"]
    head: Float[Array, "V D"]
    graph: nnx.GraphDef = field(metadata={"static": True})
    config: ModelConfig = field(metadata={"static": True})

    def extend(
        self,
        cache: CompactCache,
        tokens: Int[Array, "B T"],
        count: Int[Array, "B"],
        threshold: float | Float[Array, ""],
    ) -> tuple[Float[Array, "B T D"], CompactCache]:
        """Final-normed hidden states [B T D] of a chunk whose first `count` tokens continue each row, and the cache after it."""
        config, policy = self.config, cache.policy
        position = cache.seen[:, None] + jnp.arange(tokens.shape[1])
        chunk = Chunk(position, count, threshold)
        frequency, channel = rope_frequencies(config), channel_scale(config)
        x, layers = self.embed[jnp.where(position < (cache.seen + count)[:, None], tokens, 0)], []
        for index, layer_cache in enumerate(cache.layers):
            block = nnx.merge(self.graph, self._layer(index))
            x, layer_cache = block.extend(x, layer_cache, policy, chunk, channel, frequency)
            layers.append(layer_cache)
        hidden = rms_norm(x, self.final_norm, config.rms_norm_eps)
        return hidden, replace(cache, layers=tuple(layers), seen=cache.seen + count)

    def logits(self, hidden: Float[Array, "*A D"]) -> Float[Array, "*A V"]:
        return jnp.einsum("...d,vd->...v", hidden, self.head, preferred_element_type=jnp.float32)

    def _layer(self, index: int) -> nnx.State:
        return self.layers[index] if isinstance(self.layers, tuple) else jax.tree.map(lambda w: w[index], self.layers)


def stacked(model: Decoder) -> UnrolledDecoder:
    """The model with its layers in one array each."""
    graph, layers = nnx.split(model.layers)
    return UnrolledDecoder(
        layers, model.embed[...], model.final_norm[...], model.output_embedding(), graph, model.config
    )


def unrolled(model: Decoder) -> UnrolledDecoder:
    """The model as it is now: weights that were replaced since the last call are noticed."""
    whole = stacked(model)
    if target_device()[0] != "cpu":
        return whole
    weights = jax.tree.leaves(whole)
    held = _separated.get(model)
    if held is None or held[1].config != whole.config or any(a is not b for a, b in zip(held[0], weights, strict=True)):
        _separated[model] = held = (
            weights,
            replace(whole, layers=tuple(_take(whole.layers, index) for index in range(model.config.num_layers))),
        )
    return held[1]


@jax.jit
def _take(layers: nnx.State, index: int) -> nnx.State:
    return jax.tree.map(lambda w: w[index], layers)
