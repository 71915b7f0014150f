"""Measure decode steps with dense and with compact caches of the same engine, and compare this engine with
transformers.

    python -m benchmarks.decode --model smollm2-135m --batch 1 --context 4096 --cr 1,2,4,8
    python -m benchmarks.decode --model smollm2-135m --batch 8 --ragged 0.9 --equal-memory
    python -m benchmarks.decode --model FOLDER --transformers --prompt-tokens 512 --new-tokens 32

The caches are filled artificially. One arm is `dense` (no policy, all pairs), and there is one arm for each CR under
the policy. Its heads hold context / CR pairs on average: all the same number, or with --ragged numbers of a given
spread, unless CR is 1. With --live, one arm `live` takes the counts of a real model instead. There are just enough
pages for all heads and for the pairs that the steps append, or with `--cache slots` just enough slots in each layer for
its fullest head. Each line gives the bytes that the cache allocates, those of the keys and values that are live after
the last step, and their ratio. --equal-memory adds arms with as many rows as fit into the bytes that the dense arm
allocates. `in use` is by how much the memory of the device, or on Linux that of the process on a CPU, grows when the
cache is made. The roofline of an arm is the speed at which a step could read its bytes, which are the weights and the
live pairs.

The arms alternate, so that a busy machine slows down all of them, unless their caches do not fit into memory together.
An arm that does not fit even alone is left out, and the output says so. --transformers needs torch and times `generate`
of both engines in fp32, on the same weights and random prompts. Prefill is the time of a call for one token, and decode
is the time that further tokens add. Compare the ratios of the medians. The last line is JSON.
"""

import argparse
import ctypes
import json
import resource
import statistics
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np

from benchmarks.benchmark_options import add_model, check_at_least, parse_ratios
from benchmarks.ragged import (
    add_ragged,
    check_ragged,
    log_normal_counts,
    memory_record,
    memory_text,
    spread,
    spread_record,
)
from dms_jax.command import Parser, run_command, start_devices
from dms_jax.errors import ConfigError
from dms_jax.evaluation.live_counts import LiveCounts

NAME = "benchmarks.decode"


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(NAME, __doc__)
    add_model(parser, "smollm2-135m")
    add = parser.add_argument
    add("--batch", type=int, default=1, metavar="N", help="rows of the dense arm (default %(default)s)")
    context = "tokens seen before the timed steps (default 4096, or those of --live)"
    add("--context", type=int, metavar="N", help=context)
    cr = "realised compression ratios; an empty list leaves the decode arms out (default 1,2,4,8)"
    add("--cr", metavar="X,Y", help=cr)
    add_ragged(parser, "its model must have the shape of --model")
    cache = "pages follow the pairs of each head; slots are as many for all heads of a layer (default %(default)s)"
    add("--cache", choices=("pages", "slots"), default="pages", help=cache)
    add("--steps", type=int, default=16, metavar="N", help="decode steps per timing (default %(default)s)")
    add("--repeats", type=int, default=5, metavar="N", help="timings per arm (default %(default)s)")
    add("--equal-memory", action="store_true", help="also measure as many rows as fit into what dense allocates")
    add("--transformers", action="store_true", help="also time `generate` of transformers (torch, fp32)")
    prompt = "tokens per prompt, with --transformers (default %(default)s)"
    add("--prompt-tokens", type=int, default=512, metavar="N", help=prompt)
    new = "tokens to generate, with --transformers (default %(default)s)"
    add("--new-tokens", type=int, default=32, metavar="N", help=new)
    add("--json", action="store_true", help="print only the JSON line")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    options = parse(argv)
    measured = check_ragged(options)
    ratios = checked_ratios(options, measured)
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
        result |= {"cache": options.cache, "ragged": options.ragged, "live": options.live}
        result["decode"] = decode(options, model, ratios, measured, show)
    if options.transformers:
        from benchmarks.against_transformers import against_transformers

        result["transformers"] = against_transformers(options, model, show)
    print(json.dumps(result))


