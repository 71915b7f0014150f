"""Predict the time of a step on hardware that need not be at hand: FLOPs and bytes, divided by achievable rates.

Programs achieve a fraction of the rates of a data sheet. The fractions are in the tables below, each with its source.
Begin with `step_time`.
"""

from collections.abc import Iterable
from typing import Literal, NamedTuple

from dms_jax.config import ModelConfig
from dms_jax.planning.flops import attention_flops, matmul_parameters
from dms_jax.planning.hardware import Chip
from dms_jax.planning.memory_estimate import MeshSizes


class Efficiency(NamedTuple):
    """The fraction of a data-sheet rate that programs achieve."""

    fraction: float
    source: Literal["measured", "assumed"]
    note: str

    def times(self, sheet: str) -> str:
        """Describe the source of a rate that is this fraction of the rate in `sheet`."""
        return f"{sheet} x {self.fraction:g}, {self.source}: {self.note}"


H200 = "H200, docs/performance.md"
NO_TPU = "no TPU was measured"
PRODUCTS = {
    "gpu": Efficiency(0.74, "measured", f"{H200}: bf16 matrix product of 8192 x 8192 matrices, 732 TFLOP/s"),
    "tpu": Efficiency(0.70, "assumed", NO_TPU),
}
COPY = {
    "gpu": Efficiency(0.84, "measured", f"{H200}: copy, 4.05 TB/s"),
    "tpu": Efficiency(0.85, "assumed", NO_TPU),
}
ATTENTION = {  # causal FLOPs of training attention, forward and backward, as a fraction of the dense bf16 rate
    "mosaic_gpu": Efficiency(0.43, "measured", f"{H200}: 2 rows of 8192, 32 / 8 heads of 128, 8.95 ms"),
    "pallas_tpu": Efficiency(0.35, "assumed", NO_TPU),
    "xla": Efficiency(
        0.063, "measured", f"{H200}: 2 rows of 8192, 32 / 8 heads of 128, 61.5 ms; assumed to hold for a TPU, too"
    ),
}
DECODE = {  # memory bandwidth of a whole decode step, which reads the weights and the live pairs
    "gpu": Efficiency(0.60, "measured", f"{H200}: Qwen3-8B shape, 32 rows of 32,768 tokens at CR 8, 12.1 ms per step"),
    "tpu": Efficiency(0.60, "assumed", NO_TPU),
}
EXACT_COST = {"gpu": 15.0, "tpu": 6.0}  # bf16 products as long as one fp32 product; assumed from data sheets
LINK = Efficiency(0.70, "assumed", "of the data sheet's rate per direction")


class Rates(NamedTuple):
    """Achievable rates of one device, and the source of each."""

    products: float  # FLOP/s of matrix products
    attention: float  # FLOP/s
    memory: float  # bytes/s
    link: float  # bytes/s
    peak: float  # FLOP/s of the data sheet; model-FLOPs utilization is relative to it
    sources: dict[str, str]


def rates_of(chip: Chip, implementation: str) -> Rates:
    """Return the achievable rates of an accelerator that computes training attention with `implementation`."""
    products, copy, attention = PRODUCTS[chip.platform], COPY[chip.platform], ATTENTION[implementation]
    sheet = f"data sheet ({chip.source})"
    return Rates(
        products=chip.flops * products.fraction,
        attention=chip.flops * attention.fraction,
        memory=chip.bandwidth * copy.fraction,
        link=chip.link * LINK.fraction,
        peak=chip.flops,
        sources={
            "products": products.times(sheet),
            "attention": attention.times(sheet),
            "memory": copy.times(sheet),
            "link": LINK.times(sheet),
        },
    )


class StepWork(NamedTuple):
    """The work of a retrofit step on all devices together, including recomputation."""

    products: float  # FLOPs of matrix products with weights
    attention: float  # FLOPs of causal attention
    moved: float  # bytes that the operations between the matrix products read and write


def step_work(config: ModelConfig, tokens: float, length: int, mode: str, remat: str) -> StepWork:
    """Count the work of a step of `tokens` tokens in rows of `length` tokens.

    A step consists of the forward passes of teacher and student, recomputation, and the backward pass.
    """
    output = config.vocab_size * config.hidden_size
    layers = matmul_parameters(config) - output
    again = remat == "full"
    weights = 2.0 * layers * (2 + again + (1 if mode == "adapter" else 2)) + 2.0 * output * (
        3 if mode == "adapter" else 4
    )
    attention = attention_flops(config, length) * (2 + again + 2.5)
    # Elements per token that the forward pass of a layer reads and writes: norms and residual stream, heads with RoPE,
    # MLP. The backward pass moves twice as many elements.
    heads = (6 * config.num_q_heads + 6 * config.num_kv_heads) * config.head_dim
    elements = 17 * config.hidden_size + heads + 6 * config.intermediate_size
    logits = 4.0 * config.vocab_size * 8  # fp32 logits of both models, in about eight passes
    moved = 2.0 * config.num_layers * elements * (4 + again) + logits
    return StepWork(weights * tokens, attention * tokens, moved * tokens)


