"""A start for the evict head in closed form: what each pair is worth, from the gradients of its gate.

A gate that adds log_keep = a to the scores of a pair outside its window changes the model's output distribution. At
a = 0, where nothing is evicted, the expected square of the derivative along `score_gradient` is the Fisher information
of the gate: half of it is the KL(dense || without the pair) in nats that evicting the pair costs, to second order. This
unit is the same in every layer and head, so one threshold on it serves all of them.

The label of a pair is the logarithm of that value per query that would miss the pair. A ridge regression in each layer
predicts the labels from the residual stream of the deciding token, which is what the evict head sees. The regression
needs only sums over the rows (`LabelSums`), which add up over batches and devices. `gamma_regression` starts there and
predicts the value itself; it needs the pairs (`LabeledPairs`). Begin with `add_labels`.
"""

from statistics import NormalDist
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from dms_jax.axes import EXACT, Array, typed
from dms_jax.config import DMSConfig, ModelConfig
from dms_jax.core.eviction import threshold_at
from dms_jax.core.losses import score_gradient
from dms_jax.models.decoder import Decoder
from dms_jax.models.layers import unit_rms
from dms_jax.sharding import constrain

TEMPERATURES = (1.0, 3.0)  # of the score gradient; half of the tokens get each, at random
FLOOR = 10.0  # medians of the values, added to them before their logarithm
MIN_QUERIES = 32  # a pair that fewer queries can miss has too noisy a label
SINK_WEIGHT = 50.0  # of the first pair of a document, which every head needs and which is one pair of a thousand
RIDGE = 0.01  # relative to the mean eigenvalue of the feature products
MAX_PAIRS = 1024  # of a row that are kept for `gamma_regression`, drawn at random from those with a label
SPREAD = 4.0  # standard deviation of the evict logits; at tau = 0.1, training noise then flips one decision in seven


class LabelSums(NamedTuple):
    """Weighted sums over pairs of the features u [D] of their deciding tokens and of their labels y [K], by layer."""

    floor: Float[Array, ""]  # nats per query, added to values before their logarithm; 0 before the first batch
    weight: Float[Array, ""]
    features: Float[Array, "L D"]  # sum of w u
    products: Float[Array, "L D D"]  # sum of w u u^T
    labels: Float[Array, "L K"]  # sum of w y
    feature_labels: Float[Array, "L D K"]  # sum of w u y


class LabeledPairs(NamedTuple):
    """P pairs of each row, with the features of their deciding tokens and what they are worth."""

    features: Float[Array, "L B P D"]  # u, fp16
    labels: Float[Array, "L B K P"]  # nats per query that would miss the pair
    weight: Float[Array, "B P"]  # as many pairs as each stands for; 0 for those without a label


def no_labels(config: ModelConfig) -> LabelSums:
    """Return the sums over no rows."""
    layers, heads, size = config.num_layers, config.num_kv_heads, config.hidden_size
    zeros = lambda *shape: jnp.zeros(shape, jnp.float32)
    return LabelSums(
        zeros(),
        zeros(),
        zeros(layers, size),
        zeros(layers, size, size),
        zeros(layers, heads),
        zeros(layers, size, heads),
    )


def add_labels(
    sums: LabelSums,
    model: Decoder,
    tokens: Int[Array, "B T"],
    segment_ids: Int[Array, "B T"],
    examples: Int[Array, "B"],
    seed: int,
    remat: str = "full",
) -> tuple[LabelSums, LabeledPairs]:
    """Add a batch of rows: one forward and one backward pass.

    Different `segment_ids` separate documents, and negative ones mark padding. The sums are a function of `sums`, the
    rows, `examples` and `seed`, and do not depend on the mesh. `remat` is as in `Decoder.relaxed_hidden`. The pairs of
    the rows are returned, too.

    The logarithms of values far below those of pairs worth keeping differ by noise, which a regression would chase.
    `FLOOR` times the median value of the first batch is therefore added to all values.
    """
    measured = gate_information(model, tokens, segment_ids, examples, seed, remat)
    sums = add_information(sums, model.config, *measured, segment_ids)
    return sums, labeled_pairs(model.config, *measured, segment_ids, examples, seed)


