"""The protocol of kvpress (github.com/NVIDIA/kvpress): prefill densely, rank once, keep the best.

Decoding then keeps every new pair.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from dms_jax.axes import Array
from dms_jax.config import ModelConfig
from dms_jax.core.compact_cache import EMPTY, NEVER_VISIBLE, CompactCache, LayerCache, Selection
from dms_jax.errors import ConfigError
from dms_jax.policies.budget_policy import BudgetPolicy, Pairs
from dms_jax.policies.cache_policy import FusedRule
from dms_jax.policies.keep_all import KeepAll


@dataclass(frozen=True)
class PromptCompression(KeepAll):
    """Keep every pair until `compress_prompt` is called, and store what `method` needs for its ranking."""

    ranks_pairs: ClassVar[bool] = True
    compresses_prompt: ClassVar[bool] = True
    method: BudgetPolicy

    def __post_init__(self):
        if not isinstance(self.method, BudgetPolicy):
            raise ConfigError(f"{type(self.method).__name__} does not rank pairs, so it cannot compress a prompt")
        if self.method.keeps_prompt:
            raise ConfigError(
                f"{type(self.method).__name__} keeps the prompt, so it cannot compress one; leave out prompt:"
            )

    @property
    def features(self) -> int:
        return self.method.features

    def head_state(self, config: ModelConfig) -> Float[Array, "state"] | None:
        return self.method.head_state(config)

    def fused_rule(self) -> FusedRule | None:
        return None  # the fused step observes no attention

    def select(self, q, k, v, expiries, slots, position, count) -> Selection | None:
        pairs = self.method.pairs_after(q, k, v, expiries, slots, position, count)
        return Selection(pairs.alive, pairs.statistic, pairs.head_state) if self.features else None


def prompt_pairs(layer: LayerCache, seen: Int[Array, "B"]) -> Pairs:
    """Return the pairs of a prefilled layer in the form that methods rank."""
    return Pairs(
        layer.k, layer.position, layer.expiry >= (seen - 1)[:, None, None], layer.statistic, seen - 1, layer.head_state
    )


def compress_prompt(cache: CompactCache, capacity: int | None = None) -> CompactCache:
    """Keep the best `budget` pairs of each layer, row and KV head, after a prefill under `PromptCompression`.

    The buffers of the new cache have `capacity` slots, by default as many as before. From then on, the cache keeps
    every pair. Raises ConfigError for a cache with another policy, and for a capacity below the budget.
    """
    policy = cache.policy
    if not isinstance(policy, PromptCompression):
        raise ConfigError(
            "compress_prompt needs a cache made with policy=PromptCompression(method) or a policy like "
            f"'prompt:tova:256', got one with {type(policy).__name__}"
        )
    most = policy.method.slot_bounds().max
    if capacity is not None and most is not None and capacity < most:
        raise ConfigError(f"capacity must be at least {most}, the pairs of a head under its budget, got {capacity}")
    layers = tuple(_compressed(layer, cache.seen, policy.method, capacity or layer.capacity) for layer in cache.layers)
    return replace(cache, layers=layers, policy=KeepAll()).with_history(cache.history)


@partial(jax.jit, static_argnames=("method", "capacity"))
def _compressed(layer: LayerCache, seen: Int[Array, "B"], method: BudgetPolicy, capacity: int) -> LayerCache:
    pairs = prompt_pairs(layer, seen)
    kept = method.kept(pairs)
    # Kept pairs move to the first slots, in order, so that attention reads live pairs only.
    slot = jnp.argsort(~kept, axis=-1, stable=True)[..., : min(capacity, layer.capacity)]
    filled = jnp.take_along_axis(kept, slot, axis=-1)
    take = lambda x: jnp.take_along_axis(x, slot if x.ndim == 3 else slot[..., None], axis=2)
    wider = lambda x, fill: jnp.pad(
        x, [(0, capacity - slot.shape[-1] if axis == 2 else 0) for axis in range(x.ndim)], constant_values=fill
    )
    return LayerCache(
        k=wider(take(layer.k), 0),
        v=wider(take(layer.v), 0),
        position=wider(jnp.where(filled, take(layer.position), EMPTY), EMPTY),
        expiry=wider(jnp.where(filled, take(layer.expiry), NEVER_VISIBLE), NEVER_VISIBLE),
        score=wider(take(layer.score), 0),
        forced_evictions=layer.forced_evictions,
    )
