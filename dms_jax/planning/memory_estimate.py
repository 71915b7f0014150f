"""Bytes that a retrofit step needs on each device, without compiling it: a formula for each kind.

Weights and optimizer are exact (their shards are counted). The rest follows what XLA allocates for H100, v5e and v5p, within 15% of the whole
(docs/scale.md, `pytest -m aot`). Two moments compete for the peak: the loss, and the backward pass of a layer.
"""

from typing import NamedTuple

from dms_jax.config import ModelConfig

CHUNK = 256  # tokens whose logits exist at a time: core.losses


class Fitted(NamedTuple):
    """What differs between the compilers."""

    number: float = 2.0  # bytes of a weight or activation: bf16, on a CPU fp32
    logits: float = 3.0  # fp32 logits of a chunk that exist at once
    embedding_gradients: float = 2.0  # fp32, where all weights train
    kept: float = 1.0  # of `activations`
    both: float = 0.0  # of the lesser of the two moments that is still there in the other


# A TPU's compiler counts its whole heap with the holes in it: more than is in use at any time.
PLATFORMS = {
    "gpu": Fitted(),
    "tpu": Fitted(embedding_gradients=1.0, kept=1.25, both=0.75),
    "cpu": Fitted(number=4.0, logits=4.0, embedding_gradients=1.25),
}
FORMULAS = {
    "weights": "shards of the parameters: bf16 frozen ones, fp32 those that train",
    "optimizer": "two fp32 moments of what trains, in shards",
    "activations": "2 bytes (CPU: 4, also below) x L x tokens x D (remat full: the residual stream; matmuls: 2 D + 2 (N + K) H + 2 F in place of D; "
    "none: 9 D + 2 (N + K) H (6 times that with norms of queries and keys) + 5 F), over the model axis; TPU: x 1.25",
    "logits": "output embeddings gathered over data and context; 3 (CPU: 4) fp32 logits of 256 tokens of each part of a row (one on each device "
    "of the model axis) and 3 hidden states of those parts; where all weights "
    "train also their bf16 shards and two (TPU: one, CPU: 1.25) fp32 gradients of the embedding",
    "temporary": "what backward of a layer needs beyond the latter: its gathered weights twice, 2 (3 F + 5 D) bytes a token, fp32 gradients; "
    "TPU: and 0.75 of the lesser",
}


class Held(NamedTuple):
    """Bytes of one device, at the peak."""

    weights: float
    optimizer: float
    activations: float
    logits: float
    temporary: float

    @property
    def total(self) -> float:
        return sum(self)


class Split(NamedTuple):
    """Sizes of the mesh axes."""

    data: int
    model: int
    context: int = 1

    @property
    def shards(self) -> int:
        """Devices among which parameters are fully sharded, beside the model axis."""
        return self.data * self.context


class Shape(NamedTuple):
    """What a step computes at a time on each device."""

    split: Split
    rows: int  # of a micro-batch
    length: int  # of a whole row
    mode: str
    remat: str
    platform: str
    accumulates: bool = False

    @property
    def tokens(self) -> float:
        return self.rows * self.length / self.split.context

    @property
    def fitted(self) -> Fitted:
        return PLATFORMS[self.platform]

    @property
    def trains_all(self) -> bool:
        return self.mode != "adapter"


def held(config: ModelConfig, shape: Shape, weights: float, optimizer: float, trainable: float) -> Held:
    """`weights`, `optimizer`, and of the former the fp32 `trainable` ones: bytes of this device's shards."""
    of, model, gathers = shape.fitted, shape.split.model, shape.split.shards > 1
    d, f, heads = (
        config.hidden_size,
        config.intermediate_size,
        2 * (config.num_q_heads + config.num_kv_heads) * config.head_dim,
    )
    embedding = config.vocab_size * d / model
    cast = trainable / 2 if shape.trains_all and of.number < 4 else 0.0
    # Each device of the model axis walks through its own part of the length and holds its part of the vocabulary for all those parts.
    part = shape.length / (model * shape.split.context)
    chunk = 4.0 * shape.rows * min(CHUNK, part) * config.vocab_size
    loss = (
        cast
        + of.logits * chunk
        + 3 * of.number * shape.tokens * d / model
        + of.embedding_gradients * 4.0 * embedding * shape.trains_all
    )
    within = shape.tokens * (3 * f / model + 2 * d + 3 * d / model)
    layer = (
        cast + trainable * (1 + shape.accumulates) + of.number * (d * (heads + 3 * f) / model * (1 + gathers) + within)
    )
    gathered = of.number * embedding * (1 + shape.trains_all) * gathers
    peak = max(loss, layer) + of.both * min(loss, layer)
    return Held(weights, optimizer, activations(config, shape), gathered + loss, peak - loss)


def activations(config: ModelConfig, shape: Shape) -> float:
    """What forward keeps for backward."""
    d, f, heads = (
        config.hidden_size,
        config.intermediate_size,
        2 * (config.num_q_heads + config.num_kv_heads) * config.head_dim,
    )
    kept = {"full": d, "matmuls": 2 * d + heads + 2 * f, "none": 9 * d + heads * (6 if config.qk_norm else 1) + 5 * f}[
        shape.remat
    ]
    return shape.fitted.kept * shape.fitted.number * config.num_layers * shape.tokens * kept / shape.split.model