def add_information(
    sums: LabelSums,
    config: ModelConfig,
    values: Float[Array, "L B K T"],
    stream: Float[Array, "L B T D"],
    segment_ids: Int[Array, "B T"],
) -> LabelSums:
    """Add what `gate_information` found for a batch of rows, as `add_labels` does.

    It does not depend on `decision_shift`, so it serves policies that differ in that alone.
    """
    dms = config.require_dms()
    per_query, weight = _per_query(dms, values, segment_ids)
    counted = jnp.where((weight > 0)[None, :, None], per_query, -jnp.inf)
    median = threshold_at(counted, 0.5 * jnp.sum(counted >= 0, dtype=jnp.float32))
    floor = jnp.where(sums.weight > 0, sums.floor, jnp.maximum(FLOOR * median, jnp.finfo(jnp.float32).tiny))
    # The label of pair t belongs to token t + shift, which decides about it.
    shift = dms.decision_shift
    aligned = lambda x: x[..., : x.shape[-1] - shift]
    labels, weight = aligned(jnp.log(per_query + floor)), aligned(weight)

    def of_layer(inputs):
        stream, labels = inputs
        u = unit_rms(stream, config.rms_norm_eps)[:, shift:]
        weighted = u * weight[..., None]
        return (
            jnp.sum(weighted, axis=(0, 1)),
            jnp.einsum("btd,bte->de", weighted, u, precision=EXACT),
            jnp.einsum("bt,bkt->k", weight, labels, precision=EXACT),
            jnp.einsum("btd,bkt->dk", weighted, labels, precision=EXACT),
        )

    new = LabelSums(floor - sums.floor, jnp.sum(weight), *jax.lax.map(of_layer, (stream, labels)))
    return jax.tree.map(jnp.add, sums, new)


def labeled_pairs(
    config: ModelConfig,
    values: Float[Array, "L B K T"],
    stream: Float[Array, "L B T D"],
    segment_ids: Int[Array, "B T"],
    examples: Int[Array, "B"],
    seed: int,
) -> LabeledPairs:
    """Return the pairs whose sums `add_information` adds, or `MAX_PAIRS` of each row that stand for them.

    Those at the start of a document are always among them. The choice is a function of `examples` and `seed`.
    """
    dms, length = config.require_dms(), segment_ids.shape[1]
    per_query, weight = _per_query(dms, values, segment_ids)
    draw = lambda example: jax.random.uniform(jax.random.fold_in(jax.random.key(seed), example), (length,))
    rank = jax.vmap(draw)(examples) + jnp.where(weight > 1, 2.0, jnp.where(weight > 0, 1.0, 0.0))
    chosen = jnp.sort(jax.lax.top_k(rank, num_kept(config, length))[1], axis=1)
    kept = jnp.take_along_axis(weight, chosen, axis=1)
    plain = lambda weights: jnp.sum(weights == 1, axis=1, keepdims=True)
    kept = jnp.where(kept == 1, plain(weight) / jnp.maximum(plain(kept), 1), kept)
    labels = jnp.take_along_axis(per_query, chosen[None, :, None], axis=-1)

    def features_of(stream):  # at most sqrt(D), so fp16 holds them
        deciding = jnp.take_along_axis(stream, chosen[..., None] + dms.decision_shift, axis=1)
        return unit_rms(deciding, config.rms_norm_eps).astype(jnp.float16)

    features = jax.lax.map(features_of, stream)  # one layer after the other: all of them in fp32 are twice as large
    return LabeledPairs(constrain(features, "layers", "batch", None, None), labels, kept)


def first_rows(pairs: LabeledPairs, count: int) -> LabeledPairs:
    """Return the pairs of the first `count` rows."""
    return LabeledPairs(pairs.features[:, :count], pairs.labels[:, :count], pairs.weight[:count])


def num_kept(config: ModelConfig, length: int) -> int:
    """Return how many pairs of a row of `length` tokens `labeled_pairs` keeps."""
    return min(max(1, length - config.require_dms().window_size - MIN_QUERIES), MAX_PAIRS)


def _per_query(
    dms: DMSConfig, values: Float[Array, "L B K T"], segment_ids: Int[Array, "B T"]
) -> tuple[Float[Array, "L B K T"], Float[Array, "B T"]]:
    """Return what each pair is worth per query that would miss it, and the weight of the pair."""
    # Attention leaves them sharded over heads, in copies if the devices do not divide the heads.
    values = constrain(values, "layers", "batch", None, None)
    missing = queries_outside(segment_ids, dms.window_size)
    weight = label_weights(segment_ids, missing, dms.decision_shift)
    if dms.granularity == "layer":  # a decision is about the pairs of all heads
        values = jnp.broadcast_to(jnp.sum(values, axis=2, keepdims=True), values.shape)
    return values / jnp.maximum(missing, 1)[None, :, None].astype(jnp.float32), weight


