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
import numpy as np

from dms_jax.config import ModelConfig
from dms_jax.core.cr_schedule import realised_cr
from dms_jax.core.page_counts import (
    PageShape,
    cache_bytes,
    expected_fraction,
    expected_pages,
    largest_that_fits,
    size_class,
    table_columns,
)
from dms_jax.errors import ConfigError, shown
from dms_jax.planning.figures import Figure
from dms_jax.planning.flops import attention_flops, matmul_parameters
from dms_jax.planning.hardware import Hardware, number_bytes
from dms_jax.planning.roofline import DECODE, PRODUCTS
from dms_jax.platform_defaults import platform_defaults

UNITS = {"": 1, "b": 1, "kb": 1e3, "mb": 1e6, "gb": 1e9, "tb": 1e12}
UNITS |= {letter + suffix: 2 ** (10 * power) for power, letter in enumerate("kmgt", 1) for suffix in ("", "ib")}
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
    fraction: float | np.ndarray = 1.0  # of the pairs behind the ring, for which there are pages; or of each head [L K]
    ring: int | None = None  # newest pairs of a head that are kept apart; None for a page of them
    budgets: np.ndarray | None = None  # exact budgets [L K]


class ModelBytes(NamedTuple):
    """Sizes of a model on a mesh, in bytes."""

    data: int  # number of groups of devices that hold all weights
    weights: int  # all weights, per group
    read_weights: int  # weights that a decode step reads, per group: all but a separate input embedding
    pair: float  # keys and values per token, in all layers, KV heads and copies
    devices: int
    kv_heads: int  # of each device
    number: int  # of one number


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
    kept: np.ndarray | None = None,
) -> ServingPlan:
    """Plan the arm `dense`, one arm for each nominal compression ratio in `ratios`, and one for exact `budgets`.

    `budgets` are pairs per layer and KV head, as under the policy `dms_budget`, whose memory is known beforehand.
    `kept` [L K] is the measured fraction of the pairs behind the window that each head keeps; the arm `live` then
    replaces those of `ratios`. `mesh` is data x model; each of the `data` groups holds all weights. `budget` is the
    memory in bytes; None stands for that of the hardware. `headroom` is pages / pages that the pairs behind the window
    need. Raises ConfigError if the context exceeds the model's limit or the weights do not fit into the memory.
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
    page_size, rates = platform_defaults(hardware.platform).page_size, decode_rates(hardware)
    others = "1 / CR of the others" if kept is None else "of the others the measured fraction of each head"
    formulas = {
        "cache_bytes_per_user": f"what init_pages allocates for all users, in pages of {page_size} pairs: the newest "
        f"{window + 1} pairs of each head, and {others} x {headroom:g}, because texts differ; it grows when more "
        "stay; for exact budgets, the budgets, and nothing grows",
        "most_users": "those whose caches fit into memory - weights; memory: "
        f"{'given' if budget is not None else hardware.source}",
        "tokens_per_second": "users / max(bytes of weights and live pairs / bandwidth, FLOPs / rate of products); "
        + rates.source,
    }
    by_ratio = loads(config, context, headroom, ratios, kept)
    exact = {} if budgets is None else exact_load(context, budgets, window)
    arms = {
        name: arm_figures(config, load, sizes, rates, memory, users, context, page_size, formulas)
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
        devices=data * model,
        kv_heads=config.num_kv_heads // math.gcd(config.num_kv_heads, model),
        number=number,
    )


def loads(
    config: ModelConfig, context: int, headroom: float, ratios: tuple[float, ...], kept: np.ndarray | None = None
) -> dict[str, Load]:
    """Return the load of each arm after `context` tokens; arguments as in `serving_plan`."""
    window = config.require_dms().window_size
    found = {"dense": Load(1.0, float(context))}
    if kept is not None:
        mean = float(kept.mean())
        live = min(context, window + 1) + max(0, context - window - 1) * mean
        nominal = 1 / max(mean, 1 / context)  # finite if nothing stays
        return found | {"live": Load(nominal, live, np.minimum(1.0, headroom * kept), window + 1)}
    for ratio in ratios:
        live = context / realised_cr(ratio, context, window)
        found[f"cr {ratio:g}"] = Load(ratio, live, expected_fraction(ratio, headroom), window + 1)
    return found


def exact_load(context: int, budgets: tuple[tuple[int, ...], ...], window: int) -> dict[str, Load]:
    """Return the load of the arm with exact budgets, in which a head holds its budget, or all tokens if those are
    fewer."""
    table = np.array(budgets)
    live = float(np.minimum(table, context).mean())
    return {f"{table.mean():g} pairs": Load(context / live, live, ring=window + 1, budgets=table)}


def users_bytes(
    config: ModelConfig, load: Load, sizes: ModelBytes, users: int, context: int, page_size: int
) -> tuple[int, int]:
    """Return the pages of a device and the bytes of all devices that `init_pages` allocates for `users` rows of
    `context` tokens."""
    rows, ring = -(-users // sizes.data), load.ring or page_size
    shape = PageShape(page_size, config.head_dim, sizes.number, load.budgets is not None)
    pages = expected_pages(
        np.array([context]), ring, page_size, load.fraction, config.num_layers, config.num_kv_heads, load.budgets
    )
    of_device = pages.reshape(config.num_layers, -1, sizes.kv_heads).sum(axis=(0, 2)).max()
    num_pages = size_class(1 + rows * int(of_device), shape.page_bytes)
    heads = config.num_layers * rows * sizes.kv_heads
    columns = table_columns(context, ring, page_size, load.budgets)
    return num_pages, sizes.devices * cache_bytes(shape, num_pages, columns, ring, heads, rows)


def arm_figures(
    config: ModelConfig,
    load: Load,
    sizes: ModelBytes,
    rates: "DecodeRates",
    memory: float,
    users: int,
    context: int,
    page_size: int,
    formulas: dict[str, str],
) -> list[Figure]:
    """Compute the figures of one arm. `batch`, the number of users who are served at once, is limited by `memory`."""
    needed = lambda users: users_bytes(config, load, sizes, users, context, page_size)
    free, (pages, allocated) = memory - sizes.data * sizes.weights, needed(users)
    max_users = largest_that_fits(lambda users: needed(users)[1] <= free)
    batch = min(users, max_users)

    def tokens_per_second(users: int) -> float | None:
        read = sizes.data * sizes.read_weights + users * load.live * sizes.pair
        # A new token attends to all live pairs; `attention_flops` counts half of them, as in causal training.
        flops = users * (2.0 * matmul_parameters(config) + 2 * attention_flops(config, 1) * load.live)
        return None if users == 0 else users / max(read / rates.bandwidth, flops / rates.flops)

    def figure(name: str, value: Any, unit: str = "") -> Figure:
        return Figure(name, value, unit, "analytic", formulas.get(name, ""))

    return [
        figure("nominal_cr", load.nominal_cr),
        figure("realised_cr", context / load.live),
        figure("pages_per_device", pages, "pages"),
        figure("cache_bytes_per_user", allocated / users, "bytes"),
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
    sentences, ratio = [], f"CR {best['nominal_cr']:.3g}"
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
