"""Measure decode steps with dense and with compact caches of the same engine, and compare this engine with
transformers.

    python -m benchmarks.decode --model smollm2-135m --batch 1 --context 4096 --cr 1,2,4,8
    python -m benchmarks.decode --model FOLDER --transformers --prompt-tokens 512 --new-tokens 32

The caches are filled artificially: every head holds context / CR pairs, in buffers that are just large enough, and each
step appends one pair. One arm is `dense` (no policy, all pairs), and there is one arm for each CR under the policy. The
roofline of an arm is the speed at which a step could read its bytes, which are the weights and the live pairs.
--equal-memory adds arms with CR times as many rows, which hold as many pairs as the dense arm.

The arms alternate, so that a busy machine slows down all of them, unless their caches do not fit into memory together.
An arm that does not fit even alone is left out, and the output says so. --transformers needs torch and times `generate`
of both engines in fp32, on the same weights and random prompts. Prefill is the time of a call for one token, and decode
is the time that further tokens add. Compare the ratios of the medians. The last line is JSON.
"""

import argparse
import dataclasses
import json
import statistics
import time
from functools import partial
from typing import NamedTuple

from benchmarks.benchmark_options import add_model, check_at_least, parse_ratios
from dms_jax.command import Parser, run_command, start_devices
from dms_jax.errors import ConfigError

NAME = "benchmarks.decode"


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(NAME, __doc__)
    add_model(parser, "smollm2-135m")
    add = parser.add_argument
    add("--batch", type=int, default=1, metavar="N", help="rows of the dense arm (default %(default)s)")
    context = "tokens seen before the timed steps (default %(default)s)"
    add("--context", type=int, default=4096, metavar="N", help=context)
    cr = "realised compression ratios; an empty list leaves the decode arms out (default %(default)s)"
    add("--cr", default="1,2,4,8", metavar="X,Y", help=cr)
    add("--steps", type=int, default=16, metavar="N", help="decode steps per timing (default %(default)s)")
    add("--repeats", type=int, default=5, metavar="N", help="timings per arm (default %(default)s)")
    add("--equal-memory", action="store_true", help="for each CR above 1, also measure CR times as many rows")
    add("--transformers", action="store_true", help="also time `generate` of transformers (torch, fp32)")
    prompt = "tokens per prompt, with --transformers (default %(default)s)"
    add("--prompt-tokens", type=int, default=512, metavar="N", help=prompt)
    new = "tokens to generate, with --transformers (default %(default)s)"
    add("--new-tokens", type=int, default=32, metavar="N", help=new)
    add("--json", action="store_true", help="print only the JSON line")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    options = parse(argv)
    ratios = parse_ratios(options.cr)
    check_at_least(options, batch=1, context=2, steps=1, repeats=1, layers=0, prompt_tokens=2, new_tokens=2)
    start_devices(1)
    from benchmarks.models import load, provenance

    model, weights = load(options.model, options.layers, options.context, options.implementation)
    result = {
        "model": options.model,
        "weights": weights,
        "layers": model.config.num_layers,
        "implementation": options.implementation,
    } | provenance()
    show = (lambda *_: None) if options.json else print
    if ratios:
        result["decode"] = decode(options, model, ratios, show)
    if options.transformers:
        from benchmarks.against_transformers import against_transformers

        result["transformers"] = against_transformers(options, model, show)
    print(json.dumps(result))


