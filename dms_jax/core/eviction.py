"""From raw eviction scores to gates, all in fp32. Equations: DMS, arXiv:2506.05345; Model-Optimizer `core.py`."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from dms_jax.axes import Array, typed


@typed
def evict_logits(raw: Float[Array, "*A"], scale: float, bias: float) -> Float[Array, "*A"]:
    """Return decision scores; > 0 evicts. `bias` is subtracted, so an untrained head (raw = 0) keeps everything."""
    return scale * raw.astype(jnp.float32) - bias


@typed
def share_heads(decision: Float[Array, "B K T"], granularity: str) -> Float[Array, "B K T"]:
    """Apply the granularity: "head" lets each KV head decide for itself, "layer" lets head 0 decide for all."""
    return jnp.broadcast_to(decision[:, :1], decision.shape) if granularity == "layer" else decision


@typed
def decide(
    logits: Float[Array, "B K T"], granularity: str, threshold: float | Float[Array, ""] = 0.0
) -> Bool[Array, "B K T"]:
    """Return each token's hard decision: evict iff its logit exceeds the threshold.

    Training aims at a threshold of 0; a higher one keeps more.
    """
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
    """Draw logistic noise (the difference of two Gumbel variables) as a function of (seed, step, example, layer) alone.

    It is therefore the same on any mesh, for any number of hosts, and for any number of gradient-accumulation steps.
    """
    key = jax.random.fold_in(jax.random.key(seed), step)

    def draw(layer, example):
        return jax.random.logistic(
            jax.random.fold_in(jax.random.fold_in(key, example), layer), (num_kv_heads, length), jnp.float32
        )

    return jax.vmap(lambda layer: jax.vmap(lambda example: draw(layer, example))(examples))(jnp.arange(num_layers))


@typed
def relax(logits: Float[Array, "B K T"], noise: Float[Array, "B K T"], tau: float) -> Float[Array, "B K T"]:
    """Return z, the noisy logit divided by the temperature.

    `sigmoid(z)` is the relaxed decision; attention uses `log_keep(z)`.
    """
    return (logits + noise) / tau


@typed
def straight_through(z: Float[Array, "*A"]) -> Float[Array, "*A"]:
    """Return 0 or 1 with the gradient of sigmoid(z). Only the compression loss uses it; attention stays soft."""
    soft = jax.nn.sigmoid(z)
    return jax.lax.stop_gradient((z > 0).astype(z.dtype) - soft) + soft


@typed
def align_to_pairs(
    decision: Float[Array, "*A T"] | Bool[Array, "*A T"], shift: int, undecided: float | bool
) -> Float[Array, "*A T"] | Bool[Array, "*A T"]:
    """Shift decisions of tokens so that entry t is the decision about pair t: THE place where `decision_shift` acts.

    With shift 1, token t+1 decides about pair t, and the last pair is still `undecided`. With shift 0, each token
    decides about its own pair.
    """
    if shift == 0:
        return decision
    return jnp.concatenate([decision[..., 1:], jnp.full_like(decision[..., :1], undecided)], axis=-1)


@typed
def log_keep(z: Float[Array, "B K T"]) -> Float[Array, "B K T"]:
    """Return log(1 - sigmoid(z)), which is added to scores outside the window. Its gradient is finite for any z."""
    return jax.nn.log_sigmoid(-z)


@typed
def decidable(length: int, window_size: int, decision_shift: int) -> Bool[Array, "{length}"]:
    """Return which tokens of a row decide about a pair that can still leave within the row.

    The reference counts the other tokens in its compression loss as well. They can be marked at no cost, so they
    dilute the loss.
    """
    # In NumPy, because it depends on sizes alone; the host selects logits with it, too.
    pair_can_leave = np.arange(length) < length - 1 - window_size
    if decision_shift == 0:
        return pair_can_leave
    return np.concatenate([np.zeros(1, bool), pair_can_leave[:-1]])


@typed
def threshold_at(logits: Float[Array, "*A"], num_evicted: float | Float[Array, ""]) -> Float[Array, ""]:
    """Return the lowest fp32 number that at most `num_evicted` of the logits exceed: one of the logits, in general.

    Logits that must not count are -inf. The number is found by bisection over the bits of fp32 numbers, so it is exact.
    Each of the 32 rounds only counts, which under a mesh needs no gather and no sort.
    """
    # As int32, the bits of positive numbers are in the order of the numbers; those of negative ones are reversed.
    ordered = lambda bits: jnp.where(bits < 0, bits ^ jnp.int32(0x7FFFFFFF), bits)
    keys = ordered(jax.lax.bitcast_convert_type(logits.astype(jnp.float32), jnp.int32))

    def halve(_, bounds):
        low, high = bounds  # more than `num_evicted` keys exceed `low`, or it is the lowest; not so for `high`
        middle = (low >> 1) + (high >> 1) + (low & high & 1)
        # An int32 holds the count of a layer, but not always that of the whole batch.
        too_many = jnp.sum(jnp.sum(keys > middle, axis=tuple(range(1, keys.ndim))).astype(jnp.float32)) > num_evicted
        return jnp.where(too_many, middle, low), jnp.where(too_many, high, middle)

    infinity = jnp.int32(0x7F800000)
    _, found = jax.lax.fori_loop(0, 32, halve, (ordered(jnp.int32(-(2**31) + 0x7F800000)), infinity))
    return jax.lax.bitcast_convert_type(ordered(found), jnp.float32)


@typed
def live_counts(evict: Bool[Array, "*A T"], window_size: int, decision_shift: int) -> Int[Array, "*A"]:
    """Count the live pairs after a row of T tokens: those that are unmarked, or within the window of the last query."""
    length = evict.shape[-1]
    marked = align_to_pairs(evict, decision_shift, False)
    recent = jax.lax.broadcast_to_rank(jnp.arange(length) >= length - 1 - window_size, marked.ndim)
    return jnp.sum(~marked | recent, axis=-1)
