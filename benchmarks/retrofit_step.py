"""Measure the cost of a retrofit step: tokens/s compared with plain dense distillation, and compiled memory at several
row lengths.

    python -m benchmarks.retrofit_step                                   # 4 layers of SmolLM2's width, random weights
    python -m benchmarks.retrofit_step --model FOLDER --length 1024 --repeats 7
    python -m benchmarks.retrofit_step --model llama-3.2-1b --length 8192 --arms retrofit_adapter
    python -m benchmarks.retrofit_step --memory-lengths 1024,4096,16384,32768 --mesh 8x1

Plain distillation trains all weights of the same decoder, with the same attention, loss and optimizer and a student
that never evicts, so it differs from mode `full` only by DMS. The arms alternate, so that a busy machine slows down all
of them; compare the ratios of the medians. On an accelerator with a known data sheet, each arm also gets its
model-FLOPs utilization: the FLOPs of a forward pass of student and teacher and of a backward pass of the student,
without recomputation, relative to the dense bf16 peak. The last line is JSON.
"""

import argparse
import json
import math
import statistics
import time

from benchmarks.benchmark_options import add_model
from dms_jax.command import Parser, run_command, start_devices
from dms_jax.errors import ConfigError, suggestion

NAME = "benchmarks.retrofit_step"
ARMS = {  # name -> mode of the retrofit, and whether the student never evicts
    "plain_distillation": ("full", True),
    "retrofit_full": ("full", False),
    "retrofit_adapter": ("adapter", False),
}


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(NAME, __doc__)
    add_model(parser, "", "4 layers of smollm2-135m")
    add = parser.add_argument
    add("--arms", default=",".join(ARMS), metavar="A,B", help="what to time (default %(default)s)")
    add("--mesh", default="1x1", metavar="AxB", help="mesh of data x model (default %(default)s)")
    add("--length", type=int, default=1024, metavar="N", help="tokens per row (default %(default)s)")
    remat = "what the backward pass recomputes: whole layers, or all but matrix products (default %(default)s)"
    add("--remat", default="full", choices=["full", "matmuls"], help=remat)
    repeats = "timings per arm; 0 times nothing (default %(default)s)"
    add("--repeats", type=int, default=5, metavar="N", help=repeats)
    lengths = "row lengths at which memory is compiled; an empty list is none (default %(default)s)"
    add("--memory-lengths", default="1024,4096,16384,32768", metavar="N,M", help=lengths)
    mode = "mode of the retrofit whose memory is compiled (default %(default)s)"
    add("--memory-mode", default="adapter", choices=["adapter", "full"], help=mode)
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
    """Return the step functions, the parameters that train and the frozen ones. With `dense`, the student never
    evicts."""
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
    config = RetrofitConfig(mode=mode, init="zero", length=length, steps=100, cr_steps=80, remat=options.remat)
    config = config.resolved()
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
        spread = f"{min(times):.2f} to {max(times):.2f} s per step"
        print(f"{name:<20}{rates[name]:>10.0f} tokens/s   median of {len(times)}, {spread}")
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
        print("model-FLOPs utilization: " + ", ".join(f"{name} {mfu:.1%}" for name, mfu in result["mfu"].items()))
    return result


def memory(options, mesh, rows: int, length: int) -> dict:
    """Return the bytes per device of the compiled step. On a CPU, XLA omits some workspace of matrix products."""
    steps, _, frozen = build(options, mesh, length, options.memory_mode)
    analysis = steps.lower(frozen, rows).compile().memory_analysis()
    if analysis is None:
        raise ConfigError("--memory-lengths must be empty, because this backend reports no memory of compiled programs")
    result = {
        "length": length,
        "argument_bytes": analysis.argument_size_in_bytes,
        "temporary_bytes": analysis.temp_size_in_bytes,
    }
    arguments, temporary = result["argument_bytes"] / 2**20, result["temporary_bytes"] / 2**20
    print(f"T = {length:>6}: arguments {arguments:>8.0f} MiB, temporary {temporary:>8.0f} MiB per device")
    return result


if __name__ == "__main__":
    run_command(NAME, main)