def label_work(config: ModelConfig, tokens: float, length: int, remat: str, platform: str) -> StepWork:
    """Count the work of the label pass of init=fisher: a forward pass, a backward pass to the gates, and the sums.

    The sums are fp32 products of features, which count as EXACT_COST times as many bf16 products.
    """
    output = config.vocab_size * config.hidden_size
    layers, again = matmul_parameters(config) - output, remat == "full"
    sums = 2.0 * config.num_layers * config.hidden_size * (config.hidden_size + config.num_kv_heads)
    products = 2.0 * layers * (2 + again) + 4.0 * output + EXACT_COST[platform] * sums
    attention = attention_flops(config, length) * (1 + again + 2.5)
    step = step_work(config, tokens, length, "adapter", remat)
    return StepWork(products * tokens, attention * tokens, step.moved * (3 + again) / (4 + again))


class StepTime(NamedTuple):
    """Seconds of one step, by the resource that they are spent on."""

    products: float
    attention: float
    memory: float
    communication: float  # overlaps with the matrix products

    @property
    def total(self) -> float:
        return self.products + self.attention + self.memory + max(0.0, self.communication - self.products)


TOTAL_FORMULA = "products + attention + memory + max(0, communication - products)"


def step_time(work: StepWork, devices: int, weight_bytes: float, sent_bytes: float, rates: Rates) -> StepTime:
    """Predict the time of a step.

    Each device does its part of `work`, reads `weight_bytes` in addition, and sends `sent_bytes`.
    """
    return StepTime(
        products=work.products / devices / rates.products,
        attention=work.attention / devices / rates.attention,
        memory=(work.moved / devices + weight_bytes) / rates.memory,
        communication=sent_bytes / rates.link,
    )


def sent_bytes(collectives: Iterable) -> dict[str, float]:
    """Sum up the bytes that each device sends in a step, by kind of collective.

    The collectives are from `hlo_collectives`.
    """
    total: dict[str, float] = {}
    for collective in collectives:
        total[collective.kind] = total.get(collective.kind, 0.0) + collective.sent * collective.executions
    return total


def weight_bytes(config: ModelConfig, model: int, mode: str, remat: str) -> float:
    """Bytes of bf16 weights that each device reads per micro-batch: its shard over the model axis, once per pass."""
    passes = 2 + (remat == "full") + (1 if mode == "adapter" else 2)
    return 2.0 * matmul_parameters(config) / model * passes


EXCHANGED = (
    "bytes that each device sends in a step. Weights, per micro-batch: the bf16 weights of each layer are all-gathered "
    "for two forward passes and the backward pass, and the output embedding once for each model; gradients are "
    "reduce-scattered in bf16, that of the embedding in fp32; all x (n - 1) / n, where n is the size of the data and "
    "context axes together. Residual stream, per layer: 8 all-gathers and 7 reduce-scatters x (m - 1) / m, where m "
    "is the size of the model axis. Context axis: 4 all-to-alls of queries, keys, values and outputs"
)


def exchanged_bytes(
    config: ModelConfig, mesh: MeshSizes, tokens: float, accumulate: int, mode: str
) -> dict[str, float]:
    """Estimate the bytes that each device sends in a step of `tokens` tokens, by kind of collective.

    EXCHANGED explains how.
    """
    n, m, c = mesh.shards, mesh.model, mesh.context
    output = config.vocab_size * config.hidden_size / m
    layers = matmul_parameters(config) / m - output
    heads = 2 * (config.num_q_heads + config.num_kv_heads) * config.head_dim
    share, token_layers = 2.0 * accumulate * (n - 1) / n, 2.0 * config.num_layers * tokens / n
    stream, attention = token_layers * config.hidden_size * (m - 1) / m, token_layers * heads / m * (c - 1) / c
    gathered, scattered = share * (3 * layers + output) + 8 * stream, 7 * stream
    if mode != "adapter":
        gathered, scattered = gathered + share * output, scattered + share * (layers + 2 * output)
    found = {"all-gather": gathered, "reduce-scatter": scattered, "all-to-all": 4 * attention}
    return {kind: size for kind, size in found.items() if size}
