"""A decoder laid out for decoding: layers run one after the other, and their caches may differ in capacity.

On a CPU, XLA copies a layer's weights out of a stacked array before it multiplies by them, which triples the memory
traffic of a decode step (measured: 0.26 s sliced, 0.08 s scanned, 0.03 s as separate arrays). On a CPU, the
layers are therefore separated once, and the copies live as long as the model. Accelerators read a slice in place, so
there the layers stay stacked.

Every step calls the same jitted functions: `_enter`, `_extend_layer` for each layer, and `_leave`. Inside a larger
program they are parts of it, and a layer is traced once for all layers. On a CPU they are programs of their own, so a
layer is also compiled once for all layers. For the 30 layers of SmolLM2-135M, the decode step compiles in 2 s of CPU
time instead of 16 s. Decoding costs more on the host: on two cores that other jobs shared, a token took 38 to 44 ms of
CPU time instead of 33 to 34 ms, and 32 ms instead of 34 ms at best but 58 ms instead of 42 ms in the median.
"""

import weakref
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Float, Int

from dms_jax.axes import Array
from dms_jax.config import ModelConfig
from dms_jax.core.cache_base import AnyCache
from dms_jax.core.paged_cache import PagedCache
from dms_jax.core.rotary import rope_frequencies
from dms_jax.core.slot_attention import Chunk
from dms_jax.models.attention_layer import channel_scale
from dms_jax.models.decoder import Block, Decoder
from dms_jax.models.layers import rms_norm
from dms_jax.platform_defaults import platform_defaults
from dms_jax.policies.cache_policy import CachePolicy
from dms_jax.sharding import constrain

Weights = tuple[Array, ...]  # the arrays of one layer, or of all layers stacked, as `LayerStructure` orders them

# model -> (its weights when they were separated, the UnrolledDecoder made of them)
_separated: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


class LayerStructure:
    """The static part of a layer. Jitted functions ask for its hash at every call, so it is computed only once."""

    def __init__(self, graph: nnx.GraphDef, tree: jax.tree_util.PyTreeDef):
        self.graph, self.tree = graph, tree
        self._hash = hash((graph, tree))

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        return isinstance(other, LayerStructure) and (self.graph, self.tree) == (other.graph, other.tree)

    def block(self, weights: Weights) -> Block:
        """Return the layer with these arrays."""
        return nnx.merge(self.graph, jax.tree.unflatten(self.tree, weights))  # as in the scan of `models.decoder`


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class UnrolledDecoder:
    """Arrays and structure of a Decoder. It is a pytree, so jitted functions take it as an argument."""

    layers: tuple[Weights, ...] | Weights  # of each layer, or stacked [L, ...]
    embed: Float[Array, "V D"]
    final_norm: Float[Array, "D"]
    head: Float[Array, "V D"]
    structure: LayerStructure = field(metadata={"static": True})
    config: ModelConfig = field(metadata={"static": True})

    @property
    def runs_by_layer(self) -> bool:
        """Whether each layer runs as a program of its own, unless a larger program is being traced."""
        return isinstance(self.layers[0], tuple)

    def extend(
        self,
        cache: AnyCache,
        tokens: Int[Array, "B T"],
        count: Int[Array, "B"],
        threshold: float | Float[Array, ""],
    ) -> tuple[Float[Array, "B T D"], AnyCache]:
        """Append the first `count` tokens of a chunk to each row. Return final-normed hidden states and the cache.

        Unless it runs inside of a jitted function, the new cache takes over the memory of the old one.
        """
        x, chunk = _enter(self.embed, cache.seen, tokens, count, threshold)
        after = cache

        def run(x, cache, weights, index):
            x, layer = _extend_layer(self.structure, weights, x, cache.layer(index), cache.policy, chunk)
            return x, cache.with_layer(index, layer)

        if isinstance(cache, PagedCache) and not self.runs_by_layer:  # layers of one shape: one is compiled for all
            indices = jnp.arange(cache.num_layers, dtype=jnp.int32)
            body = lambda carry, layer: (run(*carry, *layer), None)
            (x, after), _ = lax.scan(body, (x, cache), (self.layers, indices))
        else:
            for index in range(cache.num_layers):
                x, after = run(x, after, self._layer(index), index)
        hidden, seen = _leave(x, cache.seen, count, self.final_norm, self.config.rms_norm_eps)
        return hidden, replace(cast(Any, after), seen=seen)

    def logits(self, hidden: Float[Array, "*A D"]) -> Float[Array, "*A V"]:
        """Return the logits of final-normed hidden states, fp32."""
        return output_logits(hidden, self.head)

    def _layer(self, index: int) -> Weights:
        return cast(Weights, self.layers[index]) if self.runs_by_layer else _take(self.layers, index)


def output_logits(hidden: Float[Array, "*A D"], head: Float[Array, "V D"]) -> Float[Array, "*A V"]:
    """Return the logits of final-normed hidden states, fp32."""
    return jnp.einsum("...d,vd->...v", hidden, head, preferred_element_type=jnp.float32)


@jax.jit
def _enter(embed: Array, seen: Array, tokens: Array, count: Array, threshold: Array) -> tuple[Array, Chunk]:
    """Return the embedded tokens of a chunk, and where it continues each row."""
    position = seen[:, None] + jnp.arange(tokens.shape[1])[None]
    x = embed[jnp.where(position < (seen + count)[:, None], tokens, 0)]
    # Fixed shardings, so that the programs of the layers are the same for every chunk.
    chunk = Chunk(constrain(position, "batch", None), constrain(count, "batch"), threshold)
    return constrain(x, "batch", None, None), chunk


def _run_layer(
    structure: LayerStructure, weights: Weights, x: Array, cache: Any, policy: CachePolicy, chunk: Chunk
) -> tuple[Array, Any]:
    """Run one layer; `cache` is what `Cache.layer` returns."""
    block = structure.block(weights)
    return block.extend(x, cache, policy, chunk, channel_scale(block.config), rope_frequencies(block.config))


_extend_layer = jax.jit(_run_layer, static_argnames=("structure", "policy"), donate_argnames="cache")


@partial(jax.jit, static_argnames="eps")
def _leave(x: Array, seen: Array, count: Array, norm: Array, eps: float) -> tuple[Array, Array]:
    """Return the final-normed hidden states, and the tokens that each row has seen after the chunk."""
    return rms_norm(x, norm, eps), constrain(seen + count, "batch")


def num_layer_compilations() -> int:
    """Count the programs for single layers and for what surrounds them that have been compiled so far."""
    programs = _enter, _extend_layer, _leave
    return sum(program._cache_size() for program in programs)  # pyrefly: ignore[missing-attribute]


def stacked(model: Decoder) -> UnrolledDecoder:
    """Return the model with its layers stacked, one array for each parameter."""
    graph, layers = nnx.split(model.layers)
    weights, tree = jax.tree.flatten(layers)
    structure = LayerStructure(graph, tree)
    return UnrolledDecoder(
        tuple(weights), model.embed[...], model.final_norm[...], model.output_embedding(), structure, model.config
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
def _take(layers: Weights, index: int) -> Weights:
    return tuple(w[index] for w in layers)
