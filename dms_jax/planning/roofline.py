"""How long a program takes on hardware that need not be here: what must be computed, moved and sent, over what that hardware reaches.

Data sheets give rates; programs reach a part of them. Those parts are data below, each with its source, "measured" or "assumed".
"""

from collections.abc import Iterable
from typing import NamedTuple

from dms_jax.config import ModelConfig
from dms_jax.planning.flops import attention_flops, matmul_parameters
from dms_jax.planning.hardware import Chip
from dms_jax.planning.memory_estimate import Split


class Reached(NamedTuple):
    """The part of a data sheet's rate that programs reach."""

    part: float
    source: str


H200 = "measured on an H200, docs/performance.md"
PRODUCTS = {
    "gpu": Reached(0.74, f"{H200}: bf16 product of 8192, 732 TFLOP/s"),
    "tpu": Reached(0.70, "assumed, no TPU measured"),
}
COPY = {"gpu": Reached(0.84, f"{H200}: copy, 4.05 TB/s"), "tpu": Reached(0.85, "assumed, no TPU measured")}
ATTENTION = {  # value and gradients, causal products counted once, of the dense bf16 rate
    "mosaic_gpu": Reached(0.43, f"{H200}: 8.95 ms for 2 x 8192, 32 / 8 heads of 128"),
    "pallas_tpu": Reached(0.35, "assumed, no TPU measured"),
    "xla": Reached(
        0.063, f"{H200}: 61.5 ms for 2 x 8192, 32 / 8 heads of 128; a TPU is assumed to reach the same part"
    ),
}
DECODE = {  # weights and live pairs of a whole decode step, of the memory bandwidth
    "gpu": Reached(0.60, f"{H200}: Qwen3-8B shape, 32 rows of 32,768 tokens at CR 8, 12.1 ms a step"),
    "tpu": Reached(0.60, "assumed, no TPU measured"),
}
LINK = Reached(0.70, "assumed, of the data sheet's rate per direction")


class Rates(NamedTuple):
    """What one device reaches, and where each number is from."""

    products: float  # FLOP/s
    attention: float  # FLOP/s
    memory: float  # bytes/s
    link: float  # bytes/s
    peak: float  # FLOP/s, which model-FLOPs utilisation is relative to
    sources: dict[str, str]


def rates_of(chip: Chip, implementation: str) -> Rates:
    """Of an accelerator, with training attention by `implementation`."""
    products, copy, attention = PRODUCTS[chip.platform], COPY[chip.platform], ATTENTION[implementation]
    sheet = f"data sheet ({chip.source})"
    sources = {
        "products": f"{sheet} x {products.part:.2f}, {products.source}",
        "attention": f"{sheet} x {attention.part:.3f}, {attention.source}",
        "memory": f"{sheet} x {copy.part:.2f}, {copy.source}",
        "link": f"{sheet} x {LINK.part:.2f}, {LINK.source}",
    }
    return Rates(
        chip.flops * products.part,
        chip.flops * attention.part,
        chip.bandwidth * copy.part,
        chip.link * LINK.part,
        chip.flops,
        sources,
    )


class Work(NamedTuple):
    """What the devices of a retrofit step do together, per step. Recomputation is counted."""

    products: float  # FLOPs of weights
    attention: float  # FLOPs, causal products counted once
    moved: float  # bytes from and to memory between the products


def step_work(config: ModelConfig, tokens: float, length: int, mode: str, remat: str) -> Work:
    """Of a step of `tokens` tokens in rows of `length`: teacher and student forward, what `remat` computes again, and backward."""
    output = config.vocab_size * config.hidden_size
    layers = matmul_parameters(config) - output
    again = remat == "full"
    weights = 2.0 * layers * (2 + again + (1 if mode == "adapter" else 2)) + 2.0 * output * (
        3 if mode == "adapter" else 4
    )
    attention = attention_flops(config, length) * (2 + again + 2.5)
    # Elements that each token reads and writes in a layer, forward: norms and residual stream, heads with RoPE, MLP. Backward is twice that.
    heads = (6 * config.num_q_heads + 6 * config.num_kv_heads) * config.head_dim
    elements = 17 * config.hidden_size + heads + 6 * config.intermediate_size
    moved = (
        2.0 * config.num_layers * elements * (4 + again) + 4.0 * config.vocab_size * 8
    )  # fp32 logits of both models, a few passes
    return Work(weights * tokens, attention * tokens, moved * tokens)


class StepTime(NamedTuple):
    """Seconds of one step on each device."""

    products: float
    attention: float
    memory: float
    communication: float  # of which the part that the products do not hide counts
    total: float


FORMULA = "products + attention + memory + max(0, communication - products)"


def step_time(work: Work, devices: int, weight_bytes: float, sent_bytes: float, rates: Rates) -> StepTime:
    """`weight_bytes` are read by each device, beside its part of the work; `sent_bytes` it sends to others."""
    products, attention = work.products / devices / rates.products, work.attention / devices / rates.attention
    memory, communication = (work.moved / devices + weight_bytes) / rates.memory, sent_bytes / rates.link
    return StepTime(
        products, attention, memory, communication, products + attention + memory + max(0.0, communication - products)
    )


def sent_bytes(found: Iterable) -> dict[str, float]:
    """Bytes that a device sends in a step, by kind of collective, of what `collectives` has read."""
    total: dict[str, float] = {}
    for one in found:
        total[one.kind] = total.get(one.kind, 0.0) + one.sent * one.executions
    return total


def weight_bytes(config: ModelConfig, model: int, mode: str, remat: str) -> float:
    """What a device reads of the bf16 weights for a micro-batch: all that tensor parallelism leaves it, once a pass over the layers."""
    passes = 2 + (remat == "full") + (1 if mode == "adapter" else 2)
    return 2.0 * matmul_parameters(config) / model * passes


EXCHANGED = (
    "all-gather: each layer's bf16 weights for 2 forward passes and backward and the output embedding once for each model, x (n - 1) / n over the n "
    "devices that share them, once a micro-batch; 8 times the residual stream of a layer over the m of the model axis. reduce-scatter: gradients "
    "of what trains (bf16, the embedding's fp32); 7 times the residual stream. all-to-all: 4 times queries, keys, values and outputs over the "
    "context axis"
)


def exchanged_bytes(config: ModelConfig, split: Split, tokens: float, accumulate: int, mode: str) -> dict[str, float]:
    """What a device sends in a step of `tokens` tokens, by kind of collective, without a compiled program: EXCHANGED."""
    n, m, c = split.shards, split.model, split.context
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