def gate_information(
    model: Decoder,
    tokens: Int[Array, "B T"],
    segment_ids: Int[Array, "B T"] | None,
    examples: Int[Array, "B"],
    seed: int,
    remat: str = "full",
) -> tuple[Float[Array, "L B K T"], Float[Array, "L B T D"]]:
    """Estimate the Fisher information of each pair's gate, and return the residual stream that enters each layer.

    Arguments are those of `add_labels`.
    """
    config = model.config
    open_gates = jnp.zeros((config.num_layers, len(tokens), config.num_kv_heads, tokens.shape[1]), jnp.float32)
    hidden, pull_back, stream = jax.vjp(
        lambda log_keep: model.gated_hidden(tokens, log_keep, segment_ids, remat), open_gates, has_aux=True
    )
    key, length = jax.random.key(seed), tokens.shape[1]
    low, high = TEMPERATURES
    is_high = jax.vmap(lambda example: jax.random.bernoulli(jax.random.fold_in(key, example), shape=(length,)))
    temperature = jnp.where(is_high(examples), high, low)
    direction = score_gradient(hidden, model.output_embedding(), key, examples, temperature)
    return jnp.square(pull_back(direction)[0]), stream


@typed
def queries_outside(segment_ids: Int[Array, "B T"], window_size: int) -> Int[Array, "B T"]:
    """Count the queries of its own segment that come more than `window_size` steps after each pair."""
    length = segment_ids.shape[1]
    position = jax.lax.broadcasted_iota(jnp.int32, segment_ids.shape, 1)
    is_last = jnp.concatenate(
        [segment_ids[:, 1:] != segment_ids[:, :-1], jnp.ones_like(segment_ids[:, :1], bool)], axis=1
    )
    last = jax.lax.cummin(jnp.where(is_last, position, length), axis=1, reverse=True)
    return jnp.maximum(last - position - window_size, 0)


@typed
def label_weights(
    segment_ids: Int[Array, "B T"], missing: Int[Array, "B T"], decision_shift: int
) -> Float[Array, "B T"]:
    """Weigh the pairs: `SINK_WEIGHT` for the first of a document, 1 for the others.

    Padding, and pairs that fewer than `MIN_QUERIES` of the `missing` queries could miss, get 0.
    """
    is_first = jnp.concatenate(
        [jnp.ones_like(segment_ids[:, :1], bool), segment_ids[:, 1:] != segment_ids[:, :-1]], axis=1
    )
    counted: Bool[Array, "B T"] = (segment_ids >= 0) & (missing >= max(MIN_QUERIES, decision_shift))
    return jnp.where(counted, jnp.where(is_first, SINK_WEIGHT, 1.0), 0.0)


class FittedHead(NamedTuple):
    """The ridge regression: u @ value predicts the label of a pair less the mean label, and u @ constant is about 1."""

    value: Float[Array, "L D K"]
    constant: Float[Array, "L D"]
    mean: Float[Array, ""]  # of the predictions, over pairs, heads and layers
    deviation: Float[Array, ""]  # their standard deviation

    def projection(self, dms: DMSConfig, evicted: float) -> Float[Array, "L D K"]:
        """Return the projection of an evict head that evicts about the fraction `evicted` of the pairs.

        Its logits have a standard deviation of `SPREAD`. The fraction is exact if predictions are normally distributed.
        """
        slope = SPREAD / self.deviation
        cut = self.mean + self.deviation * NormalDist().inv_cdf(min(max(evicted, 1e-3), 1 - 1e-3))
        constant = (slope * cut + dms.evict_logit_bias) * self.constant[..., None]
        return jnp.asarray((constant - slope * self.value) / dms.evict_logit_scale)

    def weights_of_logits(self, dms: DMSConfig, of_predictions: Float[Array, "L U K"]) -> Float[Array, "L U K"]:
        """Turn weights that add to the predictions into weights that add to the raw logits."""
        return jnp.asarray(-SPREAD / self.deviation * of_predictions / dms.evict_logit_scale)


def fit(sums: LabelSums) -> FittedHead:
    """Solve the regression of every layer, on labels less their mean over all layers and heads.

    The features have no constant entry, so a common offset of the labels would enter the predictions as noise.
    """
    offset = jnp.mean(sums.labels) / sums.weight
    feature_labels = sums.feature_labels - offset * sums.features[..., None]

    def of_layer(inputs):  # one after the other, because the products of all layers at once take D x D numbers each
        features, products, right = (x / sums.weight for x in inputs)
        size = len(products)
        regularized = products + RIDGE * jnp.trace(products) / size * jnp.eye(size)
        right = jnp.concatenate([right, features[:, None]], axis=-1)
        with jax.default_matmul_precision("highest"):
            solution = jax.scipy.linalg.solve(regularized, right, assume_a="pos")
        value, constant = solution[:, :-1], solution[:, -1]
        squares = jnp.einsum("dk,de,ek->k", value, products, value, precision=EXACT)
        return value, constant, jnp.einsum("d,dk->k", features, value, precision=EXACT), squares

    value, constant, predicted, squares = jax.lax.map(of_layer, (sums.features, sums.products, feature_labels))
    mean = jnp.mean(predicted)
    return FittedHead(value, constant, mean, jnp.sqrt(jnp.mean(squares) - mean**2))
