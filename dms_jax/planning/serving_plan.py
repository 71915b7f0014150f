"""Plan a server: how many users a memory budget serves and how fast, dense and with compact caches, and where compression will not help.

A decode step reads all weights and all live pairs once, so memory bandwidth decides; with very many users the matrix products do.
`roofline` lists the fraction of each data-sheet rate that programs achieve; the bandwidth of a CPU is measured. Communication between
devices is not counted.
"""

import math
import re
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dms_jax.config import ModelConfig
from dms_jax.core.cr_schedule import realised_cr
from dms_jax.errors import ConfigError, shown
from dms_jax.planning.figures import Figure
from dms_jax.planning.flops import attention_flops, matmul_parameters
from dms_jax.planning.hardware import Hardware, number_bytes
from dms_jax.planning.roofline import DECODE, PRODUCTS
from dms_jax.platform_defaults import platform_defaults

UNITS = {
    **{
        "": 1,
        "b": 1,
        "k": 2**10,
        "kib": 2**10,
        "m": 2**20,
        "mib": 2**20,
        "g": 2**30,
        "gib": 2**30,
        "t": 2**40,
        "tib": 2**40,
    },
    **{"kb": 1e3, "mb": 1e6, "gb": 1e9, "tb": 1e12},
}
BOOKKEEPING = 12  # bytes of a cached pair: position, expiry, score
READ_BOOKKEEPING = 8  # bytes of them that a decode step reads
MIN_SPEEDUP = 1.1  # a smaller speed-up does not count as one


def parse_bytes(text: str) -> float:
    """Parse `80GiB`, `64GB` or `120000000`."""
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]*)?)\s*([a-z]*)", text.strip().lower())
    if match is None or match[2] not in UNITS or float(match[1]) <= 0:
        raise ConfigError(f"--memory must be a positive size such as 80GiB or 64GB, got {shown(text)}")
    return float(match[1]) * UNITS[match[2]]


class ServingPlan(NamedTuple):
    """A plan of one server; an arm is the dense cache or a compression ratio."""

    setting: dict[str, Any]  # what was asked for
    figures: list[Figure]  # of the whole server
    arms: dict[str, list[Figure]]  # name of the arm -> its figures
    advice: list[str]


class Load(NamedTuple):
    """What one arm keeps for each user."""

    nominal_cr: float
    live: float  # mean live pairs per KV head
    capacity: int  # slots per KV head


class ModelBytes(NamedTuple):
    """Sizes of a model on a mesh, in bytes."""

    data: int  # groups of devices, each with all weights
    weights: int  # of one group
    read_weights: int  # of one group; from a separate input embedding a decode step reads one row only
    pair: float  # a token in the cache: keys and values of all layers, KV heads and copies
    bookkeeping: float  # of a token, the same way
    read_bookkeeping: float


def serving_plan(
    config: ModelConfig,
    hardware: Hardware,
    mesh: tuple[int, ...],
    budget: float | None,
    users: int,
    context: int,
    headroom: float,
    ratios: tuple[float, ...],
) -> ServingPlan:
    """Plan the arm `dense` and one arm for each nominal ratio.

    `mesh` is data x model: each of its `data` groups holds all weights. `budget` is the memory in bytes, None for that of the
    hardware. `headroom` is capacity over mean live pairs. Raises ConfigError for a context that exceeds the model's and for memory that
    does not hold the weights.
    """
    limit, name = config.context_limit()
    if context > limit:
        raise ConfigError(f"--context must be at most {limit}, the model's {name}, got {context}")
    sizes = model_bytes(config, hardware, mesh)
    memory = budget if budget is not None else hardware.usable_bytes * (hardware.count if hardware.chip else 1)
    if sizes.data * sizes.weights >= memory:
        copies = f"{sizes.data} x {sizes.weights / 2**30:.1f} GiB of weights"
        raise ConfigError(
            f"{memory / 2**30:.1f} GiB of memory cannot hold {copies}; use more or larger devices, or a mesh with a larger model axis"
        )
    window = config.require_dms().window_size
    multiple = platform_defaults(hardware.platform).capacity_multiple
    rates = decode_rates(hardware)
    formulas = {
        "capacity_per_layer": f"mean live pairs at window {window} if decisions do not depend on the position, x {headroom:g} because heads "
        f"differ, rounded up to a multiple of {multiple}; generate grows the cache when a head needs more",
        "most_users": f"(memory - weights) / cache of one user; memory: {'given' if budget is not None else hardware.source}",
        "tokens_per_second": "users / max(bytes of weights and live pairs / bandwidth, FLOPs / rate of products); "
        + rates.source,
    }
    arms = {
        name: arm_figures(config, load, sizes, rates, memory, users, context, formulas)
        for name, load in loads(context, window, headroom, ratios, multiple).items()
    }
    values = [{figure.name: figure.value for figure in figures} for figures in arms.values()]
    return ServingPlan(
        setting={"hardware": hardware.name, "mesh": "x".join(map(str, mesh)), "users": users, "context": context},
        figures=[
            Figure("memory_bytes", memory, "bytes", "assumed", note="given" if budget is not None else hardware.source),
            Figure("weight_bytes", sizes.weights, "bytes", "analytic"),
            Figure("fits", any(arm["fits"] for arm in values), "", "analytic"),
        ],
        arms=arms,
        advice=advice(values, users, context, window),
    )


