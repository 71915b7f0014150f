"""Find block sizes on the accelerator at hand, and make what is right and faster than XLA the default there.

    python -m benchmarks.autotune                          # all kernels, head sizes 64 and 128, bf16 (and fp8 caches)
    python -m benchmarks.autotune --kernel decode_attention --head-dim 128

Each candidate must first agree with the reference in fp32 (2e-2, bf16), row by row; then it is timed in turn with the XLA path. The best one of each
kernel, head size and cache dtype goes into dms_jax/kernels/tuned.json with the device, the date, its error and its speed relative to XLA,
replacing an older line for the same; it is written even when XLA is faster, which then stays the default. Other devices' lines stay.
"""

import argparse
import time
from collections.abc import Iterator
from pathlib import Path

from dms_jax.command import Parser, run_command, start_devices
from dms_jax.errors import ConfigError
from dms_jax.kernels import block_sizes

NAME = "benchmarks.autotune"
KERNELS = tuple(block_sizes.KERNELS)
TOLERANCE = 2e-2  # of bf16; or half as much again as the XLA path's own error


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(NAME, __doc__)
    parser.add_argument("--kernel", choices=KERNELS, action="append", help="only this one; may be given several times")
    parser.add_argument("--head-dim", type=int, choices=(64, 128), action="append", help="only this one")
    parser.add_argument(
        "--quick", action="store_true", help="the default block sizes only: are they right, and faster than XLA?"
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--minutes", type=float, default=9.0, help="begin no new candidate after this long (default 9)")
    parser.add_argument("--output", metavar="FILE", help="another file than dms_jax/kernels/tuned.json")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    options = parse(argv)
    if options.repeats < 1 or not options.minutes > 0:
        raise ConfigError(
            f"--repeats must be at least 1 and --minutes above 0, got {options.repeats} and {options.minutes:g}"
        )
    path = Path(options.output) if options.output else block_sizes.TUNED
    if not path.parent.is_dir() or path.is_dir():
        raise ConfigError(f"--output {path} is no file in a folder that exists")
    entries = {entry[:5]: entry for entry in (block_sizes.read_tuned(path) if path.exists() else ())}
    start_devices(1)
    import jax
    import jax.numpy as jnp

    from dms_jax.kernels.dispatch import IMPLEMENTATIONS, Facts, why_not

    backend = jax.default_backend()
    names = [name for name, found in IMPLEMENTATIONS.items() if found.platform == backend]
    if not names:
        raise ConfigError(f"there is nothing to tune on a {backend.upper()}: the kernels run on Hopper GPUs and TPUs")
    if (why := why_not("train_attention", names[0], Facts(128, jnp.bfloat16))) is not None:
        raise ConfigError(f"there is nothing to tune here: {names[0]} {why}")
    deadline, found_any = time.monotonic() + 60 * options.minutes, False
    for case in cases(options.kernel or KERNELS, options.head_dim or (128, 64)):
        found = tuned(case(), names[0], options.repeats, deadline, options.quick)
        if found is not None:
            found_any, entries[found[:5]] = True, found
            block_sizes.write_tuned(
                path, tuple(entries[key] for key in sorted(entries))
            )  # at once: the process may be stopped
    if not found_any:
        raise ConfigError("nothing was tuned; the lines above say why")


def cases(kernels, head_dims) -> Iterator:
    from functools import partial

    import jax.numpy as jnp

    from benchmarks.kernel_cases import compaction_case, slot_case, train_case, update_case

    bf16, fp8 = jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float8_e4m3fn)
    for h in head_dims:
        found = {
            "train_attention": [partial(train_case, 1, 8192, 16, 4, h, 256, bf16)],
            "decode_attention": [
                partial(slot_case, 16, 1, 8192, 6000, 32, 8, h, bf16, cached) for cached in (bf16, fp8)
            ],
            "chunk_attention": [
                partial(slot_case, 2, 1024, 8192, 6000, 32, 8, h, bf16, cached) for cached in (bf16, fp8)
            ],
            "compaction": [partial(compaction_case, 8, 1024, 8192, 8, h, bf16, cached) for cached in (bf16, fp8)],
            "decode_update": [partial(update_case, 32, 8192, 6000, 32, 8, h, bf16, cached) for cached in (bf16, fp8)],
        }
        yield from (case for kernel in kernels for case in found[kernel])


def tuned(case, implementation: str, repeats: int, deadline: float, quick: bool):
    """The best of the candidates as a `TunedEntry`; None when none was right, or there was no time."""
    import jax

    from benchmarks.kernel_cases import error, in_fp32
    from benchmarks.timing import Chain, long_enough, time_all
    from dms_jax.kernels.dispatch import XLA

    head_dim, cached, best = case.shape["head_dim"], case.cache_dtype.name, None
    label = f"{case.kernel} {implementation}, head size {head_dim}, cache {cached}"
    with jax.default_matmul_precision("highest"):
        wanted = jax.block_until_ready(jax.jit(case.reference)(*in_fp32(case.inputs)))

    def error_of(f) -> float:
        return error(case, jax.block_until_ready(jax.jit(f)(*case.inputs)), wanted)

    tolerance = max(TOLERANCE, 1.5 * error_of(case.run(XLA)))
    xla = long_enough(lambda times: Chain(case.run(XLA), case.feed, case.inputs, times), case.least_seconds)
    for blocks in block_sizes.candidates(case.kernel, implementation, head_dim, cached)[: 1 if quick else None]:
        if time.monotonic() > deadline:
            print(f"{label}: no time for {blocks}; give more --minutes, or one --kernel")
            break
        f = case.run(implementation, False, blocks)
        try:
            wrong = error_of(f)
            if not wrong <= tolerance:
                print(f"{label}: {blocks} is WRONG, error {wrong:.1e}")
                continue
            kernel = long_enough(lambda times, f=f: Chain(f, case.feed, case.inputs, times), case.least_seconds)
            timing = time_all({"xla": xla, "kernel": kernel}, repeats)
        except Exception as why:  # too much fast memory, a compiler's limit: no candidate
            print(f"{label}: {blocks} failed: {' '.join(str(why).split())[:200]}")
            continue
        ours, theirs = timing["kernel"].median / kernel.times, timing["xla"].median / xla.times
        print(f"{label}: {blocks} {1e3 * ours:.3f} ms, {theirs / ours:.2f}x xla, error {wrong:.1e}")
        if best is None or theirs / ours > best.speed_to_xla:
            best = block_sizes.TunedEntry(
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
