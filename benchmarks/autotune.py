"""Find block sizes on the accelerator at hand, and make the kernels that are correct and faster than XLA the default.

    python -m benchmarks.autotune                          # all kernels, head sizes 64 and 128, bf16 (and fp8 caches)
    python -m benchmarks.autotune --kernel decode_attention --head-dim 128

Each candidate must first agree with the fp32 reference, row by row (2e-2 for bf16). Then its timings alternate with
those of the XLA path. The best candidate for each kernel, head size and cache dtype goes into
dms_jax/kernels/tuned.json, with the device, the date, its error and its speed relative to XLA. It replaces an older
line for the same kernel, device, head size and cache dtype; lines of other devices stay. If XLA is faster, the line is
still written, but XLA stays the default.
"""

import argparse
import time
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path

from benchmarks.benchmark_options import check_at_least, check_minutes, check_output
from dms_jax.command import Parser, run_command, start_devices
from dms_jax.errors import ConfigError
from dms_jax.kernels import tuned
from dms_jax.kernels.kernel_table import KERNELS

NAME = "benchmarks.autotune"


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(NAME, __doc__)
    parser.add_argument(
        "--kernel", choices=tuple(KERNELS), action="append", help="tune only this kernel; may be repeated"
    )
    parser.add_argument("--head-dim", type=int, choices=(64, 128), action="append", help="tune only this head size")
    parser.add_argument("--quick", action="store_true", help="measure the default block sizes only")
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="timings per candidate (default 5)")
    parser.add_argument(
        "--minutes", type=float, default=9.0, metavar="X", help="start no new candidate after this time (default 9)"
    )
    parser.add_argument("--output", metavar="FILE", help="write to this file instead of dms_jax/kernels/tuned.json")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    options = parse(argv)
    check_at_least(options, repeats=1)
    check_minutes(options.minutes)
    path = Path(options.output) if options.output else tuned.TUNED
    check_output(path)
    entries = {entry[:5]: entry for entry in (tuned.read_tuned(path) if path.exists() else ())}
    start_devices(1)
    import jax
    import jax.numpy as jnp

    from dms_jax.kernels.dispatch import IMPLEMENTATIONS, KernelQuery, unavailable_because

    backend = jax.default_backend()
    names = [name for name, found in IMPLEMENTATIONS.items() if found.platform == backend]
    if not names:
        raise ConfigError(
            f"the device must be a Hopper GPU or a TPU, got a {backend.upper()}; run this command on one of those"
        )
    if (why := unavailable_because("train_attention", names[0], KernelQuery(128, jnp.bfloat16))) is not None:
        raise ConfigError(f"no kernel runs on this device: {names[0]} {why}")
    deadline, found_any = time.monotonic() + 60 * options.minutes, False
    written = [kernel for kernel in options.kernel or KERNELS if names[0] in KERNELS[kernel].implementations]
    for make in cases(written, options.head_dim or (128, 64)):
        found = best_entry(make(), names[0], options.repeats, deadline, options.quick)
        if found is not None:
            found_any, entries[found[:5]] = True, found
            # Write at once, because the process may be stopped.
            tuned.write_tuned(path, tuple(entries[key] for key in sorted(entries)))
    if not found_any:
        raise ConfigError("no candidate was correct and could be timed; the lines above say why")


def cases(kernels: Iterable[str], head_dims: Iterable[int]) -> Iterator:
    """Yield functions that make the cases, so that only one case at a time is in memory."""
    from dms_jax.kernels.kernel_cases import BF16, SUITES

    for head_dim in head_dims:
        for suite in (SUITES[kernel] for kernel in kernels):
            yield from (partial(suite.tuned(head_dim, cached), dtype=BF16) for cached in suite.cache_dtypes)


def best_entry(case, implementation: str, repeats: int, deadline: float, quick: bool) -> tuned.TunedEntry | None:
    """Return the fastest correct candidate; None if no candidate was correct or no time was left."""
    import jax

    from benchmarks.timing import Chain, long_enough, time_all
    from dms_jax.kernels.dispatch import XLA
    from dms_jax.kernels.kernel_cases import TOLERANCE, error, in_fp32

    head_dim, cached, best = case.shape["head_dim"], case.cache_dtype.name, None
    label = f"{case.kernel} {implementation}, head size {head_dim}, cache {cached}"
    with jax.default_matmul_precision("highest"):
        wanted = jax.block_until_ready(jax.jit(case.reference)(*in_fp32(case.inputs)))

    def error_of(f) -> float:
        return error(case, jax.block_until_ready(jax.jit(f)(*case.inputs)), wanted)

    tolerance = max(TOLERANCE, 1.5 * error_of(case.run(XLA)))  # the XLA path has errors of its own
    xla = long_enough(lambda times: Chain(case.run(XLA), case.feed, case.inputs, times), case.min_seconds)
    candidates = KERNELS[case.kernel].written_for(implementation).candidates(head_dim, cached)
    for blocks in candidates[: 1 if quick else None]:
        if time.monotonic() > deadline:
            print(f"{label}: no time for {blocks}; use more --minutes, or a single --kernel")
            break
        f = case.run(implementation, False, blocks)
        try:
            wrong = error_of(f)
            if not wrong <= tolerance:
                print(f"{label}: {blocks} is WRONG, error {wrong:.1e}")
                continue
            kernel = long_enough(lambda times, f=f: Chain(f, case.feed, case.inputs, times), case.min_seconds)
            timing = time_all({"xla": xla, "kernel": kernel}, repeats)
        except Exception as why:  # e.g. too much fast memory: then it is not a candidate
            print(f"{label}: {blocks} failed: {' '.join(str(why).split())[:200]}")
            continue
        ours, theirs = timing["kernel"].median / kernel.times, timing["xla"].median / xla.times
        print(f"{label}: {blocks} {1e3 * ours:.3f} ms, {theirs / ours:.2f}x xla, error {wrong:.1e}")
        if best is None or theirs / ours > best.speed_to_xla:
            best = tuned.TunedEntry(
                case.kernel,
                implementation,
                jax.devices()[0].device_kind,
                head_dim,
                cached,
                blocks,
                round(theirs / ours, 3),
                float(f"{wrong:.2g}"),
                time.strftime("%Y-%m-%d", time.gmtime()),
                jax.__version__,
            )
    return best


if __name__ == "__main__":
    run_command(NAME, main)
