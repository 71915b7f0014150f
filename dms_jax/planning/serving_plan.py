"""Plan a server: how many users fit into memory and how fast it decodes, with a dense cache and with compact ones.

A decode step reads all weights and all live pairs once, so memory bandwidth limits it; with very many users, matrix
products do. `roofline` holds the fraction of each data-sheet rate that programs achieve; the bandwidth of a CPU is
measured. Communication between devices is not counted. Begin with `serving_plan`.
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

UNITS = {"": 1, "b": 1, "kb": 1e3, "mb": 1e6, "gb": 1e9, "tb": 1e12}
UNITS |= {letter + suffix: 2 ** (10 * power) for power, letter in enumerate("kmgt", 1) for suffix in ("", "ib")}
BOOKKEEPING = 12  # bytes per cached pair: position, expiry, score
READ_BOOKKEEPING = 8  # of these, the bytes that a decode step reads
MIN_SPEEDUP = 1.1  # a smaller speed-up is not worth mentioning


def parse_bytes(text: str) -> float:
    """Parse `80GiB`, `64GB` or `120000000`."""
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]*)?)\s*([a-z]*)", text.strip().lower())
    if match is None or match[2] not in UNITS or float(match[1]) <= 0:
        raise ConfigError(f"--memory must be a positive size such as 80GiB or 64GB, got {shown(text)}")
    return float(match[1]) * UNITS[match[2]]


class ServingPlan(NamedTuple):
    """The plan of one server for several arms: the dense cache, and one compact cache per compression ratio."""

    setting: dict[str, Any]  # the hardware and the load that were asked for
    figures: list[Figure]  # figures that all arms share
    arms: dict[str, list[Figure]]  # figures of each arm by its name
    advice: list[str]


class Load(NamedTuple):
    """The cache of one user in one arm."""

    nominal_cr: float
    live: float  # mean number of live pairs per KV head
    capacities: list[int]  # slots per KV head of each layer


class ModelBytes(NamedTuple):
    """Sizes of a model on a mesh, in bytes."""

    data: int  # number of groups of devices that hold all weights
    weights: int  # all weights, per group
    read_weights: int  # weights that a decode step reads, per group: all but a separate input embedding
    pair: float  # keys and values per token, in all layers, KV heads and copies
    bookkeeping: float  # positions, expiries and scores per token, in all layers, KV heads and copies
    read_bookkeeping: float  # the part of `bookkeeping` that a decode step reads


def serving_plan(
    config: ModelConfig,
    hardware: Hardware,
    mesh: tuple[int, ...],
    budget: float | None,
    users: int,
    context: int,
    headroom: float,
    ratios: tuple[float, ...],
    budgets: tuple[tuple[int, ...], ...] | None = None,
) -> ServingPlan:
    """Plan the arm `dense`, one arm for each nominal compression ratio in `ratios`, and one for exact `budgets`.

    `budgets` are pairs per layer and KV head, as under the policy `dms_budget`, whose memory is known beforehand.
    `mesh` is data x model; each of the `data` groups holds all weights. `budget` is the memory in bytes; None stands
    for the memory of the hardware. `headroom` is capacity / mean live pairs. Raises ConfigError if the context exceeds
    the model's limit or the weights do not fit into the memory.
    """
    limit, name = config.context_limit()
    if context > limit:
        raise ConfigError(f"--context must be at most {limit}, the model's {name}, got {context}")
    sizes = model_bytes(config, hardware, mesh)
    memory = budget if budget is not None else hardware.usable_bytes * (hardware.count if hardware.chip else 1)
    if sizes.data * sizes.weights >= memory:
        copies = f"{sizes.data} x {sizes.weights / 2**30:.1f} GiB of weights"
        raise ConfigError(
            f"{memory / 2**30:.1f} GiB of memory cannot hold {copies}; use more or larger devices, or a mesh with a "
            "larger model axis"
        )
    window = config.require_dms().window_size
    multiple = platform_defaults(hardware.platform).capacity_multiple
    rates = decode_rates(hardware)
    formulas = {
        "capacity_per_layer": f"mean live pairs at window {window}, if decisions do not depend on the position, x "
        f"{headroom:g}, because heads differ, rounded up to a multiple of {multiple}; generate grows the cache when "
        "a head needs more; for exact budgets, the largest one of the layer's heads, and nothing grows",
        "most_users": "(memory - weights) / cache of one user; memory: "
        f"{'given' if budget is not None else hardware.source}",
        "tokens_per_second": "users / max(bytes of weights and live pairs / bandwidth, FLOPs / rate of products); "
        + rates.source,
    }
    by_ratio = loads(config, context, headroom, ratios, multiple)
    exact = {} if budgets is None else exact_load(context, budgets, multiple)
    arms = {
        name: arm_figures(config, load, sizes, rates, memory, users, context, formulas)
        for name, load in (by_ratio | exact).items()
    }
    values = [{figure.name: figure.value for figure in arms[name]} for name in by_ratio]
    return ServingPlan(
        setting={"hardware": hardware.name, "mesh": "x".join(map(str, mesh)), "users": users, "context": context},
        figures=[
            Figure("memory_bytes", memory, "bytes", "assumed", note="given" if budget is not None else hardware.source),
            Figure("weight_bytes", sizes.weights, "bytes", "analytic"),
            Figure("fits", any(f.value for arm in arms.values() for f in arm if f.name == "fits"), "", "analytic"),
        ],
        arms=arms,
        advice=advice(values, users, context, window),
    )


def model_bytes(config: ModelConfig, hardware: Hardware, mesh: tuple[int, ...]) -> ModelBytes:
    """Count the bytes of weights and of cached tokens in the default dtype of the hardware."""
    number, data, model = number_bytes(hardware.platform), mesh[0], math.prod(mesh[1:])
    embedding = 0 if config.tie_word_embeddings else number * config.vocab_size * config.hidden_size
    weights = number * matmul_parameters(config) + embedding
    heads = config.num_layers * config.num_kv_heads
    # The KV heads are split over their greatest common divisor with the model axis; the other devices hold copies.
    copies = model / math.gcd(config.num_kv_heads, model)
    return ModelBytes(
        data=data,
        weights=weights,
        read_weights=weights - embedding,
        pair=heads * 2 * config.head_dim * number * copies,
        bookkeeping=BOOKKEEPING * heads * copies,
        read_bookkeeping=READ_BOOKKEEPING * heads * copies,
    )


def loads(
    config: ModelConfig, context: int, headroom: float, ratios: tuple[float, ...], multiple: int
) -> dict[str, Load]:
    """Return the load of each arm after `context` tokens. Capacities are rounded up to a multiple of `multiple`."""
    window, layers = config.require_dms().window_size, config.num_layers
    found = {"dense": Load(1.0, float(context), [_round_up(context, multiple)] * layers)}
    for ratio in ratios:
        live = context / realised_cr(ratio, context, window)
        slots = _round_up(min(context, math.ceil(headroom * live)), multiple)
        found[f"cr {ratio:g}"] = Load(ratio, live, [slots] * layers)
    return found


def exact_load(context: int, budgets: tuple[tuple[int, ...], ...], multiple: int) -> dict[str, Load]:
    """Return the load of the arm with exact budgets, in which a head holds its budget, or all tokens if those are
    fewer."""
    held = [[min(pairs, context) for pairs in layer] for layer in budgets]
    live = sum(map(sum, held)) / sum(map(len, held))
    mean = sum(map(sum, budgets)) / sum(map(len, budgets))
    return {f"{mean:g} pairs": Load(context / live, live, [_round_up(max(layer), multiple) for layer in held])}


def _round_up(slots: int, multiple: int) -> int:
    return -(-slots // multiple) * multiple


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
    """Compute the figures of one arm. `batch`, the number of users who are served at once, is limited by `memory`."""
    user_bytes = sum(load.capacities) / config.num_layers * (sizes.pair + sizes.bookkeeping)
    max_users = int((memory - sizes.data * sizes.weights) // user_bytes)
    batch = min(users, max_users)

    def tokens_per_second(users: int) -> float | None:
        read = sizes.data * sizes.read_weights + users * load.live * (sizes.pair + sizes.read_bookkeeping)
        # A new token attends to all live pairs; `attention_flops` counts half of them, as in causal training.
        flops = users * (2.0 * matmul_parameters(config) + 2 * attention_flops(config, 1) * load.live)
        return None if users == 0 else users / max(read / rates.bandwidth, flops / rates.flops)

    def figure(name: str, value: Any, unit: str = "") -> Figure:
        return Figure(name, value, unit, "analytic", formulas.get(name, ""))

    return [
        figure("nominal_cr", load.nominal_cr),
        figure("realised_cr", context / load.live),
        figure("capacity_per_layer", load.capacities, "slots"),
        figure("cache_bytes_per_user", user_bytes, "bytes"),
        figure("most_users", max_users, "users"),
        figure("fits", max_users >= users),
        figure("batch", batch, "users"),
        figure("tokens_per_second", tokens_per_second(batch), "tokens/s"),
        figure("tokens_per_second_at_most_users", tokens_per_second(max_users), "tokens/s"),
    ]


class DecodeRates(NamedTuple):
    """Achievable rates of all devices together, and their source."""

    bandwidth: float  # bytes/s
    flops: float  # FLOP/s
    source: str


def decode_rates(hardware: Hardware) -> DecodeRates:
    """Return the achievable rates of an accelerator from its data sheet, or of this CPU from a copy benchmark."""
    chip = hardware.chip
    if chip is None:
        bandwidth = copy_bandwidth()
        source = f"measured here: copy, {bandwidth / 1e9:.1f} GB/s; matrix products are not counted"
        return DecodeRates(bandwidth, math.inf, source)
    memory, products = DECODE[chip.platform], PRODUCTS[chip.platform]
    source = f"{memory.times(f'data sheet ({chip.source})')}; {products.times('products')}"
    bandwidth, flops = chip.bandwidth * memory.fraction, chip.flops * products.fraction
    return DecodeRates(bandwidth * hardware.count, flops * hardware.count, source)


def copy_bandwidth(elements: int = 1 << 25) -> float:
    """Measure the bytes/s that the first device of this process reads and writes in a copy; the best of five runs."""
    x, copy, seconds = jnp.zeros(elements, jnp.float32), jax.jit(lambda x: x + 1.0, donate_argnums=0), []
    for _ in range(6):
        start = time.perf_counter()
        x = copy(x).block_until_ready()
        seconds.append(time.perf_counter() - start)
    return 2 * 4 * elements / min(seconds)


def advice(arms: list[dict[str, Any]], users: int, context: int, window: int) -> list[str]:
    """Say in sentences whether DMS helps here.

    The first of `arms` is dense, the last has the highest compression ratio.
    """
    dense, best = arms[0], arms[-1]
    if context <= window + 1:
        return [
            f"DMS will not help: a context of {context} tokens lies within the window of {window}, where nothing is "
            "evicted."
        ]
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
                f"DMS will not make this faster ({gain:.2f}x at {ratio}): with {load}, a step reads little besides "
                "the weights. It pays "
                "off with more users or longer contexts."
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
