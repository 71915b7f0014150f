"""Estimate the bytes per device of a retrofit step without compiling it, and read those of a compiled program.

Weights and optimizer state are exact, because their shards are counted. The other parts are fitted to what XLA
allocates for H100, v5e and v5p; the total is within 15% of the compiler's (docs/scale.md, `pytest -m aot`). Memory
peaks either in the loss or in the backward pass of a layer. Begin with `estimated_memory`.
"""

from typing import Any, NamedTuple

from dms_jax.config import ModelConfig
from dms_jax.errors import ConfigError
from dms_jax.planning.hardware import number_bytes


class CompilerFit(NamedTuple):
    """Parameters of how the compiler of a platform allocates memory, fitted to the sizes that it reports."""

    logits: float = 3.0  # fp32 copies of the logits of one chunk that exist at the same time
    label_logits: float = 3.0  # the same in the label pass; fitted on a CPU only, elsewhere as in the loss
    embedding_gradients: float = 2.0  # fp32 copies of the embedding gradient, if all weights train
    activation_factor: float = 1.0  # allocated bytes / bytes of the arrays that the forward pass saves
    overlap: float = 0.0  # fraction of the smaller of the two peaks that is still allocated at the larger one


# The TPU compiler reports its whole heap including the holes, which is more than is in use at any one time.
FITS = {
    "gpu": CompilerFit(),
    "tpu": CompilerFit(embedding_gradients=1.0, activation_factor=1.25, overlap=0.75),
    "cpu": CompilerFit(logits=4.0, label_logits=2.5, embedding_gradients=1.25),
}
FORMULAS = {
    "weights": "shards of the parameters: bf16 if frozen, fp32 if they train",
    "optimizer": "shards of the two fp32 moments of each parameter that trains",
    "activations": "2 bytes (CPU: 4, here and below) x L x tokens x width / size of the model axis; width by remat: "
    "full: D (the residual stream); matmuls: 2 D + 2 (N + K) H + 2 F; none: 9 D + 2 (N + K) H (x 6 if queries and "
    "keys have norms) + 5 F; TPU: x 1.25",
    "logits": "the output embeddings, gathered over the data and context axes; the model axis splits each row into "
    "parts: 3 (CPU: 4) copies of the fp32 logits of one chunk of tokens of each part, and 3 hidden states of the "
    "parts; if all weights train, also their bf16 shards and 2 (TPU: 1, CPU: 1.25) copies of the fp32 gradient of "
    "the embedding",
    "temporary": "what the backward pass of a layer needs beyond `logits`: two copies of the gathered weights of the "
    "layer, 2 (3 F + 5 D) bytes per token, and fp32 gradients; TPU: plus 0.75 of the smaller of `logits` and this",
}

LABELS = (
    "weights + optimizer + 2 sums of the labels, which have L D (D + K) fp32 numbers, and one layer of them + L x "
    "tokens x D of the residual stream + activations, logits and temporary as in a step that trains no weights"
)


class MemoryEstimate(NamedTuple):
    """Bytes per device at the peak, by kind."""

    weights: float
    optimizer: float
    activations: float
    logits: float
    temporary: float

    @property
    def total(self) -> float:
        return sum(self)


class MeshSizes(NamedTuple):
    """Sizes of the mesh axes."""

    data: int
    model: int
    context: int = 1

    @property
    def shards(self) -> int:
        """Number of devices over which the parameters are fully sharded, not counting the model axis."""
        return self.data * self.context


class MicroBatch(NamedTuple):
    """The part of a step that a device computes at one time."""

    mesh: MeshSizes
    rows: int  # rows on each device
    length: int  # tokens of a whole row
    logits_chunk: int  # tokens of a row whose logits exist at the same time
    mode: str
    remat: str
    platform: str
    accumulates: bool = False  # whether a step has several micro-batches
    labels: bool = False  # the label pass of init=fisher instead of a step

    @property
    def tokens(self) -> float:
        """Tokens on each device."""
        return self.rows * self.length / self.mesh.context

    @property
    def fit(self) -> CompilerFit:
        fit = FITS[self.platform]
        return fit._replace(logits=fit.label_logits) if self.labels else fit

    @property
    def number_bytes(self) -> int:
        return number_bytes(self.platform)

    @property
    def trains_all(self) -> bool:
        return self.mode != "adapter"


