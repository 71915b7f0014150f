"""A decoder laid out for decoding: layers run one after the other, and their caches may differ in capacity.

On a CPU, XLA copies a layer's weights out of a stacked array before it multiplies by them, which triples the memory
traffic of a decode step (measured: 0.26 s sliced, 0.08 s scanned, 0.03 s as separate arrays). On a CPU, the
layers are therefore separated once, and the copies live as long as the model. Accelerators read a slice in place, so
there the layers stay stacked.
"""

import weakref
from dataclasses import dataclass, field, replace
from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Float, Int

from dms_jax.axes import Array
from dms_jax.config import ModelConfig
from dms_jax.core.cache_base import Cache
from dms_jax.core.paged_cache import PagedCache
from dms_jax.core.rotary import rope_frequencies
from dms_jax.core.slot_attention import Chunk
from dms_jax.models.attention_layer import channel_scale
from dms_jax.models.decoder import Decoder
from dms_jax.models.layers import rms_norm
from dms_jax.platform_defaults import platform_defaults

# model -> (its weights when they were separated, the UnrolledDecoder made of them)
_separated: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class UnrolledDecoder:
    """Arrays and structure of a Decoder. It is a pytree, so jitted functions take it as an argument."""

    layers: tuple[nnx.State, ...] | nnx.State  # separate, or stacked [L, ...]
    embed: Float[Array, "V D"]
    final_norm: Float[Array, "D"]
    head: Float[Array, "V D"]
    graph: nnx.GraphDef = field(metadata={"static": True})
    config: ModelConfig = field(metadata={"static": True})

    def extend(
        self,
        cache: Cache,
        tokens: Int[Array, "B T"],
        count: Int[Array, "B"],
        threshold: float | Float[Array, ""],
    ) -> tuple[Float[Array, "B T D"], Any]:
        """Append the first `count` tokens of a chunk to each row. Return final-normed hidden states and the cache."""
        config, policy = self.config, cache.policy
        position = cache.seen[:, None] + jnp.arange(tokens.shape[1])[None]
        chunk = Chunk(position, count, threshold)
        frequency, channel = rope_frequencies(config), channel_scale(config)
        x, after = self.embed[jnp.where(position < (cache.seen + count)[:, None], tokens, 0)], cast(Any, cache)

        def run(carry, weights, index):
            x, cache = carry
            block = nnx.merge(self.graph, weights)  # as in the scan of `models.decoder`
            x, layer = block.extend(x, cache.layer(index), policy, chunk, channel, frequency)
            return x, cache.with_layer(index, layer)

        if self._scans(cache):  # all layers have one shape, so one is compiled for all
            indices = jnp.arange(cache.num_layers, dtype=jnp.int32)
            body = lambda carry, layer: (run(carry, *layer), None)
            (x, after), _ = lax.scan(body, (x, cache), (self.layers, indices))
        else:
            for index in range(cache.num_layers):
                x, after = run((x, after), self._layer(index), index)
        hidden = rms_norm(x, self.final_norm, config.rms_norm_eps)
        return hidden, replace(after, seen=cache.seen + count)

    def logits(self, hidden: Float[Array, "*A D"]) -> Float[Array, "*A V"]:
        """Return the logits of final-normed hidden states, fp32."""
        return jnp.einsum("...d,vd->...v", hidden, self.head, preferred_element_type=jnp.float32)

    def _scans(self, cache: Cache) -> bool:
        """Whether the layers run as a loop over stacked weights, which needs layers of one shape."""
        return isinstance(cache, PagedCache) and not isinstance(self.layers, tuple)

    def _layer(self, index: int) -> nnx.State:
        return self.layers[index] if isinstance(self.layers, tuple) else jax.tree.map(lambda w: w[index], self.layers)


def stacked(model: Decoder) -> UnrolledDecoder:
    """Return the model with its layers stacked, one array for each parameter."""
    graph, layers = nnx.split(model.layers)
    return UnrolledDecoder(
        layers, model.embed[...], model.final_norm[...], model.output_embedding(), graph, model.config
    )


def unrolled(model: Decoder) -> UnrolledDecoder:
    """Return the model in the layout that decodes fastest on this platform.

    Separated layers are kept for the next call, and are separated again if the model's weights or config have changed.
    """
    decoder = stacked(model)
    if not platform_defaults().unroll_layers:
        return decoder
    weights = jax.tree.leaves(decoder)
    known_weights, known = _separated.get(model, ((), None))
    unchanged = known is not None and known.config == decoder.config
    if unchanged and all(a is b for a, b in zip(known_weights, weights, strict=True)):
        return known
    layers = tuple(_take(decoder.layers, index) for index in range(model.config.num_layers))
    result = replace(decoder, layers=layers)
    _separated[model] = weights, result
    return result


@jax.jit
def _take(layers: nnx.State, index: int) -> nnx.State:
    return jax.tree.map(lambda w: w[index], layers)
