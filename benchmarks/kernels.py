"""Measure each kernel in each implementation that runs on the device at hand: its error, and how close it comes to the
limits of the device.

    python -m benchmarks.kernels --quick --json
    python -m benchmarks.kernels --kernel decode_attention --minutes 5
    python -m benchmarks.kernels --kernel decode_attention --ragged 0.9

Two ceilings of the device are measured first: the bandwidth of a copy (bytes read plus written) and the FLOP/s of a
matrix product. One line for each kernel, shape and implementation follows. `max_error` is the largest error of any row
against the fp32 reference, relative to the norm of that row. `ratio_to_xla` is the speed relative to the XLA path.
`fraction_of_copy_bandwidth` is the minimum number of bytes that the kernel must move, divided by its time and by the
copy bandwidth; `fraction_of_matmul` compares its FLOPs with the matrix product in the same way. dense_xla and
dense_cudnn are `jax.nn.dot_product_attention`, which has no gate and no lengths per head; they show the cost of a dense
model.

Cases with a cache hold `live` pairs per head on average; heads differ by up to a quarter if the slots allow. With
--ragged or --live, heads differ as in a real model, all rows are alike, and there are just enough slots for the fullest
head and a new pair. Only the kernels that read live pairs are then measured. Under --ragged a head holds from a window
to four times the mean; under --live the heads have the distribution of all heads in FILE, scaled to the mean.
`allocated_bytes` are those of the layer's cache, `live_bytes` those of its live keys and values.

On a CPU the Pallas kernels run in interpret mode, which shows that they are correct, but their times mean nothing. With
--json, the output is JSON lines only, each with its provenance.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Collection, Iterator
from functools import partial

from benchmarks.benchmark_options import check_at_least, check_minutes
from benchmarks.ragged import (
    add_ragged,
    check_ragged,
    log_normal_counts,
    memory_record,
    memory_text,
    quantile_counts,
    spread_record,
)
from dms_jax.command import Parser, run_command, start_devices
from dms_jax.errors import ConfigError
from dms_jax.evaluation.live_counts import LiveCounts
from dms_jax.kernels.kernel_table import KERNELS

NAME = "benchmarks.kernels"
RAGGED_CR = 4  # compression ratio of the rows that --ragged stands for


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(NAME, __doc__)
    parser.add_argument("--quick", action="store_true", help="measure one small shape per kernel")
    parser.add_argument(
        "--kernel", choices=tuple(KERNELS), action="append", help="measure only this kernel; may be repeated"
    )
    parser.add_argument(
        "--arm",
        metavar="NAME",
        action="append",
        help="measure only this arm: xla, mosaic_gpu, pallas_tpu, dense_xla or dense_cudnn; may be repeated",
    )
    parser.add_argument(
        "--repeats", type=int, default=5, metavar="N", help="timings per arm, whose median is reported (default 5)"
    )
    parser.add_argument(
        "--minutes", type=float, default=9.0, metavar="X", help="start no new case after this time (default 9)"
    )
    add_ragged(parser, "scaled to the mean of each case")
    parser.add_argument("--json", action="store_true", help="print only JSON lines")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    options = parse(argv)
    check_at_least(options, repeats=1)
    check_minutes(options.minutes)
    measured_counts = check_ragged(options)
    from dms_jax.kernels.dispatch import IMPLEMENTATIONS
    from dms_jax.kernels.kernel_cases import DENSE, SUITES

    if unknown := set(options.arm or ()) - {*IMPLEMENTATIONS, *DENSE}:
        raise ConfigError(f"--arm must be one of {', '.join((*IMPLEMENTATIONS, *DENSE))}, got {min(unknown)!r}")
    counts = kernel_counts(options.ragged, measured_counts)
    if counts is not None and (even := [kernel for kernel in options.kernel or () if not SUITES[kernel].takes_counts]):
        raise ConfigError(
            f"--ragged and --live have no meaning for --kernel {even[0]}, which reads no live pairs; leave it out"
        )
    start_devices(8)  # on a CPU: the interpreter of GPU kernels needs a thread per warpgroup
    for record in run(options, time.monotonic() + 60 * options.minutes, counts):
        print(json.dumps(record) if options.json else described(record), flush=True)


def kernel_counts(cv: float | None, measured_counts: LiveCounts | None) -> Callable | None:
    """Return the `head_counts` of the cases under --ragged or --live; None leaves them to the cases."""
    if cv is None and measured_counts is None:
        return None
    from benchmarks.models import default_window
    from dms_jax.engine.cache_capacity import layer_capacities

    def head_counts(batch: int, kv_heads: int, live: int):
        if measured_counts is not None:
            heads = quantile_counts(kv_heads, live, measured_counts.counts)
        else:
            length = RAGGED_CR * live
            heads = log_normal_counts(kv_heads, live, cv, default_window(length) + 1, length)
        return heads[None].repeat(batch, axis=0), layer_capacities([int(heads.max()) + 1])[0]

    return head_counts


def run(options: argparse.Namespace, deadline: float, head_counts: Callable | None = None) -> Iterator[dict]:
    """Yield the records, each as soon as it is measured. A case that is left out yields a record that says why."""
    import jax.numpy as jnp

    from benchmarks.timing import measure_ceilings
    from dms_jax.platform_defaults import platform_defaults
    from dms_jax.provenance import versions

    where = versions() | {"date": time.strftime("%Y-%m-%d", time.gmtime())}
    dtype = jnp.dtype(platform_defaults().dtype)
    ceilings, lines = measure_ceilings(dtype, options.repeats, options.quick)
    yield from (line | {"provenance": where} for line in lines)
    for kernel, make in cases(options.quick, options.kernel or KERNELS, dtype, head_counts):
        try:
            case = make()
        except ConfigError as why:  # its heads are too few for such a spread
            yield {"kernel": kernel, "skipped": str(why), "provenance": where}
            continue
        if time.monotonic() > deadline:
            yield {
                "kernel": case.kernel,
                **case.shape,
                "skipped": "no time left; use more --minutes, or a single --kernel",
                "provenance": where,
            }
            continue
        for record in measured(case, ceilings, options.repeats, options.arm):
            yield record | {"provenance": where}


def cases(
    quick: bool, kernels: Collection[str], dtype, head_counts: Callable | None = None
) -> Iterator[tuple[str, Callable]]:
    """Yield kernels with functions that make their cases, so that only one case at a time is in memory. With
    `head_counts`, only kernels that read live pairs are among them."""
    import jax

    from dms_jax.kernels.kernel_cases import SUITES

    how = {"dtype": dtype} if head_counts is None else {"dtype": dtype, "head_counts": head_counts}
    for kernel in (kernel for kernel in KERNELS if kernel in kernels):
        suite = SUITES[kernel]
        if head_counts is not None and not suite.takes_counts:
            continue
        if jax.default_backend() == "cpu":
            makers = suite.cpu[:1] if quick else suite.cpu
        else:
            makers = suite.quick if quick else suite.full
        yield from ((kernel, partial(make, **how)) for make in makers)


def precise(case, f):
    """Return f of the case's inputs in fp32, with matrix products of the highest precision."""
    import jax

    from dms_jax.kernels.kernel_cases import in_fp32

    with jax.default_matmul_precision("highest"):
        return jax.block_until_ready(jax.jit(f)(*in_fp32(case.inputs)))