def checked_ratios(options: argparse.Namespace, measured: LiveCounts | None) -> list[float]:
    """Return the ratios to measure, and set the default of --context. A file of counts has its own of both."""
    if measured is None:
        options.context = 4096 if options.context is None else options.context
        return parse_ratios("1,2,4,8" if options.cr is None else options.cr)
    if options.cr is not None:
        raise ConfigError(
            f"--cr and --live exclude each other, because {options.live} has a CR of {measured.realised_cr:.2f}; "
            "leave --cr out"
        )
    if options.context not in (None, measured.length):
        raise ConfigError(
            f"--context must be the {measured.length} tokens after which {options.live} was measured, got "
            f"{options.context}, because heads spread differently at other lengths; leave --context out"
        )
    options.context = measured.length
    return [measured.realised_cr]


class Arm(NamedTuple):
    """The settings of one arm of the benchmark."""

    dense: bool
    heads: np.ndarray  # live pairs [L R K] of each head at the start; rows take the R kinds of rows in turn
    batch: int

    def counts(self, batch: int | None = None) -> np.ndarray:
        """Return the live pairs [L B K] of `batch` rows, or of the arm's own."""
        return self.heads[:, np.arange(batch or self.batch) % self.heads.shape[1]]


def arms_of(options, config, ratios: list[float], measured: LiveCounts | None) -> dict[str, Arm]:
    """Return the arms of the dense arm's number of rows by their names."""
    context, shape = options.context, (config.num_layers, 1, config.num_kv_heads)
    arms = {"dense": Arm(True, np.full(shape, context), options.batch)}
    if measured is not None:
        spread_of = f"use --ragged {spread(measured.counts):.2f}, their coefficient of variation"
        measured.check_heads(options.live, config, spread_of)
        return arms | {"live": Arm(False, measured.counts, options.batch)}
    for ratio in ratios:
        live = max(1, round(context / ratio))
        heads = np.full(shape, live)
        if options.ragged is not None and live < context:
            low = min(config.require_dms().window_size + 1, context)
            heads = log_normal_counts(heads.size, live, options.ragged, low, context).reshape(shape)
        arms[f"cr {ratio:g}"] = Arm(False, heads, options.batch)
    return arms


def decode(options, model, ratios: list[float], measured: LiveCounts | None, show) -> list[dict]:
    """Return a record for each arm. Each step feeds back the most likely token of the step before."""
    import jax

    from benchmarks.filled_cache import allocated_bytes, allocated_page_bytes, max_rows
    from benchmarks.timing import measure_ceilings

    total = (options.repeats + 1) * options.steps
    if options.context + total > model.config.max_position_embeddings:
        raise ConfigError(
            f"--context plus {total} steps must fit into this model's context of "
            f"{model.config.max_position_embeddings} tokens, got {options.context + total}; use a smaller --context"
        )
    arms = arms_of(options, model.config, ratios, measured)
    in_pages = options.cache == "pages"
    size = lambda arm, batch: (
        allocated_page_bytes(model, arm.counts(batch), options.context, total, arm.dense)
        if in_pages
        else allocated_bytes(model, arm.counts(batch), total, arm.dense)
    )
    need = {name: size(arm, arm.batch) for name, arm in arms.items()}
    if options.equal_memory:
        for name, arm in [(name, arm) for name, arm in arms.items() if arm.heads.mean() < options.context]:
            rows = max_rows(lambda batch, arm=arm: size(arm, batch), need["dense"])
            arms[f"{name}, equal memory"] = arm._replace(batch=rows)
            need[f"{name}, equal memory"] = size(arm, rows)
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
            timed |= timed_arms(model, {name: arms[name] for name in group}, options, total)
        except jax.errors.JaxRuntimeError as why:  # out of memory all the same; the other arms go on
            left_out |= {name: " ".join(str(why).split())[:200] for name in group}
    bandwidth = measure_ceilings(model.embed[...].dtype, 3, quick=True)[0].copy_bytes
    rows, dense = [], timed.get("dense")
    for name, timing in timed.items():
        row = arm_record(name, arms[name], timing, model, options)
        row |= compared_with_dense(row, model, dense, options.batch, bandwidth)
        rows.append(row)
        show(described(row))
    for name, why in left_out.items():
        rows.append({"arm": name, "skipped": why})
        show(f"{name:<16} left out: {why}")
    return rows


