"""Measure the cost of a retrofit step: tokens/s next to plain dense distillation, and compiled memory over row lengths.

    python -m benchmarks.retrofit_step                                   # a 4-layer model of SmolLM2's width, random weights
    python -m benchmarks.retrofit_step --model FOLDER --length 1024 --repeats 7
    python -m benchmarks.retrofit_step --model llama-3.2-1b --length 8192 --arms retrofit_adapter
    python -m benchmarks.retrofit_step --memory-lengths 1024,4096,16384,32768 --mesh 8x1

Plain distillation trains all weights of the same decoder, with the same attention, loss and optimizer and a student that never evicts,
so it differs from mode `full` by DMS only. The arms alternate, so that other load on the machine slows all of them; look at the ratio
of the medians. On an accelerator with a known data sheet, each arm also gets its model-FLOPs utilisation: the FLOPs of a forward pass
of student and teacher and of a backward pass through the student, without recomputation, over the dense bf16 peak. The last line is
JSON.
"""

import argparse
import json
import math
import statistics
import time
from typing import get_args

from dms_jax.command import Parser, run_command, start_devices
from dms_jax.config import ImplementationName
from dms_jax.errors import ConfigError, suggestion

NAME = "benchmarks.retrofit_step"
ARMS = {
    "plain_distillation": ("full", True),
    "retrofit_full": ("full", False),
    "retrofit_adapter": ("adapter", False),
}  # mode, dense


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(NAME, __doc__)
    parser.add_argument(
        "--model",
        default="",
        metavar="FOLDER_OR_SHAPE",
        help="default: random weights, 4 layers of smollm2-135m's width",
    )
    parser.add_argument(
        "--layers", type=int, default=0, help="layers of a random model; 0: as many as the named one has"
    )
    parser.add_argument(
        "--arms", default=",".join(ARMS), help="comma-separated list of what to time (default %(default)s)"
    )
    parser.add_argument(
        "--implementation", choices=get_args(ImplementationName), default="auto", help="implementation of attention"
    )
    parser.add_argument("--memory-mode", default="adapter", choices=["adapter", "full"])
    parser.add_argument("--mesh", default="1x1")
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument(
        "--remat",
        default="full",
        choices=["full", "matmuls"],
        help="what the backward pass recomputes: whole layers, or all but matrix products",
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--memory-lengths",
        default="1024,4096,16384,32768",
        help="comma-separated row lengths to compile for; empty for none",
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    options = parse(argv)
    from dms_jax.sharding import make_mesh, parse_mesh

    if not options.model:
        options.model, options.layers = "smollm2-135m", options.layers or 4
    options.arms = [name for name in options.arms.split(",") if name]
    if unknown := [name for name in options.arms if name not in ARMS]:
        raise ConfigError(f"--arms: unknown arm {unknown[0]!r}; {suggestion(unknown[0], ARMS)}")
    sizes = parse_mesh(options.mesh)
    start_devices(math.prod(sizes))
    mesh, data = make_mesh(*sizes), sizes[0]
    result = {
        name: getattr(options, name) for name in ("mesh", "memory_mode", "model", "layers", "implementation", "remat")
    }
    from benchmarks.models import provenance

    result |= provenance()
    if options.repeats:
        result |= speed(options, mesh, data)
    lengths = [int(length) for length in options.memory_lengths.split(",") if length]
    result["memory"] = [memory(options, mesh, data, length) for length in lengths]
    print(json.dumps(result))


def build(options, mesh, length: int, mode: str, dense: bool = False):
    """(step functions, parameters that train, frozen parameters); with `dense`, of a student that never evicts."""
    import jax
    import jax.numpy as jnp

    from benchmarks.models import load as load_model
    from dms_jax.platform_defaults import platform_defaults
    from dms_jax.training.retrofit_config import RetrofitConfig
    from dms_jax.training.step import RetrofitStep, take_apart
    from dms_jax.training.step_functions import step_functions

    class DenseDistillation(RetrofitStep):
        def student_model(self, trainable, frozen):
            student = super().student_model(trainable, frozen)

            def dense_hidden(tokens, noise, segment_ids, remat):
                return student.ramped_hidden(tokens, jnp.float32(1.0), segment_ids, remat), jnp.zeros(noise.shape)

            student.relaxed_hidden = dense_hidden
            return student

    dtype = jnp.dtype(platform_defaults(jax.default_backend()).dtype)
    load = lambda kind: load_model(options.model, options.layers, 8 * length, options.implementation, kind, mesh)[0]
    config = RetrofitConfig(mode=mode, length=length, steps=100, cr_steps=80, remat=options.remat)
    teacher = None if mode == "adapter" else load(dtype)
    student = load(dtype if mode == "adapter" else jnp.float32)  # weights that train are fp32
    kind = DenseDistillation if dense else RetrofitStep
    math, trainable, frozen = take_apart(student, teacher, config, mesh, dtype, kind)
    return step_functions(math, trainable), trainable, frozen


def random_batch(rows: int, length: int):
    import numpy as np

    from dms_jax.training.data.rows import Batch

    ids = np.random.default_rng(0).integers(0, 40000, (rows, length)).astype(np.int32)
    return Batch(ids, np.zeros_like(ids), np.ones(ids.shape, bool), np.arange(rows, dtype=np.int32))


def speed(options, mesh, rows: int) -> dict:
    import jax

    from dms_jax.planning.flops import step_flops
    from dms_jax.planning.hardware import chip_of
    from dms_jax.training.placement import place

    runs, states = {}, {}
    for name in options.arms:
        steps, trainable, frozen = build(options, mesh, options.length, *ARMS[name])
        runs[name], states[name] = (steps, frozen), steps.initial_state(trainable)
    seconds = {name: [] for name in runs}
    batch = place(random_batch(rows, options.length), mesh)
    for repeat in range(options.repeats + 1):
        for name, (steps, frozen) in runs.items():
            start = time.perf_counter()
            states[name], _ = steps.step(states[name], frozen, batch)
            jax.block_until_ready(states[name])
            if repeat:  # the first one compiles
                seconds[name].append(time.perf_counter() - start)
    rates = {name: rows * options.length / statistics.median(times) for name, times in seconds.items()}
    for name, times in seconds.items():
        print(
            f"{name:<20}{rates[name]:>10.0f} tokens/s   median of {len(times)}, {min(times):.2f} to {max(times):.2f} s a step"
        )
    result = {"length": options.length, "rows": rows, "tokens_per_s": rates, "seconds_all": seconds}
    if "plain_distillation" in rates:
        ratios = {
            name: rate / rates["plain_distillation"] for name, rate in rates.items() if name != "plain_distillation"
        }
        print("relative to plain distillation: " + ", ".join(f"{name} {ratio:.2f}" for name, ratio in ratios.items()))
        result["ratio_to_plain_distillation"] = ratios
    if (chip := chip_of(jax.devices()[0].device_kind)) is not None:
        peak = chip.flops * jax.device_count()
        result["mfu"] = {
            name: rates[name] * step_flops(steps.math.student.config, options.length, ARMS[name][0]) / peak
            for name, (steps, _) in runs.items()
        }
        print("model-FLOPs utilisation: " + ", ".join(f"{name} {mfu:.1%}" for name, mfu in result["mfu"].items()))
    return result


def memory(options, mesh, rows: int, length: int) -> dict:
    """Bytes per device of the compiled step. XLA's CPU compiler does not count all workspace of matrix products."""
    steps, _, frozen = build(options, mesh, length, options.memory_mode)
    analysis = steps.lower(frozen, rows).compile().memory_analysis()
    if analysis is None:
        raise ConfigError("this backend reports no memory of compiled programs; use --memory-lengths ''")
    result = {
        "length": length,
        "argument_bytes": analysis.argument_size_in_bytes,
        "temporary_bytes": analysis.temp_size_in_bytes,
    }
    print(
        f"T = {length:>6}: arguments {result['argument_bytes'] / 2**20:>8.0f} MiB, temporary {result['temporary_bytes'] / 2**20:>8.0f} MiB per device"
    )
    return result


if __name__ == "__main__":
    run_command(NAME, main)
