"""What a retrofit step costs: tokens/s next to plain dense distillation in the same run, and compiled memory over row lengths.

    python -m benchmarks.retrofit_step                                   # a 4-layer model of SmolLM2's width, random weights
    python -m benchmarks.retrofit_step --model FOLDER --length 1024 --repeats 7
    python -m benchmarks.retrofit_step --memory-lengths 1024,4096,16384,32768 --mesh 8x1

Plain distillation trains all weights of the same decoder, with the same attention, loss and optimizer, and a student that never
evicts: its difference to mode `full` is DMS. The arms alternate, so that a busy machine hurts all; the ratio of the medians is
what to look at. The last line is JSON.
"""

import argparse
import json
import statistics
import time

from dms_jax.command import Parser, run_command, start_devices
from dms_jax.config import ConfigError

NAME = "benchmarks.retrofit_step"


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(prog=f"python -m {NAME}", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--model", default="", metavar="FOLDER", help="real weights; without it random ones of SmolLM2's width")
    parser.add_argument("--layers", type=int, default=4, help="of the random model")
    parser.add_argument("--memory-mode", default="adapter", choices=["adapter", "full"])
    parser.add_argument("--mesh", default="1x1")
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--memory-lengths", default="1024,4096,16384,32768", help="row lengths to compile for; empty for none")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    options = parse(argv)
    from dms_jax.sharding import make_mesh, parse_mesh

    data, model_axis = parse_mesh(options.mesh)
    start_devices(data * model_axis)
    mesh = make_mesh(data, model_axis)
    result = {"mesh": options.mesh, "memory_mode": options.memory_mode} | provenance(options.model)
    if options.repeats:
        result |= speed(options, mesh, data)
    lengths = [int(length) for length in options.memory_lengths.split(",") if length]
    result["memory"] = [memory(options, mesh, data, length) for length in lengths]
    print(json.dumps(result))


def provenance(model: str) -> dict:
    import jax

    return {"jax": jax.__version__, "device": jax.devices()[0].device_kind, "devices": jax.device_count(), "weights": model or "random"}


def build(options, mesh, length: int, mode: str, dense: bool = False):
    """A Retrofit, or with `dense` one whose student never evicts."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    import dms_jax
    from dms_jax.config import DMSConfig, ModelConfig
    from dms_jax.models.decoder import Decoder
    from train.retrofit_config import LossConfig, OptimizerConfig
    from train.step import Retrofit, StepConfig

    dms = DMSConfig(window_size=128, target_cr=4.0)
    shape = ModelConfig("llama", 49152, 576, 1536, options.layers, 9, 3, 64, tie_word_embeddings=True, max_position_embeddings=1 << 20)

    def load(policy):
        if options.model:
            return dms_jax.load(options.model, mesh=mesh, dms=policy)
        return Decoder(shape.with_dms(policy), rngs=nnx.Rngs(0))

    step = StepConfig(mode=mode, seed=0, length=length, steps=100, accumulate=1, initial_cr=1.0, ramp_steps=0, cr_steps=80, remat="full",
                      loss=LossConfig(), optimizer=OptimizerConfig())  # fmt: skip

    class DenseDistillation(Retrofit):
        def student_model(self, trainable, frozen):
            student = super().student_model(trainable, frozen)

            def dense_hidden(tokens, noise, segment_ids, remat):
                return student.ramped_hidden(tokens, jnp.float32(1.0), segment_ids, remat), jnp.zeros(noise.shape)

            student.relaxed_hidden = dense_hidden
            return student

    teacher = None if mode == "adapter" else load(None)
    dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    return (DenseDistillation if dense else Retrofit)(load(dms), teacher, step, mesh, dtype)


def batch_of(length: int):
    import numpy as np

    from train.rows import Batch

    def rows(start: int, count: int):
        ids = np.random.default_rng(start).integers(0, 40000, (count, length)).astype(np.int32)
        return Batch(ids, np.zeros_like(ids), np.ones(ids.shape, bool), np.arange(start, start + count, dtype=np.int32))

    return rows


def speed(options, mesh, rows: int) -> dict:
    import jax

    arms = {
        "plain_distillation": build(options, mesh, options.length, "full", dense=True),
        "retrofit_full": build(options, mesh, options.length, "full"),
        "retrofit_adapter": build(options, mesh, options.length, "adapter"),
    }
    seconds = {name: [] for name in arms}
    for repeat in range(options.repeats + 1):
        for name, run in arms.items():
            batch = run.place(batch_of(options.length), rows)
            start = time.perf_counter()
            run.state, _ = run.step(run.state, run.frozen, batch)
            jax.block_until_ready(run.state)
            if repeat:  # the first one compiles
                seconds[name].append(time.perf_counter() - start)
    rates = {name: rows * options.length / statistics.median(times) for name, times in seconds.items()}
    for name, times in seconds.items():
        print(f"{name:<20}{rates[name]:>10.0f} tokens/s   median of {len(times)}, {min(times):.2f} to {max(times):.2f} s a step")
    ratios = {name: rates[name] / rates["plain_distillation"] for name in ("retrofit_full", "retrofit_adapter")}
    print("relative to plain distillation: " + ", ".join(f"{name} {ratio:.2f}" for name, ratio in ratios.items()))
    return {"length": options.length, "tokens_per_s": rates, "ratio_to_plain_distillation": ratios}


def memory(options, mesh, rows: int, length: int) -> dict:
    """Bytes per device of the compiled step. XLA's CPU compiler leaves some matrix-product workspace out of its count."""
    import jax
    import jax.numpy as jnp

    from dms_jax.sharding import named_sharding
    from train.rows import Batch

    run = build(options, mesh, length, options.memory_mode)

    def abstract(shape, dtype):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=named_sharding(("batch",) + (None,) * (len(shape) - 1), shape, mesh))

    batch = Batch(*(abstract((rows, length), dtype) for dtype in (jnp.int32, jnp.int32, jnp.bool_)), abstract((rows,), jnp.int32))
    with jax.set_mesh(mesh):
        compiled = run.step.lower(run.state, run.frozen, batch).compile()
    analysis = compiled.memory_analysis()
    if analysis is None:
        raise ConfigError("this backend reports no memory analysis; use --memory-lengths ''")
    result = {"length": length, "argument_bytes": analysis.argument_size_in_bytes, "temporary_bytes": analysis.temp_size_in_bytes}
    print(
        f"T = {length:>6}: arguments {result['argument_bytes'] / 2**20:>8.0f} MiB, temporary {result['temporary_bytes'] / 2**20:>8.0f} MiB per device"
    )
    return result


if __name__ == "__main__":
    run_command(NAME, main)