def estimated_memory(
    config: ModelConfig, micro: MicroBatch, weights: float, optimizer: float, trainable: float
) -> MemoryEstimate:
    """Estimate the bytes per device of a step.

    `weights` and `optimizer` are the bytes of the shards on one device. `trainable` is the fp32 part of `weights`.
    """
    fit, model, gathers = micro.fit, micro.mesh.model, micro.mesh.shards > 1
    d, f, heads = _widths(config)
    embedding = config.vocab_size * d / model
    cast = trainable / 2 if micro.trains_all and micro.number_bytes < 4 else 0.0

    # The loss: each device of the model axis computes the loss of its own part of each row, in chunks.
    part = micro.length / (model * micro.mesh.context)
    chunk = 4.0 * micro.rows * min(micro.logits_chunk, part) * config.vocab_size
    loss = (
        cast
        + fit.logits * chunk
        + 3 * micro.number_bytes * micro.tokens * d / model
        + fit.embedding_gradients * 4.0 * embedding * micro.trains_all
    )

    # The backward pass of a layer.
    inside = micro.tokens * (3 * f / model + 2 * d + 3 * d / model)
    layer_weights = d * (heads + 3 * f) / model * (1 + gathers)
    layer = cast + trainable * (1 + micro.accumulates) + micro.number_bytes * (layer_weights + inside)

    gathered = micro.number_bytes * embedding * (1 + micro.trains_all) * gathers
    peak = max(loss, layer) + fit.overlap * min(loss, layer)
    return MemoryEstimate(weights, optimizer, saved_activations(config, micro), gathered + loss, peak - loss)


def estimated_label_bytes(
    config: ModelConfig, micro: MicroBatch, weights: float, optimizer: float, trainable: float, sums: float
) -> float:
    """Estimate the bytes per device of the label pass of init=fisher, as LABELS says.

    `weights` to `trainable` are as in `estimated_memory`. `sums` are the bytes of the shards of the labels' sums.
    """
    cast = trainable / 2 if micro.trains_all and micro.number_bytes < 4 else 0.0
    alike = micro._replace(mode="adapter", accumulates=False, labels=True)
    stream = micro.number_bytes * config.num_layers * micro.tokens * config.hidden_size
    sums *= 2 + 1 / config.num_layers
    return estimated_memory(config, alike, weights, optimizer, 0.0).total + cast + stream + sums


def saved_activations(config: ModelConfig, micro: MicroBatch) -> float:
    """Bytes that the forward pass saves for the backward pass."""
    d, f, heads = _widths(config)
    norms = 6 if config.qk_norm else 1
    width = {"full": d, "matmuls": 2 * d + heads + 2 * f, "none": 9 * d + heads * norms + 5 * f}[micro.remat]
    fit = micro.fit
    return fit.activation_factor * micro.number_bytes * config.num_layers * micro.tokens * width / micro.mesh.model


def _widths(config: ModelConfig) -> tuple[int, int, int]:
    """Count the channels of the residual stream, of the MLP, and of all heads (queries, keys, values and output)."""
    heads = 2 * (config.num_q_heads + config.num_kv_heads) * config.head_dim
    return config.hidden_size, config.intermediate_size, heads


def program_bytes(analysis: Any) -> float:
    """Bytes per device of a compiled program, from its `memory_analysis()`."""
    if analysis is None:
        raise ConfigError("the compiler for this hardware does not report the memory of a program; use --analytic")
    return (
        analysis.argument_size_in_bytes
        + analysis.output_size_in_bytes
        - analysis.alias_size_in_bytes
        + analysis.temp_size_in_bytes
    )


def with_compiled(estimate: MemoryEstimate, arguments: float, temporary: float) -> MemoryEstimate:
    """Replace the estimate by the compiler's figures.

    The compiler reports only the total bytes of `arguments` and of `temporary` arrays. The estimate determines which
    parts of the temporary arrays count as activations and as logits.
    """
    part = min(1.0, temporary / (estimate.activations + estimate.logits))
    activations, logits = estimate.activations * part, estimate.logits * part
    return estimate._replace(
        weights=arguments - estimate.optimizer,  # the batch is among the arguments and counts as weights
        activations=activations,
        logits=logits,
        temporary=temporary - activations - logits,
    )
