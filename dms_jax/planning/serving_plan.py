"""How many users a memory budget serves, and how fast, dense and with compact caches; and where compression will not help.

Decoding reads all weights and all live pairs once a step: memory bandwidth is what counts, with very many users the products. What hardware reaches
of its data sheet is data in `roofline`; a CPU's bandwidth is measured. What devices tell each other is left out.
"""

import math
import re
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dms_jax.config import ModelConfig
from dms_jax.core.cr_schedule import realised_cr
from dms_jax.errors import ConfigError
from dms_jax.planning.flops import attention_flops, matmul_parameters
from dms_jax.planning.hardware import Hardware
from dms_jax.planning.roofline import DECODE, PRODUCTS

UNITS = {
    "": 1,
    "b": 1,
    "k": 2**10,
    "kib": 2**10,
    "kb": 1e3,
    "m": 2**20,
    "mib": 2**20,
    "mb": 1e6,
    "g": 2**30,
    "gib": 2**30,
    "gb": 1e9,
    "t": 2**40,
    "tib": 2**40,
    "tb": 1e12,
}
BOOK_KEEPING = 12  # of a cached pair: position, expiry, score
READ_BOOK_KEEPING = 8
STEP = 64  # capacities are multiples of it
WORTH = 1.1  # times as fast, below which a speed-up is not one


def parse_bytes(text: str) -> float:
    """`80GiB`, `64GB`, `120000000` in bytes. Raises ConfigError."""
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]*)?)\s*([a-z]*)", text.strip().lower())
    if match is None or match[2] not in UNITS or float(match[1]) <= 0:
        raise ConfigError(f"--memory wants a size such as 80GiB or 64GB, got {text!r}")
    return float(match[1]) * UNITS[match[2]]


