"""Attention with an evict head: the file to open first to see where DMS enters a decoder."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Bool, Float, Int

from dms_jax.axes import Array, typed
from dms_jax.config import ModelConfig
from dms_jax.core import eviction, slot_attention
from dms_jax.core.compact_cache import LayerCache
from dms_jax.core.rotary import rope, turns
from dms_jax.kernels.attention_api import attend_to_slots, decode_update, extend_layer, gated_attention, write_pairs
from dms_jax.kernels.dispatch import KernelQuery, is_available
from dms_jax.models.layers import EvictParam, rms_norm, unit_rms
from dms_jax.policies.cache_policy import CachePolicy
from dms_jax.policies.keep_all import KeepAll
from dms_jax.policies.learned_eviction import LearnedEviction
from dms_jax.sharding import constrain, reshard, to_split, ways

# Evict logits of a layer [B K T] -> what attention adds outside the window for each *pair*, and each *token's* decision.
Gate = Callable[[Float[Array, "B K T"]], tuple[Float[Array, "B K T"], Array]]


class ChannelScale(NamedTuple):
    """What multiplies the borrowed query channel: before the query norm, before RoPE, after RoPE (which mixes it anew)."""

    before_norm: float | Float[Array, ""]
    before_rope: float | Float[Array, ""]
    after_rope: float | Float[Array, ""]


UNTOUCHED = ChannelScale(1.0, 1.0, 1.0)
CHANNEL_SCALES = {"none": UNTOUCHED, "pre": ChannelScale(1.0, 0.0, 1.0), "pre+post": ChannelScale(1.0, 0.0, 0.0)}


def channel_scale(config: ModelConfig) -> ChannelScale:
    """What a trained model does to its borrowed channel, if it has one."""
    dms = config.dms
    return CHANNEL_SCALES[dms.zero_borrowed] if dms is not None and dms.variant == "borrowed" else UNTOUCHED


class Chunk(NamedTuple):
    """Where the tokens of a chunk stand: each row goes on from the tokens it has seen, its first `count` tokens are real."""

    position: Int[Array, "B T"]
    count: Int[Array, "B"]
    threshold: float | Float[Array, ""]  # a token evicts iff its logit exceeds it


class AttentionLayer(nnx.Module):
    """Grouped-query attention under a gate; weights stacked over layers, called with one layer's slice."""

    def __init__(self, config: ModelConfig, param: Callable[..., nnx.Param]):
        self.config = config
        self.q = param("layers", "embed", "q_heads", "head_dim")
        self.k, self.v = (param("layers", "embed", "kv_heads", "head_dim") for _ in "kv")
        self.o = param("layers", "q_heads", "head_dim", "embed")
        if config.qkv_bias:
            self.q_bias = param("layers", "q_heads", "head_dim", fill=0.0)
            self.k_bias, self.v_bias = (param("layers", "kv_heads", "head_dim", fill=0.0) for _ in "kv")
        if config.o_bias:
            self.o_bias = param("layers", "embed", fill=0.0)
        if config.qk_norm:
            self.q_norm, self.k_norm = (param("layers", "head_dim", fill=1.0) for _ in "qk")
        if config.dms is not None and config.dms.variant == "projection":
            # Zero weights: every logit starts at -bias, so the untrained student keeps (almost) everything.
            self.evict_norm = param("layers", "embed", fill=1.0, kind=EvictParam)
            self.evict_proj = param("layers", "embed", "kv_heads", fill=0.0, kind=EvictParam)
            if config.o_bias:  # Model-Optimizer ties the bias of the evict head to `attention_bias`
                self.evict_bias = param("layers", "kv_heads", fill=0.0, kind=EvictParam)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        normed: Float[Array, "B T D"],
        gate: Gate,
        window_size: int,
        channel: ChannelScale,
        position: Int[Array, "#B T"],
        frequency: Float[Array, "half"],
        segment_ids: Int[Array, "B T"] | None,
    ) -> tuple[Float[Array, "B T D"], Array]:
        """Attention output and each token's decision [B K T]. `x` is the residual stream, `normed` its RMSNorm."""
        q, k, v, logits = self.heads(x, normed, channel, position, frequency, "sequence")
        # Whole rows of some heads, as in attention, or of all: what a token decides about its neighbour stays on one device.
        log_keep, decision = gate(
            constrain(logits, "batch", "heads" if logits.shape[1] % ways("heads") == 0 else None, None)
        )
        out = gated_attention(
            q,
            k,
            v,
            log_keep,
            window_size=window_size,
            segment_ids=segment_ids,
            implementation=self.config.implementation,
        )
        return self.output(out), decision

    def extend(
        self,
        x: Float[Array, "B T D"],
        normed: Float[Array, "B T D"],
        cache: LayerCache,
        policy: CachePolicy,
        chunk: Chunk,
        channel: ChannelScale,
        frequency: Float[Array, "half"],
    ) -> tuple[Float[Array, "B T D"], LayerCache]:
        """The same for a chunk that continues the rows of a cache, and the cache after it."""
        if (
            normed.shape[1] == 1
            and type(policy) in (LearnedEviction, KeepAll)
            and self._updates_in_one_kernel(cache, normed.dtype)
        ):
            return self._extend_by_one(x, normed, cache, policy, chunk, channel, frequency)
        q, k, v, logits = self.heads(x, normed, channel, chunk.position, frequency)
        expiries = policy.mark(logits, chunk.position, chunk.count, chunk.threshold)
        k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
        implementation = self.config.implementation
        if type(policy).read is CachePolicy.read and type(policy).select is CachePolicy.select:
            out, cache = extend_layer(
                cache, q, k, v, expiries, chunk.position, chunk.count, policy.window_size, implementation
            )
        else:
            out, cache = slot_attention.extend_layer(
                cache,
                q,
                k,
                v,
                expiries,
                chunk.position,
                chunk.count,
                policy.window_size,
                read=lambda settled: policy.read(q, settled, chunk.position),
                choose=lambda settled: policy.select(q, k, expiries, settled, chunk.position, chunk.count),
                attend=partial(attend_to_slots, implementation=implementation),
                write_pairs=partial(write_pairs, implementation=implementation),
            )
        return self.output(out), cache

    def _updates_in_one_kernel(self, cache: LayerCache, dtype: jnp.dtype) -> bool:
        """The kernel knows two policies; for others, and without it, a decode step is composed of its parts."""
        return is_available(
            "decode_update",
            KernelQuery(self.config.head_dim, dtype, cache.k.dtype, cache.capacity),
            self.config.implementation,
        )

    def _extend_by_one(
        self,
        x: Array,
        normed: Array,
        cache: LayerCache,
        policy: CachePolicy,
        chunk: Chunk,
        channel: ChannelScale,
        frequency: Array,
    ) -> tuple[Float[Array, "B 1 D"], LayerCache]:
        """A decode step whose rotation, decision, slot selection and write are one kernel."""
        q, k, v = self.project(normed, channel)
        logits, shift = self.evict_logits(x, q), None
        if isinstance(policy, LearnedEviction):
            logits, shift = eviction.share_heads(logits, policy.dms.granularity), policy.dms.decision_shift
        q = self._scale_borrowed(q, channel.before_rope)
        seen, implementation = chunk.position[:, 0], self.config.implementation
        q, cache = decode_update(
            q[:, 0],
            k[:, 0],
            v[:, 0],
            *turns(seen, frequency),
            logits[..., 0],
            cache,
            seen,
            chunk.count,
            chunk.threshold,
            window_size=policy.window_size,
            decision_shift=shift,
            implementation=implementation,
        )
        q = self._scale_borrowed(q[:, None], channel.after_rope)
        return self.output(attend_to_slots(q, cache, chunk.position, None, implementation=implementation)), cache

    def heads(
        self,
        x: Float[Array, "B T D"],
        normed: Float[Array, "B T D"],
        channel: ChannelScale,
        position: Array,
        frequency: Array,
        length: str | None = None,
    ) -> tuple[Array, Array, Array, Array]:
        """Queries [B T N H] and keys [B T K H] after RoPE, values [B T K H], evict logits [B K T]. `length` is the logical axis of T."""
        q, k, v = self.project(normed, channel, length)
        logits = self.evict_logits(x, q, length)
        q = self._scale_borrowed(
            rope(self._scale_borrowed(q, channel.before_rope), position, frequency), channel.after_rope
        )
        return (
            constrain(q, "batch", length, "q_heads", "head_dim"),
            constrain(rope(k, position, frequency), "batch", length, "kv_heads", "head_dim"),
            constrain(v, "batch", length, "kv_heads", "head_dim"),
            logits,
        )

    def output(self, heads: Float[Array, "B T N H"]) -> Float[Array, "B T D"]:
        # As one product over n*h: an einsum over both would have XLA transpose, that is copy, the weights at every call.
        out = heads.reshape(*heads.shape[:2], -1) @ self.o[...].reshape(-1, self.config.hidden_size)
        return out + self.o_bias[...] if self.config.o_bias else out

    def project(
        self, normed: Float[Array, "B T D"], channel: ChannelScale, length: str | None = None
    ) -> tuple[Array, Array, Array]:
        """Queries [B T N H], keys and values [B T K H] before RoPE."""
        for_q, for_kv = normed, normed
        if length is not None:
            for_q, for_kv = (
                to_split(normed, axis, w[...].shape[1]) for axis, w in (("q_heads", self.q), ("kv_heads", self.k))
            )
        q, k, v = (
            jnp.einsum("btd,dnh->btnh", rows, w[...])
            for rows, w in ((for_q, self.q), (for_kv, self.k), (for_kv, self.v))
        )
        if self.config.qkv_bias:
            q, k, v = q + self.q_bias[...], k + self.k_bias[...], v + self.v_bias[...]
        q = self._scale_borrowed(q, channel.before_norm)
        if self.config.qk_norm:
            q, k = (
                rms_norm(q, self.q_norm[...], self.config.rms_norm_eps),
                rms_norm(k, self.k_norm[...], self.config.rms_norm_eps),
            )
        return q, k, v

    def evict_logits(
        self, x: Float[Array, "B T D"], q: Float[Array, "B T N H"], length: str | None = None
    ) -> Float[Array, "B K T"]:
        """Each token's own decision score, fp32, > 0 evicts: read from the residual stream before the input norm
        (projection) or from the borrowed channel after the query norm and before RoPE. `length` is the logical axis of T."""
        dms = self.config.dms
        if dms is None:
            return jnp.zeros((x.shape[0], self.config.num_kv_heads, x.shape[1]), jnp.float32)
        if dms.variant == "borrowed":
            raw = q[:, :, :: self.config.group_size, -1]
        else:
            # The norm's weight multiplies the projection, not every token: the same product, and a cheaper gradient.
            weights = self.evict_norm[...][:, None] * self.evict_proj[...]
            if (
                length is not None
            ):  # all heads of a device's own tokens: logits are smaller than the stream they are read from
                weights = reshard(weights, (None, None), (None, "kv_heads"))
            raw = unit_rms(x, self.config.rms_norm_eps) @ weights
            if length is not None:
                raw = constrain(raw, "batch", length, None)
            if self.config.o_bias:
                raw = raw + self.evict_bias[...]
        return eviction.evict_logits(raw.transpose(0, 2, 1), dms.evict_logit_scale, dms.evict_logit_bias)

    def _scale_borrowed(self, q: Float[Array, "B T N H"], scale: float | Float[Array, ""]) -> Float[Array, "B T N H"]:
        """Multiply the last channel of the first query head of each group."""
        if isinstance(scale, float) and scale == 1.0:
            return q
        first_of_group = jnp.arange(q.shape[2]) % self.config.group_size == 0
        borrowed = first_of_group[:, None] & (jnp.arange(q.shape[3]) == q.shape[3] - 1)
        return jnp.where(borrowed, (q * scale).astype(q.dtype), q)


@typed
def keep_all(logits: Float[Array, "B K T"]) -> tuple[Float[Array, "B K T"], Bool[Array, "B K T"]]:
    """The gate of the dense model."""
    return jnp.zeros_like(logits), jnp.zeros(logits.shape, bool)