def filled_cache(model, batch: int, context: int, live: int, room: int, dense: bool):
    """Make a cache of random numbers that has seen `context` tokens and holds `live` of them: the oldest and the
    newest, half each."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    import dms_jax
    from dms_jax.core.visibility import NEVER
    from dms_jax.engine.cache_capacity import round_up

    cache = dms_jax.init_cache(model, batch, round_up(live + room), overflow="evict", dense=dense)
    position = np.concatenate([np.arange(live - live // 2), np.arange(context - live // 2, context)]).astype(np.int32)

    @partial(jax.jit, donate_argnums=0)
    def fill(layer, key):
        kv = jax.random.normal(key, (2, *layer.k.shape), layer.k.dtype)
        return dataclasses.replace(
            layer,
            k=kv[0],
            v=kv[1],
            position=layer.position.at[:, :, :live].set(position),
            expiry=layer.expiry.at[:, :, :live].set(NEVER),
        )

    layers, cache = list(cache.layers), dataclasses.replace(cache, layers=())
    for index in range(len(layers)):
        layers[index] = fill(layers[index], jax.random.key(index))
    return dataclasses.replace(cache, layers=tuple(layers), seen=jnp.full(batch, context, jnp.int32))


def decode(options, model, ratios: list[float], show) -> list[dict]:
    """Return a record for each arm. Each step feeds back the most likely token of the step before."""
    import jax

    from benchmarks.timing import measure_ceilings

    total = (options.repeats + 1) * options.steps
    if options.context + total > model.config.max_position_embeddings:
        raise ConfigError(
            f"--context plus {total} steps must fit into this model's context of "
            f"{model.config.max_position_embeddings} tokens, got {options.context + total}; use a smaller --context"
        )
    arms = {"dense": Arm(True, 1.0, options.batch)} | {f"cr {r:g}": Arm(False, r, options.batch) for r in ratios}
    if options.equal_memory:
        arms |= {f"cr {r:g}, {r:g}x rows": Arm(False, r, round(options.batch * r)) for r in ratios if r > 1}
    live = {name: max(1, round(options.context / arm.ratio)) for name, arm in arms.items()}
    need = {name: cache_bytes(model, arm.batch, live[name] + total) for name, arm in arms.items()}
    room = free_bytes()
    left_out = {
        name: f"needs {need[name] / 2**30:.1f} GiB of cache, {room / 2**30:.1f} are free"
        for name in arms
        if room < 1.2 * need[name]
    }
    arms = {name: arm for name, arm in arms.items() if name not in left_out}
    together = room >= 1.2 * sum(need[name] for name in arms)
    timed = {}
    for group in [list(arms)] if together else [[name] for name in arms]:
        try:
            timed |= timed_arms(model, {name: arms[name] for name in group}, live, options, total)
        except jax.errors.JaxRuntimeError as why:  # out of memory all the same; the other arms go on
            left_out |= {name: " ".join(str(why).split())[:200] for name in group}
    bandwidth = measure_ceilings(model.embed[...].dtype, 3, quick=True)[0].copy_bytes
    rows, dense = [], timed.get("dense")
    for name, timing in timed.items():
        row = arm_record(name, arms[name].batch, live[name], timing, options.context)
        row |= compared_with_dense(row, model, dense, options.batch, bandwidth)
        rows.append(row)
        show(described(row))
    for name, why in left_out.items():
        rows.append({"arm": name, "skipped": why})
        show(f"{name:<16} left out: {why}")
    return rows


class Arm(NamedTuple):
    """The settings of one arm of the benchmark."""

    dense: bool
    ratio: float  # tokens seen per live pair
    batch: int


def arm_record(name: str, batch: int, live: int, timing: tuple, context: int) -> dict:
    """Return what was measured on one arm. `timing` is its item of `timed_arms`."""
    seconds, live_at_end, size = timing
    median = statistics.median(seconds)
    return {
        "arm": name,
        "batch": batch,
        "tokens_seen": context,
        "live_at_start": live,
        "live_at_end": live_at_end,
        "cache_bytes": size,
        "step_ms": 1e3 * median,
        "tokens_per_s": batch / median,
        "step_ms_all": [1e3 * s for s in seconds],
    }


def compared_with_dense(row: dict, model, dense: tuple | None, dense_batch: int, bandwidth: float) -> dict:
    """Return the bytes of an arm's step and its speed relative to the dense arm and to the roofline.

    If the dense arm does not fit, it is assumed to run at the device's copy bandwidth, faster than it would.
    """
    size = step_bytes(model, row["batch"], row["live_at_start"])
    dense_size = step_bytes(model, dense_batch, row["tokens_seen"])
    roofline = row["batch"] * dense_size / (dense_batch * size)
    of_bandwidth = size / (row["step_ms"] / 1e3) / bandwidth
    found = {"step_bytes": size, "roofline_speed_to_dense": roofline, "fraction_of_copy_bandwidth": of_bandwidth}
    if dense is None:
        return found | {"dense": "counted from bytes", "fraction_of_roofline": of_bandwidth}
    speed = row["tokens_per_s"] * statistics.median(dense[0]) / dense_batch
    return found | {"speed_to_dense": speed, "dense": "measured", "fraction_of_roofline": speed / roofline}


def described(row: dict) -> str:
    """Return the line that shows an arm's record to a person."""
    times = row["step_ms_all"]
    text = f"{row['arm']:<16} live {row['live_at_start']:>6}  {row['step_ms']:>8.2f} ms per step "
    text += f"({min(times):.2f} to {max(times):.2f}), {row['tokens_per_s']:>8.1f} tokens/s"
    if "speed_to_dense" in row:
        text += f", {row['speed_to_dense']:.2f}x dense (roofline {row['roofline_speed_to_dense']:.2f}x)"
    return text


def timed_arms(model, arms: dict[str, Arm], live: dict, options, total: int) -> dict:
    """Return for each arm the seconds per step, the mean live pairs at the end, and the bytes of the cache."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    import dms_jax

    caches = {
        name: filled_cache(model, arm.batch, options.context, live[name], total, arm.dense)
        for name, arm in arms.items()
    }
    seconds = {name: [] for name in arms}
    for repeat in range(options.repeats + 1):
        for name in arms:
            cache = caches.pop(name)
            token = jnp.zeros(cache.batch_size, jnp.int32)
            start = time.perf_counter()
            for _ in range(options.steps):
                logits, cache = dms_jax.decode_step(model, cache, token, donate=True)
                token = jnp.argmax(logits, -1).astype(jnp.int32)
            jax.block_until_ready((token, cache))
            if repeat:  # the first one compiles
                seconds[name].append((time.perf_counter() - start) / options.steps)
            caches[name] = cache
    return {
        name: (seconds[name], float(np.asarray(cache.live_counts).mean()), cache.bytes)
        for name, cache in caches.items()
    }


def cache_bytes(model, batch: int, capacity: int) -> int:
    config = model.config
    return (
        config.num_layers
        * batch
        * config.num_kv_heads
        * capacity
        * (2 * config.head_dim * model.embed[...].dtype.itemsize + 12)
    )


def step_bytes(model, batch: int, live: int) -> int:
    """Return the bytes that a decode step must read: the weights of the layers and of the output, and the live pairs
    with position and expiry."""
    import jax
    from flax import nnx

    config = model.config
    weights = (
        sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(nnx.state(model.layers)))
        + model.output_embedding().nbytes
    )
    pair = 2 * config.head_dim * model.embed[...].dtype.itemsize + 8
    return weights + config.num_layers * batch * config.num_kv_heads * live * pair


def free_bytes() -> float:
    """Return the free memory of the device; infinity for a device that does not report it, such as a CPU."""
    import jax

    stats = jax.devices()[0].memory_stats() or {}
    return stats["bytes_limit"] - stats["bytes_in_use"] if "bytes_limit" in stats else float("inf")


if __name__ == "__main__":
    run_command(NAME, main)
