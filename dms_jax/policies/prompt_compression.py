"""The protocol of kvpress (github.com/NVIDIA/kvpress): prefill densely, rank once, keep the best; decoding adds and removes nothing."""

from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Int

from dms_jax.axes import Array
from dms_jax.core.compact_cache import EMPTY, GONE, CompactCache, LayerCache, Selection
from dms_jax.errors import ConfigError
from dms_jax.policies.budget_policy import BudgetPolicy, Pairs, best
from dms_jax.policies.keep_all import KeepAll


@dataclass(frozen=True)
class PromptCompression(KeepAll):
    """Keeps everything, and remembers what `method` needs for its ranking, until `compress_prompt` is called."""

    method: BudgetPolicy

    @property
    def features(self) -> int:
        return self.method.features

    def select(self, q, k, expiries, slots, position, count) -> Selection | None:
        pairs = self.method.after(q, k, expiries, slots, position, count)
        return Selection(pairs.alive, pairs.statistic) if self.features else None


def prompt_pairs(layer: LayerCache, seen: Int[Array, "B"]) -> Pairs:
    """The pairs of a prefilled layer, as a method ranks them."""
    return Pairs(layer.k, layer.position, layer.expiry >= (seen - 1)[:, None, None], layer.statistic, seen - 1)


def compress_prompt(cache: CompactCache, capacity: int | None = None) -> CompactCache:
    """After the prefill of a cache made with `PromptCompression`: the best `budget` pairs of each layer, row and KV head, in
    buffers of `capacity` slots (by default the same as before). From here on the cache keeps everything.

    Raises ConfigError for a cache of another policy, and for a capacity below the budget.
    """
    policy = cache.policy
    if not isinstance(policy, PromptCompression):
        raise ConfigError(
            f"compress_prompt wants a cache made with policy=PromptCompression(method), this one has {type(policy).__name__}"
        )
    if capacity is not None and capacity < policy.method.budget:
        raise ConfigError(
            f"capacity {capacity} is less than the budget of {policy.method.budget} pairs; use capacity >= {policy.method.budget}"
        )
    layers = tuple(_compressed(layer, cache.seen, policy.method, capacity or layer.capacity) for layer in cache.layers)
    return replace(cache, layers=layers, policy=KeepAll())


@partial(jax.jit, static_argnames=("method", "capacity"))
def _compressed(layer: LayerCache, seen: Int[Array, "B"], method: BudgetPolicy, capacity: int) -> LayerCache:
    pairs = prompt_pairs(layer, seen)
    kept = best(method.keep_scores(pairs), pairs.alive, pairs.position, method.budget)
    # Kept pairs first, in their order, so that reading costs what is live.
    slot = jnp.argsort(~kept, axis=-1, stable=True)[..., : min(capacity, layer.capacity)]
    there = jnp.take_along_axis(kept, slot, axis=-1)
    take = lambda x: jnp.take_along_axis(x, slot if x.ndim == 3 else slot[..., None], axis=2)
    wider = lambda x, fill: jnp.pad(
        x, [(0, capacity - slot.shape[-1] if axis == 2 else 0) for axis in range(x.ndim)], constant_values=fill
    )
    return LayerCache(
        k=wider(take(layer.k), 0),
        v=wider(take(layer.v), 0),
        position=wider(jnp.where(there, take(layer.position), EMPTY), EMPTY),
        expiry=wider(jnp.where(there, take(layer.expiry), GONE), GONE),
        score=wider(take(layer.score), 0),
        forced_evictions=layer.forced_evictions,
    )
