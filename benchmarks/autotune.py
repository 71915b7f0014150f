"""Find block sizes on the accelerator at hand, and make what is right and faster than XLA the default there.

    python -m benchmarks.autotune                          # all kernels, head sizes 64 and 128, bf16 (and fp8 caches)
    python -m benchmarks.autotune --kernel decode_attention --head-dim 128

Each candidate must first agree with the reference in fp32 (2e-2, bf16); then it is timed in turn with the XLA path. The best one of each
kernel, head size and cache dtype goes into dms_jax/kernels/tuned.json with the device, the date, its error and its speed relative to XLA,
replacing an older line for the same; it is written even when XLA is faster, which then stays the default. Other devices' lines stay.
"""

import argparse
import time
from collections.abc import Iterator
from pathlib import Path

from dms_jax.command import Parser, run_command, start_devices
from dms_jax.config import ConfigError

NAME = "benchmarks.autotune"
KERNELS = ("train_attention", "decode_attention", "chunk_attention", "compaction", "decode_update")
TOLERANCE = 2e-2  # of bf16


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(prog=f"python -m {NAME}", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--kernel", choices=KERNELS, action="append", help="only this one; may be given several times")
    parser.add_argument("--head-dim", type=int, choices=(64, 128), action="append", help="only this one")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--minutes", type=float, default=9.0, help="begin no new candidate after this long (default 9)")
    parser.add_argument("--output", metavar="FILE", help="another file than dms_jax/kernels/tuned.json")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    options = parse(argv)
    if options.repeats < 1:
        raise ConfigError(f"--repeats must be at least 1, got {options.repeats}")
    start_devices(1)
    import jax

    from dms_jax.kernels.block_sizes import TUNED, read_tuned, write_tuned
    from dms_jax.kernels.dispatch import IMPLEMENTATIONS

    backend = jax.default_backend()
    names = [name for name, found in IMPLEMENTATIONS.items() if found.platform == backend]
    if not names:
        raise ConfigError(f"there is nothing to tune on a {backend.upper()}: the kernels run on Hopper GPUs and TPUs")
    path = Path(options.output) if options.output else TUNED
    entries = {entry[:5]: entry for entry in (read_tuned(path) if path.exists() else ())}
    deadline = time.monotonic() + 60 * options.minutes
    for case in cases(options.kernel or KERNELS, options.head_dim or (128, 64)):
        found = tuned(case(), names[0], options.repeats, deadline)
        if found is not None:
            entries[found[:5]] = found
            write_tuned(path, tuple(entries[key] for key in sorted(entries)))  # at once: a session may end


def cases(kernels, head_dims) -> Iterator:
    from functools import partial

    import jax.numpy as jnp

    from benchmarks.kernel_cases import compaction_case, slot_case, train_case, update_case

    bf16, fp8 = jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float8_e4m3fn)
    for h in head_dims:
        found = {
            "train_attention": [partial(train_case, 1, 8192, 16, 4, h, 256, bf16)],
            "decode_attention": [partial(slot_case, 16, 1, 8192, 6000, 32, 8, h, bf16, cached) for cached in (bf16, fp8)],
            "chunk_attention": [partial(slot_case, 2, 1024, 8192, 6000, 32, 8, h, bf16, cached) for cached in (bf16, fp8)],
            "compaction": [partial(compaction_case, 8, 1024, 8192, 8, h, bf16)],
            "decode_update": [partial(update_case, 32, 8192, 6000, 32, 8, h, bf16, cached) for cached in (bf16, fp8)],
        }
        yield from (case for kernel in kernels for case in found[kernel])


def tuned(case, implementation: str, repeats: int, deadline: float):
    """The best of the candidates as a `TunedEntry`; None when none was right, or there was no time."""
    import jax

    from benchmarks.kernel_cases import error, in_fp32
    from benchmarks.timing import chained, time_all
    from dms_jax.kernels.block_sizes import TunedEntry, candidates
    from dms_jax.kernels.dispatch import XLA

    label = f"{case.kernel} {implementation}, head size {case.shape['head_dim']}, cache {case.cache_dtype.name}"
    with jax.default_matmul_precision("highest"):
        wanted = jax.block_until_ready(jax.jit(case.reference)(*in_fp32(case.inputs)))
    times, best = 10, None
    xla = chained(case.run(XLA), case.feed, times)
    for blocks in candidates(case.kernel, implementation, case.shape["head_dim"], case.cache_dtype.name):
        if time.monotonic() > deadline:
            print(f"{label}: no time for {blocks}; give more --minutes, or one --kernel")
            break
        f = case.run(implementation, False, blocks)
        try:
            wrong = error(case, jax.block_until_ready(jax.jit(f)(*case.inputs)), wanted)
            if not wrong <= TOLERANCE:
                print(f"{label}: {blocks} is WRONG, error {wrong:.1e}")
                continue
            kernel = chained(f, case.feed, times)
            timing = time_all({"xla": lambda: xla(*case.inputs), "kernel": lambda kernel=kernel: kernel(*case.inputs)}, repeats)
        except Exception as why:  # too much fast memory, a compiler's limit: no candidate
            print(f"{label}: {blocks} failed: {' '.join(str(why).split())[:200]}")
            continue
        speed = timing["xla"].median / timing["kernel"].median
        print(f"{label}: {blocks} {1e3 * timing['kernel'].median / times:.3f} ms, {speed:.2f}x xla, error {wrong:.1e}")
        if best is None or speed > best.speed_to_xla:
            best = TunedEntry(case.kernel, implementation, jax.devices()[0].device_kind, case.shape["head_dim"], case.cache_dtype.name, blocks,
                              round(speed, 3), float(f"{wrong:.2g}"), time.strftime("%Y-%m-%d", time.gmtime()), jax.__version__)  # fmt: skip
    return best


if __name__ == "__main__":
    run_command(NAME, main)
