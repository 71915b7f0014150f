"""From raw eviction scores to gates. Pure arrays; fp32 throughout. Equations: DMS, arXiv:2506.05345; Model-Optimizer `core.py`."""

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from dms_jax.axes import Array, typed


@typed
def evict_logits(raw: Float[Array, "*A"], scale: float, bias: float) -> Float[Array, "*A"]:
    """The decision score; > 0 means evict. `bias` is subtracted, so an untrained head (raw = 0) keeps everything."""
    return scale * raw.astype(jnp.float32) - bias


@typed
def share_heads(decision: Float[Array, "B K T"], granularity: str) -> Float[Array, "B K T"]:
    """ "head": each KV head decides for itself; "layer": head 0 decides for all."""
    return jnp.broadcast_to(decision[:, :1], decision.shape) if granularity == "layer" else decision


@typed
def decide(
    logits: Float[Array, "B K T"], granularity: str, threshold: float | Float[Array, ""] = 0.0
) -> Bool[Array, "B K T"]:
    """Each token's hard decision: evict iff its logit exceeds the threshold. 0 is what training aimed at; a higher one keeps more."""
    return share_heads(logits, granularity) > threshold


@typed
def logistic_noise(
    seed: int | Int[Array, ""],
    step: int | Int[Array, ""],
    examples: Int[Array, "B"],
    num_layers: int,
    num_kv_heads: int,
    length: int,
) -> Float[Array, "{num_layers} B {num_kv_heads} {length}"]:
    """The difference of two Gumbels, a function of (seed, step, example, layer) alone: the same on any mesh, for any
    number of hosts and of gradient-accumulation steps."""
    key = jax.random.fold_in(jax.random.key(seed), step)

    def of(layer, example):
        return jax.random.logistic(
            jax.random.fold_in(jax.random.fold_in(key, example), layer), (num_kv_heads, length), jnp.float32
        )

    return jax.vmap(lambda layer: jax.vmap(lambda example: of(layer, example))(examples))(jnp.arange(num_layers))


@typed
def relax(logits: Float[Array, "B K T"], noise: Float[Array, "B K T"], tau: float) -> Float[Array, "B K T"]:
    """z: the noisy, tempered logit. `sigmoid(z)` is the relaxed decision; attention uses z itself (`log_keep`)."""
    return (logits + noise) / tau


@typed
def straight_through(z: Float[Array, "*A"]) -> Float[Array, "*A"]:
    """0/1 forward, the gradient of sigmoid(z) backward. Only the compression loss sees it; attention stays soft."""
    soft = jax.nn.sigmoid(z)
    return jax.lax.stop_gradient((z > 0).astype(z.dtype) - soft) + soft


@typed
def align_to_pairs(
    decision: Float[Array, "*A T"] | Bool[Array, "*A T"], shift: int, undecided: float | bool
) -> Float[Array, "*A T"] | Bool[Array, "*A T"]:
    """THE decision shift: entry t becomes the decision about pair t. With shift 1 token t+1 decides pair t and the last
    pair is still `undecided`; with shift 0 a token decides about itself."""
    if shift == 0:
        return decision
    return jnp.concatenate([decision[..., 1:], jnp.full_like(decision[..., :1], undecided)], axis=-1)


@typed
def log_keep(z: Float[Array, "B K T"]) -> Float[Array, "B K T"]:
    """log(1 - sigmoid(z)), the score a relaxed eviction adds outside the window. Finite gradient for any z."""
    return jax.nn.log_sigmoid(-z)


@typed
def decidable(length: int, window_size: int, decision_shift: int) -> Bool[Array, "{length}"]:
    """Which tokens of a row decide about a pair that can still leave within the row. The reference counts the others too:
    they can be marked at no cost, so they dilute the loss."""
    pair_can_leave = jnp.arange(length) < length - 1 - window_size
    if decision_shift == 0:
        return pair_can_leave
    return jnp.concatenate([jnp.zeros(1, bool), pair_can_leave[:-1]])


@typed
def live_counts(evict: Bool[Array, "*A T"], window_size: int, decision_shift: int) -> Int[Array, "*A"]:
    """Pairs a cache still holds after a row of T tokens: those unmarked, or within the window of the last query."""
    length = evict.shape[-1]
    marked = align_to_pairs(evict, decision_shift, False)
    recent = jnp.arange(length) >= length - 1 - window_size
    return jnp.sum(~marked | recent, axis=-1)