def arm_record(name: str, arm: Arm, timing: tuple, model, options) -> dict:
    """Return what was measured on one arm. `timing` is its item of `timed_arms`."""
    seconds, at_end, allocated, in_use = timing
    median, counts = statistics.median(seconds), arm.counts()
    pair_bytes = 2 * model.config.head_dim * model.embed[...].dtype.itemsize
    return {
        "arm": name,
        "batch": arm.batch,
        "rows_to_dense": arm.batch / options.batch,
        "tokens_seen": options.context,
        "live_at_start": float(counts.mean()),
        **spread_record(counts),
        "live_at_end": float(at_end.mean()),
        **memory_record(at_end, allocated, pair_bytes),
        "in_use_bytes": in_use,
        "step_ms": 1e3 * median,
        "tokens_per_s": arm.batch / median,
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
    text = f"{row['arm']:<20} {row['batch']:>4} rows, live {row['live_at_start']:>7.1f} "
    text += f"({row['live_min']} to {row['live_max']}), {row['step_ms']:>8.2f} ms per step "
    text += f"({min(times):.2f} to {max(times):.2f}), {row['tokens_per_s']:>8.1f} tokens/s"
    text += f", {memory_text(row)}"
    if row["in_use_bytes"] is not None:
        text += f", in use {row['in_use_bytes'] / 2**20:.1f} MiB"
    if "speed_to_dense" in row:
        text += f", {row['speed_to_dense']:.2f}x dense (roofline {row['roofline_speed_to_dense']:.2f}x)"
    return text


def timed_arms(model, arms: dict[str, Arm], options, total: int) -> dict:
    """Return for each arm the seconds per step, the live pairs [L B K] at the end, the bytes of the cache, and those
    by which the memory in use grew for it, if known."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    import dms_jax
    from benchmarks.filled_cache import filled_cache, filled_pages

    make = filled_pages if options.cache == "pages" else filled_cache
    jax.block_until_ready(nnx.state(model))  # so that no memory of the weights is counted
    caches, in_use = {}, {}
    for name, arm in arms.items():
        before = bytes_in_use()
        caches[name] = jax.block_until_ready(make(model, arm.counts(), options.context, total, arm.dense))
        after = bytes_in_use()
        in_use[name] = None if before is None or after is None else after - before
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
        name: (seconds[name], np.asarray(cache.live_counts), cache.bytes, in_use[name])
        for name, cache in caches.items()
    }


def step_bytes(model, batch: int, live: float) -> int:
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
    return weights + round(config.num_layers * batch * config.num_kv_heads * live) * pair


def bytes_in_use() -> int | None:
    """Return the bytes in use on the device. A CPU does not report them; there it is the resident memory of this
    process, on Linux, after free memory went back to the system."""
    import jax

    stats = jax.devices()[0].memory_stats() or {}
    if "bytes_in_use" in stats:
        return stats["bytes_in_use"]
    if sys.platform != "linux":
        return None
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):  # glibc
        libc.malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def free_bytes() -> float:
    """Return the free memory of the device; infinity for a device that does not report it, such as a CPU."""
    import jax

    stats = jax.devices()[0].memory_stats() or {}
    return stats["bytes_limit"] - stats["bytes_in_use"] if "bytes_limit" in stats else float("inf")


if __name__ == "__main__":
    run_command(NAME, main)