def dense_functions(case, only: list[str] | None) -> Iterator[tuple[str, Callable]]:
    """Yield the dense attentions that can run here, by name; only those in `only`, if it is given."""
    import jax

    from dms_jax.kernels.kernel_cases import DENSE

    for name, how in DENSE.items():
        left_out = (only is not None and name not in only) or (how == "cudnn" and jax.default_backend() != "gpu")
        if not left_out and (f := case.dense(how)) is not None:
            yield name, f


def dense_reference(case):
    """Return what dense attention must compute, or None if its reference fails, which is said on stderr."""
    try:
        return precise(case, case.dense("xla"))
    except Exception as why:  # e.g. out of memory
        reason = " ".join(str(why).split())[:200]
        print(f"{case.kernel}: dense attention is unchecked, because its reference failed: {reason}", file=sys.stderr)
        return None


def measured(case, ceilings, repeats: int, only: list[str] | None = None) -> Iterator[dict]:
    """Yield a record for XLA, for each kernel that runs here and for dense attention, or only for those in `only`.
    Their timings alternate."""
    import jax

    from benchmarks.timing import Chain, long_enough, time_all
    from dms_jax.kernels.dispatch import IMPLEMENTATIONS, XLA, KernelQuery, unavailable_because
    from dms_jax.kernels.kernel_cases import error

    on_cpu = jax.default_backend() == "cpu"
    query = KernelQuery(case.shape["head_dim"], case.dtype, case.cache_dtype, case.shape.get("capacity", 128))
    base = {
        "kernel": case.kernel,
        **case.shape,
        "dtype": case.dtype.name,
        "cache_dtype": jax.numpy.dtype(case.cache_dtype).name,
        **memory_of(case),
    }
    arms, found, failed = {}, {}, {}

    def attempt(name: str, f, wanted, notes: dict) -> None:
        try:  # an error of a compiler or a driver is a result too, and the other arms go on
            wrong = None if wanted is None else error(case, jax.block_until_ready(jax.jit(f)(*case.inputs)), wanted)
            arms[name] = long_enough(lambda times: Chain(f, case.feed, case.inputs, times), case.min_seconds)
            found[name] = {"max_error": wrong if wrong is None or math.isfinite(wrong) else None} | notes
            if wrong is not None and not math.isfinite(wrong):
                found[name]["wrong"] = True
            jax.block_until_ready(arms[name]())
        except Exception as why:
            arms.pop(name, None)
            failed[name] = " ".join(str(why).split())[:500]

    wanted = precise(case, case.reference)
    for name in (name for name in IMPLEMENTATIONS if only is None or name in only):
        interpret = on_cpu and name != XLA
        if (why := unavailable_because(case.kernel, name, query, interpret)) is not None:
            print(f"{case.kernel}: {name} {why}", file=sys.stderr)
        else:
            attempt(name, case.run(name, interpret), wanted, {"interpreted": True} if interpret else {})
    reference = None
    for name, f in dense_functions(case, only):
        # Longer rows do not fit, because the reference has all scores in memory in fp32.
        if reference is None and case.shape.get("length", 0) <= 4096:
            reference = dense_reference(case)
        attempt(name, f, reference, {"dense": True})
    slow = {name: arm for name, arm in arms.items() if found[name].get("interpreted")}
    timing = time_all({name: arm for name, arm in arms.items() if name not in slow}, repeats) | time_all(slow, 1)
    seconds = {name: t.median / arms[name].times for name, t in timing.items()}
    for name, why in failed.items():
        yield base | {"implementation": name, "max_error": None, "ratio_to_xla": None, "failed": why}
    for name, arm in arms.items():
        record = base | {
            "implementation": name,
            "ratio_to_xla": seconds[XLA] / seconds[name] if XLA in seconds else None,
            "seconds": seconds[name],
            "seconds_all": [t / arm.times for t in timing[name].all],
        }
        record |= found[name] | ({} if on_cpu else fractions_of_ceilings(case, seconds[name], ceilings))
        yield record | {"min_bytes": case.min_bytes, "flops": case.flops}


