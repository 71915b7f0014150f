"""Timing for all benchmarks, and the two ceilings of a device: the rates of a copy and of a matrix product."""

import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Timing(NamedTuple):
    """Seconds per call."""

    median: float
    all: list[float]


def time_all(calls: dict[str, Callable[[], object]], repeats: int) -> dict[str, Timing]:
    """Time each call `repeats` times, after a first call that compiles.

    The calls alternate, so that a busy machine slows down all of them. A call must return its arrays, because the
    timing waits until they are ready.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for repeat in range(repeats + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            jax.block_until_ready(call())
            if repeat:
                seconds[name].append(time.perf_counter() - start)
    return {name: Timing(statistics.median(times), times) for name, times in seconds.items()}


class Chain:
    """A program that applies `f` many times, each time to the results of the time before.

    The compiler therefore cannot share work between applications, and all of them need only one launch from the host.
    Inputs that change are donated, the others are only read, and nothing is copied.
    """

    def __init__(
        self, f: Callable[..., tuple], feed: Callable[[tuple, tuple], dict[int, Any]], inputs: tuple, times: int
    ):
        """Compile `times` applications of `f`. `feed(inputs, outputs)` returns the inputs that change, by index."""
        changing = sorted(jax.eval_shape(lambda *x: feed(x, f(*x)), *inputs))
        self.times = times
        self._carry = {index: jax.tree.map(jnp.copy, inputs[index]) for index in changing}
        self._rest = {index: x for index, x in enumerate(inputs) if index not in changing}

        def run(carry, rest):
            def one(carry, _):
                held = rest | carry
                now = tuple(held[index] for index in range(len(held)))
                return feed(now, f(*now)), None

            return jax.lax.scan(one, carry, None, length=times)[0]

        self._run = jax.jit(run, donate_argnums=0)

    def __call__(self) -> object:
        self._carry = self._run(self._carry, self._rest)
        return self._carry


def long_enough(make: Callable[[int], Chain], min_seconds: float, seconds: float = 0.02, max_times: int = 400) -> Chain:
    """Make a chain that runs for about `seconds`, so that the time of its launch does not matter. On a CPU, the chain
    has one application.

    `min_seconds` is a lower bound for one application. The first guess is four times that bound, and another chain is
    compiled only if the guess was too high.
    """
    if jax.default_backend() == "cpu":
        return make(1)
    chain = make(max(5, min(max_times, math.ceil(seconds / 4 / max(min_seconds, 1e-5)))))
    once = time_all({"": chain}, 1)[""].median / chain.times
    return chain if chain.times * once >= seconds / 2 else make(min(max_times, math.ceil(seconds / once)))


class Ceilings(NamedTuple):
    """Rates of a device."""

    copy_bytes: float  # bytes/s, read plus written
    flops: float  # 1/s, of a square matrix product in the dtype of the benchmark


def measure_ceilings(dtype: jnp.dtype, repeats: int, quick: bool) -> tuple[Ceilings, Sequence[dict]]:
    """Measure the ceilings. Returns them, and a record of each with its details."""
    on_cpu = jax.default_backend() == "cpu"
    elements = (1 << 22 if on_cpu else 1 << 29) // (2 if quick else 1)  # much larger than any cache
    side = (512 if on_cpu else 8192) // (2 if quick else 1)
    x = jax.random.normal(
        jax.random.key(0), (elements,), jnp.float32
    )  # fp32, because narrower dtypes are copied more slowly
    a, b = (jax.random.normal(jax.random.key(seed), (side, side), dtype) for seed in (1, 2))
    chains = {
        "copy": long_enough(
            lambda times: Chain(lambda x: (-x,), lambda _, out: {0: out[0]}, (x,), times), 2 * x.nbytes / 1e13
        ),
        "matmul": long_enough(
            lambda times: Chain(
                lambda a, b: (a @ b,), lambda _, out: {0: (out[0] * side**-0.5).astype(dtype)}, (a, b), times
            ),
            2 * side**3 / 2e15,
        ),
    }
    timing = time_all(chains, repeats)
    close = jnp.matmul(a.astype(jnp.float32), b.astype(jnp.float32), precision="highest")
    wrong = float(jnp.abs((a @ b).astype(jnp.float32) - close).max() / jnp.abs(close).max())
    per = {name: t.median / chains[name].times for name, t in timing.items()}
    ceilings = Ceilings(2 * x.nbytes / per["copy"], 2 * side**3 / per["matmul"])
    lines = [
        {
            "kernel": "copy",
            "implementation": "xla",
            "max_error": 0.0,
            "ratio_to_xla": 1.0,
            "bytes_per_s": ceilings.copy_bytes,
            "elements": elements,
            "dtype": "float32",
            "seconds": per["copy"],
            "seconds_all": [t / chains["copy"].times for t in timing["copy"].all],
        },
        {
            "kernel": "matmul",
            "implementation": "xla",
            "max_error": wrong,
            "ratio_to_xla": 1.0,
            "flops_per_s": ceilings.flops,
            "side": side,
            "dtype": jnp.dtype(dtype).name,
            "seconds": per["matmul"],
            "seconds_all": [t / chains["matmul"].times for t in timing["matmul"].all],
        },
    ]
    return ceilings, lines