def serving_plan(
    config: ModelConfig,
    hardware: Hardware,
    mesh: tuple[int, ...],
    budget: float | None,
    users: int,
    context: int,
    headroom: float,
    ratios: tuple[float, ...],
) -> dict[str, Any]:
    """Arms `dense` and one a nominal ratio: capacity, rows that fit, tokens/s. `mesh` is data x model: each of its `data` groups holds all weights.

    Raises ConfigError for a context beyond the model's and for memory that does not hold the weights.
    """
    data, model = mesh[0], math.prod(mesh[1:])
    limit, _ = config.context_limit()
    if context > limit:
        raise ConfigError(f"--context {context} is beyond this model's context of {limit}")
    chip = hardware.chip
    number = 2 if chip else 4  # bytes of a weight: bf16, on a CPU fp32
    memory = budget if budget is not None else hardware.usable_bytes * (hardware.count if chip else 1)
    output = config.vocab_size * config.hidden_size
    weights = number * (matmul_parameters(config) + (0 if config.tie_word_embeddings else output))
    if data * weights >= memory:
        what = f"{memory / 2**30:.1f} GiB do not hold {data} x {weights / 2**30:.1f} GiB of weights"
        raise ConfigError(
            f"{what}; use more or larger devices, or a larger model side of --mesh ({data}x{model} keeps {data} copies)"
        )
    pair = config.num_layers * config.num_kv_heads * 2 * config.head_dim * number
    book = config.num_layers * config.num_kv_heads
    split = math.gcd(config.num_kv_heads, model)  # KV heads that a mesh axis does not divide are held by each device
    copies = model / split
    window = config.require_dms().window_size
    arms: dict[str, tuple[float, float, int]] = {"dense": (1.0, float(context), context)}
    for ratio in ratios:
        live = context / realised_cr(ratio, context, window)
        arms[f"cr {ratio:g}"] = ratio, live, min(context, math.ceil(headroom * live))
    rates = decode_rates(hardware)
    rows = []
    for name, (ratio, live, wanted) in arms.items():
        capacity = -(-wanted // STEP) * STEP
        row_bytes = capacity * (pair + BOOK_KEEPING * book) * copies
        most = int((memory - data * weights) // row_bytes)
        batch = min(users, most)
        row: dict[str, Any] = {
            "arm": name,
            "nominal_cr": ratio,
            "realised_cr": context / live,
            "capacity_per_layer": [capacity] * config.num_layers,
            "cache_bytes_per_user": row_bytes,
            "most_users": most,
            "fits": most >= users,
            "batch": batch,
        }
        for label, n in (("tokens_per_second", batch), ("tokens_per_second_at_most_users", most)):
            read = (
                data * (weights - (0 if config.tie_word_embeddings else number * output))
                + n * live * (pair + READ_BOOK_KEEPING * book) * copies
            )
            flops = n * (
                2.0 * matmul_parameters(config) + 2 * attention_flops(config, 1) * live
            )  # a new token sees all live pairs
            row[label] = None if n == 0 else n / max(read / rates.bandwidth, flops / rates.flops)
        rows.append(row)
    source = {
        "capacity_per_layer": f"analytic: mean live pairs at window {window} if decisions do not depend on the position, x {headroom:g} because "
        "heads differ; generate grows it when a head needs more",
        "most_users": f"analytic: (memory - weights) / cache of one user; memory: {'given' if budget is not None else hardware.source}",
        "tokens_per_second": "analytic: users / max(bytes of weights and live pairs / bandwidth, FLOPs / rate of products); "
        + rates.source,
    }
    return {
        "hardware": hardware.name,
        "mesh": "x".join(map(str, mesh)),
        "users": users,
        "context": context,
        "memory_bytes": memory,
        "weight_bytes": weights,
        "fits": any(row["fits"] for row in rows),
        "arms": rows,
        "advice": advice(rows, users, context, window),
        "source": source,
    }


class DecodeRates(NamedTuple):
    """What all devices reach together."""

    bandwidth: float  # bytes/s
    flops: float  # 1/s
    source: str


def decode_rates(hardware: Hardware) -> DecodeRates:
    """Of an accelerator what its like reached of the data sheet; of a CPU the bandwidth of a copy, measured now."""
    chip = hardware.chip
    if chip is None:
        bandwidth = copy_bandwidth()
        return DecodeRates(
            bandwidth, math.inf, f"measured here: a copy, {bandwidth / 1e9:.1f} GB/s; products are not counted"
        )
    memory, products = DECODE[chip.platform], PRODUCTS[chip.platform]
    source = f"data sheet ({chip.source}) x {memory.part:.2f}, {memory.source}; products x {products.part:.2f}, {products.source}"
    return DecodeRates(
        chip.bandwidth * memory.part * hardware.count, chip.flops * products.part * hardware.count, source
    )


def copy_bandwidth(elements: int = 1 << 25) -> float:
    """Bytes/s that this process's first device reads and writes, the best of five."""
    x, copy, seconds = jnp.zeros(elements, jnp.float32), jax.jit(lambda x: x + 1.0, donate_argnums=0), []
    for _ in range(6):
        start = time.perf_counter()
        x = copy(x).block_until_ready()
        seconds.append(time.perf_counter() - start)
    return 2 * 4 * elements / min(seconds)


def advice(arms: list[dict], users: int, context: int, window: int) -> list[str]:
    """Plain sentences: where DMS helps here, and where it will not."""
    dense, best = arms[0], arms[-1]
    if context <= window + 1:
        return [
            f"DMS will not help: a context of {context} lies within the window of {window}, in which nothing is evicted."
        ]
    said = []
    if not dense["fits"] and best["fits"]:
        said.append(
            f"DMS decides whether it fits: dense serves {dense['most_users']} of {users} users, CR {best['nominal_cr']:g} all of them."
        )
    elif not best["fits"]:
        said.append(
            f"Even CR {best['nominal_cr']:g} serves {best['most_users']} of {users} users; dense {dense['most_users']}."
        )
    if dense["fits"] and dense["tokens_per_second"]:
        gain = best["tokens_per_second"] / dense["tokens_per_second"]
        if gain < WORTH:
            said.append(
                f"DMS will not make this faster ({gain:.2f}x at CR {best['nominal_cr']:g}): with {users} user{'s' * (users > 1)} at {context} "
                "tokens the weights are nearly all that a step reads. It helps with more users or longer contexts."
            )
        else:
            said.append(f"At equal users CR {best['nominal_cr']:g} decodes {gain:.2f}x as fast as dense.")
    if dense["tokens_per_second_at_most_users"] and best["tokens_per_second_at_most_users"]:
        gain = best["tokens_per_second_at_most_users"] / dense["tokens_per_second_at_most_users"]
        said.append(
            f"With the memory full: {best['most_users']} users instead of {dense['most_users']}, {gain:.2f}x the tokens a second."
        )
    return said