def memory_of(case) -> dict[str, float]:
    """Return the bytes of a case's cache, allocated and live, and how its heads differ; {} for a case without live
    pairs."""
    if "live" not in case.shape:
        return {}
    import jax
    import numpy as np

    from dms_jax.core.compact_cache import LayerCache
    from dms_jax.core.visibility import NEVER

    if case.kernel == "page_attention":
        _, keys, *_, in_ring, survivors = case.inputs
        cache, counts = case.inputs[1:], np.asarray(in_ring + survivors)
    else:
        cache = next(x for x in case.inputs if isinstance(x, LayerCache))
        keys, counts = cache.k, np.asarray((cache.expiry == NEVER).sum(-1))
    allocated = sum(x.nbytes for x in jax.tree.leaves(cache))
    pair_bytes = 2 * keys.shape[-1] * keys.dtype.itemsize
    return spread_record(counts) | memory_record(counts, allocated, pair_bytes)


def fractions_of_ceilings(case, seconds: float, ceilings) -> dict[str, float]:
    """Return how close a kernel comes to the measured bandwidth and to the measured speed of matrix products."""
    return {
        "fraction_of_copy_bandwidth": case.min_bytes / seconds / ceilings.copy_bytes,
        "fraction_of_matmul": case.flops / seconds / ceilings.flops,
    }


def described(record: dict) -> str:
    """Format a record as a line for people."""
    shape = ", ".join(f"{key} {value}" for key, value in record.items() if key in SHAPE_KEYS)
    if "skipped" in record:
        return f"{record['kernel']:<16} {shape}: skipped, {record['skipped']}"
    if record["kernel"] in ("copy", "matmul"):
        rate, unit = (
            (record["bytes_per_s"] / 1e9, "GB/s")
            if record["kernel"] == "copy"
            else (record["flops_per_s"] / 1e12, "TFLOP/s")
        )
        return f"ceiling: {record['kernel']:<8} {rate:8.2f} {unit}"
    start = f"{record['kernel']:<16} {record['implementation']:<12} {shape}: "
    if "failed" in record:
        return start + f"FAILED: {record['failed']}"
    wrong = "unknown" if record["max_error"] is None else f"{record['max_error']:.1e}"
    text = f"{'WRONG' if 'wrong' in record else f'error {wrong}'}, {1e3 * record['seconds']:.3f} ms"
    text += "" if record["ratio_to_xla"] is None else f", {record['ratio_to_xla']:.2f}x xla"
    if "fraction_of_copy_bandwidth" in record:
        text += (
            f", {record['fraction_of_copy_bandwidth']:.0%} of copy bandwidth, {record['fraction_of_matmul']:.0%} "
            "of matmul"
        )
    if "live_bytes" in record:
        text += f", {memory_text(record)}, live CV {record['live_cv']:.2f}"
    return start + text + (" (interpreted)" if record.get("interpreted") else "")


SHAPE_KEYS = {
    "batch",
    "length",
    "queries",
    "capacity",
    "live",
    "pairs",
    "heads",
    "kv_heads",
    "head_dim",
    "window",
    "dtype",
    "cache_dtype",
}


if __name__ == "__main__":
    run_command(NAME, main)
