"""One decoder for Llama 2/3, Mistral, Qwen 2/2.5 and Qwen 3, which differ by their `ModelConfig` only.

Layers are stacked [L, ...] and scanned. The model holds parameters and no state; eviction decisions are returned as
arrays. `dense`, `relaxed` and `hard` are three functions of the same weights, so a frozen base is its own teacher.

The layers are split into structure and arrays before the scan, and merged inside it. `jax.lax.scan` and
`jax.checkpoint` thus see plain arrays, and the body gets a `Block` of one layer, whose arrays are gathered over the
mesh for that layer alone. Merging happens while tracing, so it costs nothing at run time. `engine.decode_layout` merges
layers in the same way.
"""

from collections.abc import Hashable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Bool, Float, Int

from dms_jax.axes import Array
from dms_jax.config import DMSConfig, ModelConfig
from dms_jax.core import eviction
from dms_jax.core.budget_eviction import budgeted_row_expiry
from dms_jax.core.rotary import rope_frequencies
from dms_jax.core.slot_attention import Chunk
from dms_jax.core.visibility import MASKED, NEVER, segment_bounds
from dms_jax.errors import ConfigError
from dms_jax.models.attention_layer import AttentionLayer, ChannelScale, Gate, channel_scale, keep_all
from dms_jax.models.compiled_method import compiled
from dms_jax.models.layers import MLP, ParamFactory, positions, rms_norm
from dms_jax.models.token_ids import checked_on_host
from dms_jax.policies import policy_name, policy_of
from dms_jax.policies.cache_policy import CachePolicy
from dms_jax.sharding import constrain, reshard

# Activation checkpointing: what each layer saves for its backward pass. Everything else is recomputed.
REMAT = {
    "full": jax.checkpoint_policies.nothing_saveable,  # the residual stream only: least memory
    "matmuls": jax.checkpoint_policies.save_from_both_policies(  # also projections and attention: no matmul runs twice
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        jax.checkpoint_policies.save_only_these_names("attention"),
    ),
}


class Block(nnx.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: ModelConfig, param: ParamFactory):
        self.config = config
        self.attention_norm, self.mlp_norm = (param("layers", "embed", fill=1.0) for _ in range(2))
        self.attention, self.mlp = AttentionLayer(config, param), MLP(config, param)

    def __call__(
        self,
        x: Array,
        gate: Gate,
        window_size: int | None,
        channel: ChannelScale,
        position: Array,
        frequency: Array,
        segment_ids: Array | None,
    ) -> tuple[Array, Array]:
        """Run the block on whole rows, sharded along T; arguments as in `AttentionLayer.__call__`."""
        normed = rms_norm(x, self.attention_norm[...], self.config.rms_norm_eps)
        out, decision = self.attention(x, normed, gate, window_size, channel, position, frequency, segment_ids)
        x = x + constrain(out, "batch", "sequence", None)
        with jax.named_scope("mlp"):
            out = self.mlp.for_training(rms_norm(x, self.mlp_norm[...], self.config.rms_norm_eps))
        return x + constrain(out, "batch", "sequence", None), decision

    def extend(
        self, x: Array, cache: Any, policy: CachePolicy, chunk: Chunk, channel: ChannelScale, frequency: Array
    ) -> tuple[Array, Any]:
        """Run the block on a chunk that continues the rows of a cache; arguments as in `AttentionLayer.extend`."""
        normed = rms_norm(x, self.attention_norm[...], self.config.rms_norm_eps)
        out, cache = self.attention.extend(x, normed, cache, policy, chunk, channel, frequency)
        x = x + constrain(out, "batch", None, None)
        with jax.named_scope("mlp"):
            out = self.mlp(rms_norm(x, self.mlp_norm[...], self.config.rms_norm_eps))
        return x + constrain(out, "batch", None, None), cache


