"""Predict how long a program takes on hardware that need not be at hand: the work it computes, moves and sends, over achievable rates.

A data sheet gives rates, and programs achieve a fraction of them. The fractions are data below, each with its source.
"""

from collections.abc import Iterable
from typing import Literal, NamedTuple

from dms_jax.config import ModelConfig
from dms_jax.planning.flops import attention_flops, matmul_parameters
from dms_jax.planning.hardware import Chip
from dms_jax.planning.memory_estimate import MeshSizes


class Efficiency(NamedTuple):
    """The fraction of a data sheet's rate that programs achieve."""

    fraction: float
    source: Literal["measured", "assumed"]
    note: str

    def times(self, sheet: str) -> str:
        """The origin of a rate that is this fraction of a data sheet's."""
        return f"{sheet} x {self.fraction:g}, {self.source}: {self.note}"


H200 = "H200, docs/performance.md"
NO_TPU = "no TPU was measured"
PRODUCTS = {
    "gpu": Efficiency(0.74, "measured", f"{H200}: bf16 product of 8192 x 8192 matrices, 732 TFLOP/s"),
    "tpu": Efficiency(0.70, "assumed", NO_TPU),
}
COPY = {
    "gpu": Efficiency(0.84, "measured", f"{H200}: copy, 4.05 TB/s"),
    "tpu": Efficiency(0.85, "assumed", NO_TPU),
}
ATTENTION = {  # forward and backward of training attention, causal FLOPs counted once, as a fraction of the dense bf16 rate
    "mosaic_gpu": Efficiency(0.43, "measured", f"{H200}: 2 rows of 8192, 32 / 8 heads of 128, 8.95 ms"),
    "pallas_tpu": Efficiency(0.35, "assumed", NO_TPU),
    "xla": Efficiency(
        0.063, "measured", f"{H200}: 2 rows of 8192, 32 / 8 heads of 128, 61.5 ms; the same is assumed of a TPU"
    ),
}
DECODE = {  # memory bandwidth of a whole decode step, which reads the weights and the live pairs
    "gpu": Efficiency(0.60, "measured", f"{H200}: Qwen3-8B shape, 32 rows of 32,768 tokens at CR 8, 12.1 ms per step"),
    "tpu": Efficiency(0.60, "assumed", NO_TPU),
}
LINK = Efficiency(0.70, "assumed", "of the data sheet's rate per direction")


class Rates(NamedTuple):
    """Achievable rates of one device, and where each comes from."""

    products: float  # FLOP/s of matrix products
    attention: float  # FLOP/s
    memory: float  # bytes/s
    link: float  # bytes/s
    peak: float  # FLOP/s; the reference of model-FLOPs utilization
    sources: dict[str, str]


def rates_of(chip: Chip, implementation: str) -> Rates:
    """The rates of an accelerator that computes training attention with `implementation`."""
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
    """The work of all devices together in a retrofit step. Recomputation is counted."""

    products: float  # FLOPs of products with weights
    attention: float  # FLOPs of causal attention
    moved: float  # bytes that the operations between the products read and write


def step_work(config: ModelConfig, tokens: float, length: int, mode: str, remat: str) -> StepWork:
    """The work of a step of `tokens` tokens in rows of `length`: forward passes of teacher and student, recomputation, backward pass."""
    output = config.vocab_size * config.hidden_size
    layers = matmul_parameters(config) - output
    again = remat == "full"
    weights = 2.0 * layers * (2 + again + (1 if mode == "adapter" else 2)) + 2.0 * output * (
        3 if mode == "adapter" else 4
    )
    attention = attention_flops(config, length) * (2 + again + 2.5)
    # Elements that each token reads and writes in the forward pass of a layer: norms and residual stream, heads with RoPE, MLP. The
    # backward pass moves twice as many.
    heads = (6 * config.num_q_heads + 6 * config.num_kv_heads) * config.head_dim
    elements = 17 * config.hidden_size + heads + 6 * config.intermediate_size
    logits = 4.0 * config.vocab_size * 8  # fp32 logits of both models, a few passes
    moved = 2.0 * config.num_layers * elements * (4 + again) + logits
    return StepWork(weights * tokens, attention * tokens, moved * tokens)


class StepTime(NamedTuple):
    """Seconds of one step on each device."""

    products: float
    attention: float
    memory: float
    communication: float  # hidden behind the products, as far as it takes no longer than they do

    @property
    def total(self) -> float:
        return self.products + self.attention + self.memory + max(0.0, self.communication - self.products)


TOTAL_FORMULA = "products + attention + memory + max(0, communication - products)"


def step_time(work: StepWork, devices: int, weight_bytes: float, sent_bytes: float, rates: Rates) -> StepTime:
    """Each device reads `weight_bytes` in addition to its part of the work, and sends `sent_bytes` to others."""
    return StepTime(
        products=work.products / devices / rates.products,
        attention=work.attention / devices / rates.attention,
        memory=(work.moved / devices + weight_bytes) / rates.memory,
        communication=sent_bytes / rates.link,
    )


def sent_bytes(collectives: Iterable) -> dict[str, float]:
    """Bytes that a device sends in a step, by kind of collective, from the collectives of its program (`hlo_collectives`)."""
    total: dict[str, float] = {}
    for one in collectives:
        total[one.kind] = total.get(one.kind, 0.0) + one.sent * one.executions
    return total


def weight_bytes(config: ModelConfig, model: int, mode: str, remat: str) -> float:
    """Bytes of bf16 weights that a device reads in a micro-batch: its tensor-parallel part of all layers, once for each pass over them."""
    passes = 2 + (remat == "full") + (1 if mode == "adapter" else 2)
    return 2.0 * matmul_parameters(config) / model * passes


EXCHANGED = (
    "bytes that a device sends in a step. Weights, per micro-batch: the bf16 weights of each layer are all-gathered for the two forward passes "
    "and for the backward pass, the output embedding once for each model, times (n - 1) / n, n = the data x context devices that share them; "
    "gradients of what trains are reduce-scattered in bf16, that of the embedding in fp32. Residual stream, per layer, times (m - 1) / m, "
    "m = the devices of the model axis: 8 all-gathers and 7 reduce-scatters. Context axis: 4 all-to-alls of queries, keys, values and outputs"
)


def exchanged_bytes(
    config: ModelConfig, mesh: MeshSizes, tokens: float, accumulate: int, mode: str
) -> dict[str, float]:
    """Estimate the bytes that a device sends in a step of `tokens` tokens, by kind of collective; EXCHANGED says how."""
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
