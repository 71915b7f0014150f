"""How many users a memory budget serves, and how fast, dense and with compact caches; and where compression will not help.

Decoding reads all weights and all live pairs once a step: memory bandwidth is what counts. Figures are analytic; what hardware reaches of its data
sheet's bandwidth is data in `roofline.DECODE`.
"""

import math
import re
from typing import Any

from dms_jax.config import ConfigError, ModelConfig
from dms_jax.core.cr_schedule import realised_cr
from dms_jax.cost import matmul_parameters
from dms_jax.roofline import DECODE
from dms_jax.target_hardware import Hardware

UNITS = {"": 1, "b": 1, "k": 2**10, "kib": 2**10, "kb": 1e3, "m": 2**20, "mib": 2**20, "mb": 1e6, "g": 2**30, "gib": 2**30, "gb": 1e9,
         "t": 2**40, "tib": 2**40, "tb": 1e12}  # fmt: skip
BYTES = 2  # of a bf16 number
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


def serving_plan(config: ModelConfig, hardware: Hardware, mesh: tuple[int, ...], budget: float | None, users: int, context: int, headroom: float,
                 ratios: tuple[float, ...]) -> dict[str, Any]:  # fmt: skip
    """Arms `dense` and one a nominal ratio: capacity, rows that fit, tokens/s. `mesh` is data x model: each of its `data` groups holds all weights.

    Raises ConfigError for a context beyond the model's and for memory that does not hold the weights.
    """
    data, model = mesh[0], math.prod(mesh[1:])
    limit = config.max_position_embeddings if config.sliding_window is None else min(config.max_position_embeddings, config.sliding_window)
    if context > limit:
        raise ConfigError(f"--context {context} is beyond this model's context of {limit}")
    chip = hardware.chip
    memory = budget if budget is not None else hardware.usable_bytes * (hardware.count if chip else 1)
    output = config.vocab_size * config.hidden_size
    weights = BYTES * (matmul_parameters(config) + (0 if config.tie_word_embeddings else output))
    if data * weights >= memory:
        what = f"{memory / 2**30:.1f} GiB do not hold {data} x {weights / 2**30:.1f} GiB of weights"
        raise ConfigError(f"{what}; use more or larger devices, or a larger model side of --mesh ({data}x{model} keeps {data} copies)")
    pair = config.num_layers * config.num_kv_heads * 2 * config.head_dim * BYTES
    book = config.num_layers * config.num_kv_heads
    split = math.gcd(config.num_kv_heads, model)  # KV heads that a mesh axis does not divide are held by each device
    copies = model / split
    window = config.policy.window_size
    arms: dict[str, tuple[float, float, int]] = {"dense": (1.0, float(context), context)}
    for ratio in ratios:
        live = context / realised_cr(ratio, context, window)
        arms[f"cr {ratio:g}"] = ratio, live, min(context, math.ceil(headroom * live))
    reached = DECODE.get(hardware.platform)
    bandwidth = chip.bandwidth * reached.part * hardware.count if chip and reached else None
    rows = []
    for name, (ratio, live, wanted) in arms.items():
        capacity = -(-wanted // STEP) * STEP
        row_bytes = capacity * (pair + BOOK_KEEPING * book) * copies
        most = int((memory - data * weights) // row_bytes)
        batch = min(users, most)
        row: dict[str, Any] = {"arm": name, "nominal_cr": ratio, "realised_cr": context / live, "capacity_per_layer": [capacity] * config.num_layers,
               "cache_bytes_per_user": row_bytes, "most_users": most, "fits": most >= users, "batch": batch}  # fmt: skip
        for label, n in (("tokens_per_second", batch), ("tokens_per_second_at_most_users", most)):
            read = data * (weights - (0 if config.tie_word_embeddings else BYTES * output)) + n * live * (pair + READ_BOOK_KEEPING * book) * copies
            row[label] = None if bandwidth is None or n == 0 else n * bandwidth / read
        rows.append(row)
    source = {
        "capacity_per_layer": f"analytic: mean live pairs at window {window} if decisions do not depend on the position, x {headroom:g} because "
        "heads differ; generate grows it when a head needs more",
        "most_users": f"analytic: (memory - weights) / cache of one user; memory: {'given' if budget is not None else hardware.source}",
        "tokens_per_second": "unknown for a CPU: measure with benchmarks.decode",
    }
    if chip and reached:
        sheet = f"data sheet ({chip.source}) x {reached.part:.2f}, {reached.source}"
        source["tokens_per_second"] = f"analytic: users x bandwidth / (weights + live pairs); bandwidth: {sheet}"
    return {
        "hardware": hardware.name, "mesh": "x".join(map(str, mesh)), "users": users, "context": context, "memory_bytes": memory,
        "weight_bytes": weights, "fits": any(row["fits"] for row in rows), "arms": rows, "advice": advice(rows, users, context, window),
        "source": source,
    }  # fmt: skip


def advice(arms: list[dict], users: int, context: int, window: int) -> list[str]:
    """Plain sentences: where DMS helps here, and where it will not."""
    dense, best = arms[0], arms[-1]
    if context <= window + 1:
        return [f"DMS will not help: a context of {context} lies within the window of {window}, in which nothing is evicted."]
    said = []
    if not dense["fits"] and best["fits"]:
        said.append(f"DMS decides whether it fits: dense serves {dense['most_users']} of {users} users, CR {best['nominal_cr']:g} all of them.")
    elif not best["fits"]:
        said.append(f"Even CR {best['nominal_cr']:g} serves {best['most_users']} of {users} users; dense {dense['most_users']}.")
    if dense["fits"] and dense["tokens_per_second"]:
        gain = best["tokens_per_second"] / dense["tokens_per_second"]
        if gain < WORTH:
            said.append(
                f"DMS will not make this faster ({gain:.2f}x at CR {best['nominal_cr']:g}): with {users} users at {context} tokens the weights "
                "are nearly all that a step reads. It helps with more users or longer contexts."
            )
        else:
            said.append(f"At equal users CR {best['nominal_cr']:g} decodes {gain:.2f}x as fast as dense.")
    if dense["tokens_per_second_at_most_users"] and best["tokens_per_second_at_most_users"]:
        gain = best["tokens_per_second_at_most_users"] / dense["tokens_per_second_at_most_users"]
        said.append(f"With the memory full: {best['most_users']} users instead of {dense['most_users']}, {gain:.2f}x the tokens a second.")
    return said