class Decoder(nnx.Module):
    """A causal language model that evicts pairs if `config.dms` is set.

    Every method takes `tokens` int32 [B T] and optionally `segment_ids` int32 [B T]: tokens in different segments of a
    row neither see nor evict each other. A method is compiled at its first call for a shape, unless it is a part of a
    larger program. The `*_hidden` methods return the final-normed hidden states [B T D] instead of logits; training
    multiplies them by `output_embedding` in chunks. Raises ConfigError for what are no rows of token ids.
    """

    source: Hashable  # the `dms_jax.hf.folder.Source` of a loaded model; a model made in memory lacks the attribute

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, dtype: jnp.dtype = jnp.float32):
        param = ParamFactory(config, rngs, dtype)
        self.config = config
        self.embed = param("vocab", "embed")
        self.layers = Block(config, param)
        self.final_norm = param("embed", fill=1.0)
        if not config.tie_word_embeddings:
            self.head = param("vocab", "embed")

    def __repr__(self) -> str:
        """Say in one line what the model is; `flax.nnx.display` shows its arrays."""
        config, weights = self.config, jax.tree.leaves(nnx.state(self))
        path = getattr(getattr(self, "source", None), "path", "")
        return (
            f"Decoder({config.model_type}, {config.num_layers} layers x {config.num_kv_heads} KV heads, "
            f"{sum(weight.size for weight in weights):,} parameters, {self.embed.get_value().dtype}, "
            f"policy {policy_name(policy_of(config))}{path and f', from {path}'})"
        )

    __str__ = __repr__

    @compiled
    def dense(self, tokens: Int[Array, "B T"], segment_ids: Int[Array, "B T"] | None = None) -> Float[Array, "B T V"]:
        """Return the logits of the model that never evicts, which is the teacher of an adapter."""
        return self.logits(self.dense_hidden(tokens, segment_ids))

    @compiled
    def relaxed(
        self, tokens: Int[Array, "B T"], noise: Float[Array, "L B K T"], segment_ids: Int[Array, "B T"] | None = None
    ) -> tuple[Float[Array, "B T V"], Float[Array, "L B K T"]]:
        """Return logits under soft gates, and each token's straight-through decision, 0 or 1: the training path.

        `noise` is logistic, as `core.eviction.logistic_noise` draws it.
        """
        hidden, evict = self.relaxed_hidden(tokens, noise, segment_ids)
        return self.logits(hidden), evict

    @compiled
    def hard(
        self,
        tokens: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"] | None = None,
        threshold: float | Float[Array, ""] = 0.0,
    ) -> tuple[Float[Array, "B T V"], Bool[Array, "L B K T"]]:
        """Return logits under hard decisions, and the decisions: the full-sequence oracle of inference.

        Decisions are unshifted: entry t is the decision of token t, which evicts iff its logit exceeds `threshold`.
        """
        hidden, evict = self.hard_hidden(tokens, segment_ids, threshold)
        return self.logits(hidden), evict

    @compiled
    def dense_hidden(
        self, tokens: Int[Array, "B T"], segment_ids: Int[Array, "B T"] | None = None
    ) -> Float[Array, "B T D"]:
        """Return the hidden states of `dense`."""
        return self._run(tokens, segment_ids, lambda _: keep_all, 0, self._channel())[0]

    @compiled
    def relaxed_hidden(
        self,
        tokens: Int[Array, "B T"],
        noise: Float[Array, "L B K T"],
        segment_ids: Int[Array, "B T"] | None = None,
        remat: str = "full",
    ) -> tuple[Float[Array, "B T D"], Float[Array, "L B K T"]]:
        """Return the hidden states and decisions of `relaxed`. `remat` is a key of `REMAT`, or "none" to save all."""
        hidden, (evict, _) = self._relaxed(tokens, noise, segment_ids, remat)
        return hidden, evict

    @compiled
    def relaxed_scores(
        self,
        tokens: Int[Array, "B T"],
        noise: Float[Array, "L B K T"],
        segment_ids: Int[Array, "B T"] | None = None,
        remat: str = "full",
    ) -> tuple[Float[Array, "B T D"], Float[Array, "L B K T"], Float[Array, "L B K T"]]:
        """Return the hidden states and decisions of `relaxed`, and each token's evict logit without the noise."""
        hidden, (evict, logits) = self._relaxed(tokens, noise, segment_ids, remat)
        return hidden, evict, jax.lax.stop_gradient(logits)

    def _relaxed(self, tokens, noise, segment_ids, remat):
        """Return hidden states, and (decisions, evict logits) of each token [L B K T]."""
        dms = self.config.require_dms()

        def gate_of(layer_noise):
            def gate(logits):
                z = eviction.share_heads(eviction.relax(logits, layer_noise, dms.tau), dms.granularity)
                pair_log_keep = eviction.log_keep(eviction.align_to_pairs(z, dms.decision_shift, 0.0))
                return pair_log_keep, (eviction.straight_through(z), eviction.share_heads(logits, dms.granularity))

            return gate

        return self._run(tokens, segment_ids, gate_of, dms.window_size, self._channel(), noise, remat)

    @compiled
    def hard_hidden(
        self,
        tokens: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"] | None = None,
        threshold: float | Float[Array, ""] = 0.0,
    ) -> tuple[Float[Array, "B T D"], Bool[Array, "L B K T"]]:
        """Return the hidden states and decisions of `hard`."""
        hidden, (evict, _) = self._hard(tokens, segment_ids, threshold)
        return hidden, evict

    @compiled
    def hard_scores(
        self,
        tokens: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"] | None = None,
        threshold: float | Float[Array, ""] = 0.0,
    ) -> Float[Array, "L B K T"]:
        """Return each token's own evict logit in `hard`.

        It depends on `threshold`, because eviction in a lower layer changes the logits of the layers above.
        """
        return self._hard(tokens, segment_ids, threshold)[1][1]

    def _hard(self, tokens, segment_ids, threshold):
        """Return hidden states, and (decisions, evict logits) of each token [L B K T]."""
        dms = self.config.require_dms()

        def gate(logits):
            evict = eviction.decide(logits, dms.granularity, threshold)
            log_keep = _hard_log_keep(eviction.align_to_pairs(evict, dms.decision_shift, False))
            return log_keep, (evict, eviction.share_heads(logits, dms.granularity))

        return self._run(tokens, segment_ids, lambda _: gate, dms.window_size, self._channel())

    @compiled
    def budgeted_hidden(
        self,
        tokens: Int[Array, "B T"],
        budgets: Int[Array, "L K"],
        segment_ids: Int[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T D"], Int[Array, "L B K T"], Float[Array, "L B K T"]]:
        """Return the hidden states under exact budgets of live pairs, and each pair's expiry and evict logit.

        This is the full-sequence oracle of the policy `dms_budget`. Pairs that stay until their segment ends have the
        expiry NEVER. `core.budget_eviction` says which pairs leave.
        """
        dms = self.config.require_dms()

        def gate_of(budget):
            def gate(logits):
                score = eviction.share_heads(logits, dms.granularity)
                score = eviction.align_to_pairs(score, dms.decision_shift, 0.0)
                budget_of_rows = jnp.broadcast_to(budget[None], score.shape[:2])
                expiry = budgeted_row_expiry(score, budget_of_rows, dms.window_size, segment_ids)
                if segment_ids is None:
                    return expiry, (expiry, score)
                end = segment_bounds(segment_ids)[1][:, None]
                return jnp.minimum(expiry, end), (jnp.where(expiry < end, expiry, NEVER), score)

            return gate

        hidden, (expiry, score) = self._run(tokens, segment_ids, gate_of, None, self._channel(), budgets)
        return hidden, expiry, score

    @compiled
    def marked_hidden(
        self,
        tokens: Int[Array, "B T"],
        marked: Bool[Array, "T"],
        window_size: int,
        segment_ids: Int[Array, "B T"] | None = None,
    ) -> Float[Array, "B T D"]:
        """Return the hidden states of the base model under a policy that looks at positions only.

        The `marked` pairs leave every head `window_size` steps after they were added. A sliding window with attention
        sinks is such a policy.
        """
        gate = lambda logits: (jnp.broadcast_to(_hard_log_keep(marked), logits.shape), jnp.zeros(logits.shape, bool))
        return self._run(tokens, segment_ids, lambda _: gate, window_size, self._channel())[0]

    @compiled
    def gated_hidden(
        self,
        tokens: Int[Array, "B T"],
        log_keep: Float[Array, "L B K T"],
        segment_ids: Int[Array, "B T"] | None = None,
        remat: str = "full",
    ) -> tuple[Float[Array, "B T D"], Float[Array, "L B T D"]]:
        """Return the hidden states under given gates, and the residual stream that enters each layer.

        `log_keep` is added to the score of each pair outside the window, so 0 gives the hidden states of `dense`.
        `remat` is as in `relaxed_hidden`.
        """
        gate_of = lambda layer_log_keep: lambda logits: (layer_log_keep, jnp.zeros((), bool))
        window_size = self.config.require_dms().window_size
        hidden, (_, stream) = self._run(
            tokens, segment_ids, gate_of, window_size, self._channel(), log_keep, remat, with_stream=True
        )
        return hidden, stream

    @compiled
    def ramped_hidden(
        self,
        tokens: Int[Array, "B T"],
        channel_scale: Float[Array, ""],
        segment_ids: Int[Array, "B T"] | None = None,
        remat: str = "full",
    ) -> Float[Array, "B T D"]:
        """Return the hidden states of `dense` with the borrowed channel multiplied by `channel_scale`.

        The factor applies before the query norm and after RoPE. At 0, the weights of the channel have no effect and may
        be set to 0 (`free_borrowed_channel`).
        """
        channel = ChannelScale(channel_scale, 1.0, channel_scale)
        return self._run(tokens, segment_ids, lambda _: keep_all, 0, channel, remat=remat)[0]

    def output_embedding(self) -> Float[Array, "V D"]:
        """Return the matrix that turns hidden states into logits."""
        return self.embed[...] if self.config.tie_word_embeddings else self.head[...]

    def logits(self, hidden: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """Return the logits of final-normed hidden states, fp32."""
        return jnp.einsum("btd,vd->btv", hidden, self.output_embedding(), preferred_element_type=jnp.float32)

    def _channel(self) -> ChannelScale:
        return channel_scale(self.config)

    def _run(
        self, tokens, segment_ids, gate_of, window_size, channel, per_layer=None, remat="none", *, with_stream=False
    ):
        """Scan the layers over whole rows. Return the final-normed hidden states, and the decisions of all layers.

        `gate_of(layer_input)` makes a layer's `Gate`; `per_layer` [L ...] holds those inputs. `remat` as in
        `relaxed_hidden`. `with_stream` returns (decisions, residual stream at each layer's input) for the decisions.
        """
        tokens = jnp.asarray(checked_on_host(tokens, self.config.vocab_size))
        segment_ids = None if segment_ids is None else jnp.asarray(segment_ids)
        limit = self.config.sliding_window
        if limit is not None and tokens.shape[1] > limit:
            raise ConfigError(
                f"rows must have at most {limit} tokens, this model's sliding_window, got {tokens.shape[1]}; "
                f"use length <= {limit}"
            )
        if segment_ids is not None:
            # Attention and positions need whole rows of segment ids, which take only a few bytes per token.
            segment_ids = constrain(segment_ids, "batch", None)
        frequency, position = rope_frequencies(self.config), positions(tokens.shape[1], segment_ids)
        graph, weights = nnx.split(self.layers)

        def block(x, layer):
            layer_weights, layer_input = layer
            merged = nnx.merge(graph, _gathered(layer_weights))  # this module's docstring says why
            out, decision = merged(x, gate_of(layer_input), window_size, channel, position, frequency, segment_ids)
            return out, (decision, x) if with_stream else decision

        if remat != "none":
            block = jax.checkpoint(block, policy=REMAT[remat], prevent_cse=False)
        x = constrain(self.embed[...][tokens], "batch", "sequence", None)
        x, decisions = jax.lax.scan(block, x, (weights, jax.tree.map(jnp.asarray, per_layer)))
        return rms_norm(x, self.final_norm[...], self.config.rms_norm_eps), decisions


def _gathered(weights: nnx.State) -> nnx.State:
    """All-gather one layer's fully sharded weights for its matmuls; their gradients are reduce-scattered back."""

    def gather(variable: nnx.Variable) -> nnx.Variable:
        axes = variable.get_metadata("axes")[1:]
        return variable.replace(
            reshard(variable.get_value(), tuple(None if axis == "embed" else axis for axis in axes), axes)
        )

    return jax.tree.map(gather, weights, is_leaf=lambda x: isinstance(x, nnx.Variable))


def _hard_log_keep(marked: Bool[Array, "*A"]) -> Float[Array, "*A"]:
    return jnp.where(marked, MASKED, 0.0)


def free_borrowed_channel(model: Decoder) -> None:
    """Set the borrowed channels of the query projection to 0, in place.

    After the ramp, this changes no output, and the second phase of training starts from logits of exactly -bias.
    """
    group = model.config.group_size
    attention = model.layers.attention
    attention.q[...] = attention.q[...].at[:, :, ::group, -1].set(0.0)
    if model.config.qkv_bias:
        attention.q_bias[...] = attention.q_bias[...].at[:, ::group, -1].set(0.0)


def fold_threshold(model: Decoder, threshold: float) -> None:
    """Fold `threshold` into the bias of the evict logits, in place: a logit that exceeded it now exceeds 0."""
    dms = model.config.require_dms()
    _reconfigure(model, replace(dms, evict_logit_bias=dms.evict_logit_bias + threshold))


def with_window(model: Decoder, window_size: int) -> Decoder:
    """Return a model with the same weights and another `window_size`."""
    if model.config.require_dms().window_size == window_size:
        return model
    other = nnx.merge(*nnx.split(model))
    _reconfigure(other, replace(model.config.require_dms(), window_size=window_size))
    return other


def _reconfigure(model: Decoder, dms: DMSConfig) -> None:
    for module in (model, model.layers, model.layers.attention):
        module.config = model.config.with_dms(dms)
