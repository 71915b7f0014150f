"""How everything here is timed, and the two ceilings of a device: what a copy and what a matrix product reach."""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Timing(NamedTuple):
    """Seconds of one call."""

    median: float
    all: list[float]


def time_all(calls: dict[str, Callable[[], object]], repeats: int, per_repeat: int = 1) -> dict[str, Timing]:
    """Each call `per_repeat` times at a stretch, `repeats` such stretches after one that compiles. The calls alternate, so that
    a busy machine hurts all. A call returns what it made; its end is waited for."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for repeat in range(repeats + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            for _ in range(per_repeat):
                made = call()
            jax.block_until_ready(made)
            if repeat:
                seconds[name].append((time.perf_counter() - start) / per_repeat)
    return {name: Timing(statistics.median(times), times) for name, times in seconds.items()}


def chained(f: Callable[..., tuple], feed: Callable[[tuple, tuple], tuple], times: int) -> Callable[..., tuple]:
    """A program that applies `f` `times` over, each time to what `feed(inputs, outputs)` makes of the time before, so that nothing
    is computed once for all and no launch from the host is timed."""

    def run(*inputs):
        def one(inputs, _):
            return feed(inputs, f(*inputs)), None

        return jax.lax.scan(one, inputs, None, length=times)[0]

    return jax.jit(run)


class Ceilings(NamedTuple):
    copy_bytes: float  # bytes/s, read plus written
    flops: float  # 1/s, a square matrix product in the dtype of the benchmark


def measure_ceilings(dtype: jnp.dtype, repeats: int, quick: bool) -> tuple[Ceilings, Sequence[dict]]:
    """Measured here and now, and the lines that say how."""
    on_cpu = jax.default_backend() == "cpu"
    elements = (1 << 22 if on_cpu else 1 << 28) // (2 if quick else 1)
    side = (512 if on_cpu else 8192) // (2 if quick else 1)
    times = 4 if on_cpu else 10
    x = jax.random.normal(jax.random.key(0), (elements,), dtype)
    a, b = (jax.random.normal(jax.random.key(seed), (side, side), dtype) for seed in (1, 2))
    copy = chained(lambda x: (-x,), lambda _, out: out, times)
    product = chained(lambda a, b: (a @ b,), lambda inputs, out: ((out[0] * side**-0.5).astype(dtype), inputs[1]), times)
    timing = time_all({"copy": lambda: copy(x), "matmul": lambda: product(a, b)}, repeats)
    close = jnp.matmul(a.astype(jnp.float32), b.astype(jnp.float32), precision="highest")
    wrong = float(jnp.abs((a @ b).astype(jnp.float32) - close).max() / jnp.abs(close).max())
    per = {name: t.median / times for name, t in timing.items()}
    ceilings = Ceilings(2 * elements * jnp.dtype(dtype).itemsize / per["copy"], 2 * side**3 / per["matmul"])
    lines = [
        {"kernel": "copy", "implementation": "xla", "max_error": 0.0, "ratio_to_xla": 1.0, "bytes_per_s": ceilings.copy_bytes, "elements": elements,
         "dtype": jnp.dtype(dtype).name, "seconds": per["copy"], "seconds_all": [t / times for t in timing["copy"].all]},
        {"kernel": "matmul", "implementation": "xla", "max_error": wrong, "ratio_to_xla": 1.0, "flops_per_s": ceilings.flops, "side": side,
         "dtype": jnp.dtype(dtype).name, "seconds": per["matmul"], "seconds_all": [t / times for t in timing["matmul"].all]},
    ]  # fmt: skip
    return ceilings, lines
