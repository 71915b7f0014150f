"""Bytes that a retrofit step needs on each device, without compiling it: a formula for each kind.

Weights and optimizer are exact (their shards are counted). The rest follows what XLA allocates for H100, v5e and v5p, within 15% of the whole
(docs/scale.md, `pytest -m aot`). Two moments compete for the peak: the loss, and the backward pass of a layer.
"""

from typing import NamedTuple

from dms_jax.config import ModelConfig

CHUNK = 256  # tokens whose logits exist at a time: core.losses
LAYER = {"tpu": 1.75}  # by platform: numbers held within a layer, relative to a GPU; a TPU pads heads of 64 to 128 and reuses less
FORMULAS = {
    "weights": "shards of the parameters: bf16 frozen ones, fp32 those that train",
    "optimizer": "two fp32 moments of what trains, in shards",
    "activations": "2 bytes x L x tokens x D (remat full: the residual stream; matmuls: 2 D + 2 (N + K) H + 2 F in place of D; "
    "none: 9 D + 2 (N + K) H + 5 F), over the model axis",
    "logits": "output embeddings gathered over data and context; 3 fp32 logits of 256 tokens a row and 3 hidden states; where all weights train "
    "also their bf16 shards and two fp32 gradients of the embedding",
    "temporary": "what backward of a layer needs beyond that: its gathered weights twice, 2 (3 F + 5 D) bytes a token (TPU: x 1.75), fp32 gradients",
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
    def trains_all(self) -> bool:
        return self.mode != "adapter"


def held(config: ModelConfig, shape: Shape, weights: float, optimizer: float, trainable: float) -> Held:
    """`weights`, `optimizer`, and of the former the fp32 `trainable` ones: bytes of this device's shards."""
    model, gathers = shape.split.model, shape.split.shards > 1
    embedding = config.vocab_size * config.hidden_size / model
    embeddings = 2.0 * embedding * (1 + shape.trains_all) if gathers else 0.0
    in_bf16 = trainable / 2 if shape.trains_all else 0.0
    loss = in_bf16 + 3 * (4.0 * shape.rows * CHUNK * config.vocab_size / model + 2.0 * shape.tokens * config.hidden_size)
    loss += 2 * 4.0 * embedding if shape.trains_all else 0.0
    layer = in_bf16 + trainable * (1 + shape.accumulates) + _layer_weights(config) / model * (1 + gathers) + _within_layer(config, shape)
    return Held(weights, optimizer, activations(config, shape), embeddings + loss, max(0.0, layer - loss))


def activations(config: ModelConfig, shape: Shape) -> float:
    """What forward keeps for backward."""
    d, f, heads = config.hidden_size, config.intermediate_size, 2 * (config.num_q_heads + config.num_kv_heads) * config.head_dim
    kept = {"full": d, "matmuls": 2 * d + heads + 2 * f, "none": 9 * d + heads + 5 * f}[shape.remat]
    return 2.0 * config.num_layers * shape.tokens * kept / shape.split.model


def _layer_weights(config: ModelConfig) -> float:
    heads = 2 * (config.num_q_heads + config.num_kv_heads) * config.head_dim
    return 2.0 * config.hidden_size * (heads + 3 * config.intermediate_size)


def _within_layer(config: ModelConfig, shape: Shape) -> float:
    d, f, model = config.hidden_size, config.intermediate_size, shape.split.model
    return 2.0 * shape.tokens * (3 * f / model + 2 * d + 3 * d / model) * LAYER.get(shape.platform, 1.0)
