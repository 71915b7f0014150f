"""Bytes that a retrofit step needs on each device, without compiling it: a formula for each kind.

Weights, optimizer and batch are exact (their shards are counted); the rest is fitted to what XLA allocates for H100 and v5e
(docs/scale.md, `pytest -m aot`), within 15% of the whole.
"""

from typing import NamedTuple

from dms_jax.config import ModelConfig

CHUNK = 256  # tokens whose logits exist at a time: core.losses
FORMULAS = {
    "weights": "shards of the parameters: bf16 frozen ones, fp32 those that train",
    "optimizer": "two fp32 moments of what trains, in shards",
    "activations": "2 D bytes for each token and layer (remat full: the residual stream; matmuls: projections, MLP and attention too)",
    "logits": "output embeddings gathered over the data axis, and the fp32 logits of 256 tokens of each row for student, teacher and gradient",
    "temporary": "one layer's gathered weights twice, about 2 (3 F + 6 D) bytes a token within a layer, gradients of what trains (fp32 shards)",
}


class Held(NamedTuple):
    """Bytes of one device."""

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


def activations(config: ModelConfig, split: Split, rows: int, length: int, remat: str) -> float:
    """What forward keeps for backward; `rows` are those of a micro-batch on each device."""
    tokens, d = rows * length / split.context, config.hidden_size
    kept = d
    if remat != "full":
        heads = (2 * config.num_q_heads + 2 * config.num_kv_heads) * config.head_dim
        kept += (heads + 3 * config.intermediate_size) / split.model + (2 * d if remat == "matmuls" else 6 * d)
    return 2.0 * config.num_layers * tokens * kept


def logits(config: ModelConfig, split: Split, rows: int, mode: str) -> float:
    vocab = config.vocab_size / split.model
    embedding = vocab * config.hidden_size
    models = 1 if mode == "adapter" else 2
    gradient = 0 if mode == "adapter" else 4.0 * embedding
    return 2.0 * embedding * models + gradient + 3 * 4.0 * rows * CHUNK * vocab


def temporary(config: ModelConfig, split: Split, rows: int, length: int, trainable: float) -> float:
    """`trainable`: bytes of this device's shards of what trains."""
    d, f, tokens = config.hidden_size, config.intermediate_size, rows * length / split.context
    layer = d * (2 * config.num_q_heads + 2 * config.num_kv_heads) * config.head_dim + 3 * d * f
    return 2 * 2.0 * layer / split.model + 2.0 * tokens * (3 * f / split.model + 6 * d) + trainable
