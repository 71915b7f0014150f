"""Attention with an evict head: the file to open first to see where DMS enters a decoder.

`AttentionLayer.__call__` serves training and the full-sequence paths: whole rows, soft or hard gates, no cache.
`AttentionLayer.extend` serves inference: a chunk of tokens, or one token when decoding, continues the rows of a cache
under a policy.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Bool, Float, Int

from dms_jax.axes import Array, typed
from dms_jax.config import ModelConfig
from dms_jax.core import eviction
from dms_jax.core.compact_cache import LayerCache
from dms_jax.core.paged_attention import PageOps
from dms_jax.core.rotary import rope, rope_cos_sin
from dms_jax.core.slot_attention import CacheOps, Chunk, expiring_attention
from dms_jax.kernels.attention_api import (
    attend_to_pages,
    attend_to_pairs,
    attend_to_slots,
    decode_update,
    extend_layer,
    extend_pages,
    gated_attention,
    write_pairs,
)
from dms_jax.kernels.dispatch import KernelQuery, is_available
from dms_jax.models.layers import EvictParam, ParamFactory, rms_norm, unit_rms
from dms_jax.policies.cache_policy import CachePolicy, FusedRule
from dms_jax.sharding import constrain, gather_for_matmul, num_shards, reshard

# Evict logits [B K T] -> (the log_keep that attention adds to each *pair's* scores outside the window, each *token's*
# decision). Instead of log_keep, a gate may return the last query that sees each pair, int32 [B K T].
Gate = Callable[[Float[Array, "B K T"]], tuple[Float[Array, "B K T"], Array]]


class ChannelScale(NamedTuple):
    """Factors of the borrowed query channel at three points; RoPE mixes it with another channel, hence `after_rope`."""

    before_norm: float | Float[Array, ""]
    before_rope: float | Float[Array, ""]
    after_rope: float | Float[Array, ""]


UNTOUCHED = ChannelScale(1.0, 1.0, 1.0)
CHANNEL_SCALES = {"none": UNTOUCHED, "pre": ChannelScale(1.0, 0.0, 1.0), "pre+post": ChannelScale(1.0, 0.0, 0.0)}


def channel_scale(config: ModelConfig) -> ChannelScale:
    """Return how a trained model scales its borrowed channel; a model without one leaves its queries unchanged."""
    dms = config.dms
    return CHANNEL_SCALES[dms.zero_borrowed] if dms is not None and dms.variant == "borrowed" else UNTOUCHED


def cache_ops(config: ModelConfig, policy: CachePolicy, cache: LayerCache, length: int, dtype: jnp.dtype) -> CacheOps:
    """Choose the functions that attend and write for chunks of `length` tokens, with queries of `dtype`."""
    implementation, rule, fused_step = config.implementation, policy.fused_rule(), None
    query = KernelQuery(config.head_dim, dtype, cache.k.dtype, cache.capacity)
    if length == 1 and rule is not None and is_available("decode_update", query, implementation):
        fused_step = partial(_fused_step, rule, implementation)
    return CacheOps(
        partial(attend_to_slots, implementation=implementation),
        partial(write_pairs, implementation=implementation),
        fused_step,
    )


def page_ops(config: ModelConfig) -> PageOps:
    """Choose the functions that attend to a cache in pages."""
    return PageOps(
        partial(attend_to_pages, implementation=config.implementation),
        partial(attend_to_pairs, implementation=config.implementation),
    )


def _fused_step(
    rule: FusedRule,
    implementation: str,
    q: Float[Array, "B 1 N H"],
    k: Float[Array, "B 1 K H"],
    v: Float[Array, "B 1 K H"],
    logits: Float[Array, "B K 1"],
    cache: LayerCache,
    chunk: Chunk,
    frequency: Float[Array, "half"],
) -> tuple[Float[Array, "B 1 N H"], LayerCache]:
    """Rotate, decide and write one token per row in one kernel. Return the rotated queries and the updated cache."""
    logits, seen = eviction.share_heads(logits, rule.granularity), chunk.position[:, 0]
    q, cache = decode_update(
        q[:, 0],
        k[:, 0],
        v[:, 0],
        *rope_cos_sin(seen, frequency),
        logits[..., 0],
        cache,
        seen,
        chunk.count,
        chunk.threshold,
        window_size=rule.window_size,
        decision_shift=rule.decision_shift,
        implementation=implementation,
    )
    return q[:, None], cache


class AttentionLayer(nnx.Module):
    """Grouped-query attention with an evict head. Weights are stacked [L ...]; methods run with one layer's slice."""

    # The evict head of the projection variant (`ParamFactory.evict_head`).
    evict_norm: EvictParam
    evict_proj: EvictParam
    evict_bias: EvictParam  # with `o_bias`
    evict_units_in: EvictParam  # these three with `head_units`
    evict_units_bias: EvictParam
    evict_units_out: EvictParam

    def __init__(self, config: ModelConfig, param: ParamFactory):
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
        for name, value in param.evict_head().items():
            setattr(self, name, value)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        normed: Float[Array, "B T D"],
        gate: Gate,
        window_size: int | None,
        channel: ChannelScale,
        position: Int[Array, "#B T"],
        frequency: Float[Array, "half"],
        segment_ids: Int[Array, "B T"] | None,
    ) -> tuple[Float[Array, "B T D"], Array]:
        """Attend within whole rows. Return the attention output and each token's decision [B K T].

        `x` is the residual stream and `normed` its RMSNorm; under a mesh, T is sharded along "sequence" outside
        attention. A `window_size` of None means that the gate returns expiries, not `log_keep`.
        """
        q, k, v = self.project_for_training(normed, channel)
        logits = self.evict_logits_for_training(x, q)
        q, k = self._rotated(q, k, channel, position, frequency)
        q = constrain(q, "batch", "sequence", "q_heads", "head_dim")
        k, v = (constrain(a, "batch", "sequence", "kv_heads", "head_dim") for a in (k, v))
        # The gate shifts decisions by one token, so each device needs whole rows of logits. It gets those of its own
        # heads, as in attention, or of all heads if they do not divide evenly.
        heads = "heads" if logits.shape[1] % num_shards("heads") == 0 else None
        log_keep, decision = gate(constrain(logits, "batch", heads, None))
        with jax.named_scope("attention"):
            if window_size is None:
                return self.output(expiring_attention(q, k, v, log_keep)), decision
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
        cache: Any,
        policy: CachePolicy,
        chunk: Chunk,
        channel: ChannelScale,
        frequency: Float[Array, "half"],
    ) -> tuple[Float[Array, "B T D"], Any]:
        """Attend from a chunk to the cache and to the chunk itself. Return the output and the updated cache.

        The cache of a layer is a `LayerCache` or a `PagedLayer`.
        """
        ops = None
        if isinstance(cache, LayerCache):
            ops = cache_ops(self.config, policy, cache, normed.shape[1], normed.dtype)
        q, k, v = self.project(normed, channel)
        logits = self.evict_logits(x, q)
        if ops is None or ops.fused_step is None:
            q, k = self._rotated(q, k, channel, chunk.position, frequency)
            q = constrain(q, "batch", None, "q_heads", "head_dim")
            k, v = (constrain(a, "batch", None, "kv_heads", "head_dim").swapaxes(1, 2) for a in (k, v))
            expiries = policy.mark(logits, chunk.position, chunk.count, chunk.threshold)
            if ops is None:
                out, cache = extend_pages(cache, q, k, v, expiries, chunk, page_ops(self.config))
            else:
                out, cache = extend_layer(cache, q, k, v, expiries, chunk, policy, ops)
        else:  # one kernel does all stages except attention
            with jax.named_scope("append"):
                q = self._scale_borrowed(q, channel.before_rope)
                q, cache = ops.fused_step(q, k, v, logits, cache, chunk, frequency)
                q = self._scale_borrowed(q, channel.after_rope)
            with jax.named_scope("attention"):
                out = ops.attend(q, cache, chunk.position, None)
        return self.output(out), cache

    @jax.named_scope("qkv")
    def project(
        self, normed: Float[Array, "B T D"], channel: ChannelScale
    ) -> tuple[Float[Array, "B T N H"], Float[Array, "B T K H"], Float[Array, "B T K H"]]:
        """Return queries, keys and values before RoPE."""
        return self._project(normed, normed, channel)

    @jax.named_scope("qkv")
    def project_for_training(
        self, normed: Float[Array, "B T D"], channel: ChannelScale
    ) -> tuple[Float[Array, "B T N H"], Float[Array, "B T K H"], Float[Array, "B T K H"]]:
        """Return `project(normed, channel)` for `normed` sharded along T, gathered for each device's own heads."""
        for_q = gather_for_matmul(normed, "q_heads", self.q[...].shape[1])
        for_kv = gather_for_matmul(normed, "kv_heads", self.k[...].shape[1])
        return self._project(for_q, for_kv, channel)

    def _project(self, for_q: Array, for_kv: Array, channel: ChannelScale) -> tuple[Array, Array, Array]:
        q, k, v = (
            jnp.einsum("btd,dnh->btnh", rows, w[...])
            for rows, w in ((for_q, self.q), (for_kv, self.k), (for_kv, self.v))
        )
        if self.config.qkv_bias:
            q, k, v = q + self.q_bias[None, None], k + self.k_bias[None, None], v + self.v_bias[None, None]
        q = self._scale_borrowed(q, channel.before_norm)
        if self.config.qk_norm:
            q = rms_norm(q, self.q_norm[...], self.config.rms_norm_eps)
            k = rms_norm(k, self.k_norm[...], self.config.rms_norm_eps)
        return q, k, v

    @jax.named_scope("evict_head")
    def evict_logits(self, x: Float[Array, "B T D"], q: Float[Array, "B T N H"]) -> Float[Array, "B K T"]:
        """Return each token's own decision score, fp32; > 0 evicts.

        The projection variant reads it from the residual stream `x` before the input norm, the borrowed variant from a
        channel of `q`, after the query norm and before RoPE. A plain model gets zeros.
        """
        dms = self.config.dms
        if dms is None:
            return jnp.zeros((x.shape[0], self.config.num_kv_heads, x.shape[1]), jnp.float32)
        if dms.variant == "borrowed":
            return self._scaled_logits(q[:, :, :: self.config.group_size, -1])
        return self._logits_of_stream(x, lambda weights: weights, lambda raw: raw)

    def evict_logits_for_training(self, x: Float[Array, "B T D"], q: Float[Array, "B T N H"]) -> Float[Array, "B K T"]:
        """Return `evict_logits(x, q)` for `x` sharded along T.

        Each device computes the logits of all heads for its own tokens, because logits are smaller than the residual
        stream that would have to be gathered.
        """
        dms = self.config.dms
        if dms is None or dms.variant == "borrowed":
            return self.evict_logits(x, q)
        with jax.named_scope("evict_head"):
            return self._logits_of_stream(
                x,
                lambda weights: reshard(weights, (None, None), (None, "kv_heads")),
                lambda raw: constrain(raw, "batch", "sequence", None),
            )

    def _logits_of_stream(self, x: Float[Array, "B T D"], gather: Callable, split: Callable) -> Float[Array, "B K T"]:
        """Return the logits of the projection variant: a linear map of x / rms(x), plus an MLP if it has hidden units.

        `gather` fetches weights [D K] or [U K] that are sharded over heads; `split` shards products [B T K] or [B T U].
        """
        u = unit_rms(x, self.config.rms_norm_eps).astype(self.evict_norm[...].dtype)
        # Multiply the projection by the norm's weight, instead of every token: equal, but with a cheaper gradient.
        raw = split(u @ gather(self.evict_norm[...][:, None] * self.evict_proj[...]))
        if self.config.o_bias:
            raw = raw + self.evict_bias[None, None]
        if self.config.require_dms().head_units:
            units = jax.nn.silu(split(u @ self.evict_units_in[...]) + self.evict_units_bias[None, None])
            raw = raw + split(units @ gather(self.evict_units_out[...]))
        return self._scaled_logits(raw)

    def _scaled_logits(self, raw: Float[Array, "B T K"]) -> Float[Array, "B K T"]:
        dms = self.config.require_dms()
        return eviction.evict_logits(raw.transpose(0, 2, 1), dms.evict_logit_scale, dms.evict_logit_bias)

    @jax.named_scope("rope")
    def _rotated(
        self, q: Array, k: Array, channel: ChannelScale, position: Int[Array, "#B T"], frequency: Float[Array, "half"]
    ) -> tuple[Float[Array, "B T N H"], Float[Array, "B T K H"]]:
        """Return queries and keys after RoPE, with the borrowed channel of the queries scaled before and after it."""
        q = self._scale_borrowed(q, channel.before_rope)
        q = self._scale_borrowed(rope(q, position, frequency), channel.after_rope)
        return q, rope(k, position, frequency)

    @jax.named_scope("output")
    def output(self, heads: Float[Array, "B T N H"]) -> Float[Array, "B T D"]:
        """Project the heads back to the residual stream."""
        # One product over n*h, because XLA would transpose, and thus copy, the weights for an einsum over both axes.
        out = heads.reshape(*heads.shape[:2], -1) @ self.o[...].reshape(-1, self.config.hidden_size)
        return out + self.o_bias[None, None] if self.config.o_bias else out

    def _scale_borrowed(self, q: Float[Array, "B T N H"], scale: float | Float[Array, ""]) -> Float[Array, "B T N H"]:
        """Multiply the borrowed channel, the last one of the first query head of each group."""
        if isinstance(scale, float) and scale == 1.0:
            return q
        first_of_group = jnp.arange(q.shape[2]) % self.config.group_size == 0
        borrowed = first_of_group[:, None] & (jnp.arange(q.shape[3])[None] == q.shape[3] - 1)
        return jnp.where(borrowed[None, None], (q * scale).astype(q.dtype), q)


@typed
def keep_all(logits: Float[Array, "B K T"]) -> tuple[Float[Array, "B K T"], Bool[Array, "B K T"]]:
    """Return the gate of the dense model, which evicts nothing."""
    return jnp.zeros_like(logits), jnp.zeros(logits.shape, bool)