def model_bytes(config: ModelConfig, hardware: Hardware, mesh: tuple[int, ...]) -> ModelBytes:
    number, data, model = number_bytes(hardware.platform), mesh[0], math.prod(mesh[1:])
    embedding = 0 if config.tie_word_embeddings else number * config.vocab_size * config.hidden_size
    weights = number * matmul_parameters(config) + embedding
    heads = config.num_layers * config.num_kv_heads
    # Devices of the model axis beyond the common divisor with the KV heads keep copies of the same heads.
    copies = model / math.gcd(config.num_kv_heads, model)
    return ModelBytes(
        data=data,
        weights=weights,
        read_weights=weights - embedding,
        pair=heads * 2 * config.head_dim * number * copies,
        bookkeeping=BOOKKEEPING * heads * copies,
        read_bookkeeping=READ_BOOKKEEPING * heads * copies,
    )


def loads(context: int, window: int, headroom: float, ratios: tuple[float, ...], multiple: int) -> dict[str, Load]:
    """What each arm keeps of `context` tokens; capacities are rounded up to a `multiple`."""
    round_up = lambda slots: -(-slots // multiple) * multiple
    found = {"dense": Load(1.0, float(context), round_up(context))}
    for ratio in ratios:
        live = context / realised_cr(ratio, context, window)
        found[f"cr {ratio:g}"] = Load(ratio, live, round_up(min(context, math.ceil(headroom * live))))
    return found


def arm_figures(
    config: ModelConfig,
    load: Load,
    sizes: ModelBytes,
    rates: "DecodeRates",
    memory: float,
    users: int,
    context: int,
    formulas: dict[str, str],
) -> list[Figure]:
    user_bytes = load.capacity * (sizes.pair + sizes.bookkeeping)
    max_users = int((memory - sizes.data * sizes.weights) // user_bytes)
    batch = min(users, max_users)

    def tokens_per_second(users: int) -> float | None:
        read = sizes.data * sizes.read_weights + users * load.live * (sizes.pair + sizes.read_bookkeeping)
        # A new token sees all live pairs; the causal count of `attention_flops` sees half.
        flops = users * (2.0 * matmul_parameters(config) + 2 * attention_flops(config, 1) * load.live)
        return None if users == 0 else users / max(read / rates.bandwidth, flops / rates.flops)

    def figure(name: str, value: Any, unit: str = "") -> Figure:
        return Figure(name, value, unit, "analytic", formulas.get(name, ""))

    return [
        figure("nominal_cr", load.nominal_cr),
        figure("realised_cr", context / load.live),
        figure("capacity_per_layer", [load.capacity] * config.num_layers, "slots"),
        figure("cache_bytes_per_user", user_bytes, "bytes"),
        figure("most_users", max_users, "users"),
        figure("fits", max_users >= users),
        figure("batch", batch, "users"),
        figure("tokens_per_second", tokens_per_second(batch), "tokens/s"),
        figure("tokens_per_second_at_most_users", tokens_per_second(max_users), "tokens/s"),
    ]


class DecodeRates(NamedTuple):
    """Achievable rates of all devices together."""

    bandwidth: float  # bytes/s
    flops: float  # FLOP/s
    source: str


def decode_rates(hardware: Hardware) -> DecodeRates:
    """Data sheet x efficiency for an accelerator; a copy benchmark that runs now for a CPU."""
    chip = hardware.chip
    if chip is None:
        bandwidth = copy_bandwidth()
        source = f"measured here: a copy, {bandwidth / 1e9:.1f} GB/s; products are not counted"
        return DecodeRates(bandwidth, math.inf, source)
    memory, products = DECODE[chip.platform], PRODUCTS[chip.platform]
    source = f"{memory.times(f'data sheet ({chip.source})')}; {products.times('products')}"
    bandwidth, flops = chip.bandwidth * memory.fraction, chip.flops * products.fraction
    return DecodeRates(bandwidth * hardware.count, flops * hardware.count, source)


def copy_bandwidth(elements: int = 1 << 25) -> float:
    """Bytes/s that this process's first device reads and writes, the best of five."""
    x, copy, seconds = jnp.zeros(elements, jnp.float32), jax.jit(lambda x: x + 1.0, donate_argnums=0), []
    for _ in range(6):
        start = time.perf_counter()
        x = copy(x).block_until_ready()
        seconds.append(time.perf_counter() - start)
    return 2 * 4 * elements / min(seconds)


def advice(arms: list[dict[str, Any]], users: int, context: int, window: int) -> list[str]:
    """Sentences that say where DMS helps here and where it will not. The first arm is dense, the last has the highest ratio."""
    dense, best = arms[0], arms[-1]
    if context <= window + 1:
        return [f"DMS will not help: nothing is evicted within the window of {window}, and the context is {context}."]
    sentences, ratio = [], f"CR {best['nominal_cr']:g}"
    if not dense["fits"] and best["fits"]:
        sentences.append(
            f"Only DMS fits: dense serves {dense['most_users']} of {users} users, {ratio} serves all of them."
        )
    elif not best["fits"]:
        sentences.append(
            f"Even {ratio} serves only {best['most_users']} of {users} users; dense serves {dense['most_users']}."
        )
    if dense["fits"] and dense["tokens_per_second"]:
        gain = best["tokens_per_second"] / dense["tokens_per_second"]
        if gain < MIN_SPEEDUP:
            load = f"{users} user{'s' * (users > 1)} at {context} tokens"
            sentences.append(
                f"DMS will not make this faster ({gain:.2f}x at {ratio}): with {load}, a step reads little besides the weights. It helps with "
                "more users or longer contexts."
            )
        else:
            sentences.append(f"With the same number of users, {ratio} decodes {gain:.2f}x as fast as dense.")
    dense_full, best_full = dense["tokens_per_second_at_most_users"], best["tokens_per_second_at_most_users"]
    if dense_full and best_full:
        served = f"{best['most_users']} users instead of {dense['most_users']}"
        sentences.append(
            f"When the memory is full, {ratio} serves {served}, at {best_full / dense_full:.2f}x the tokens per second."
        )
    return sentences
