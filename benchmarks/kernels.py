"""Each kernel in each implementation that runs on the device at hand: is it right, and how fast is it next to what could be?

    python -m benchmarks.kernels --quick --json
    python -m benchmarks.kernels --kernel decode_attention --minutes 5

First the ceilings of the device, measured: a copy (bytes read plus written) and a matrix product. Then a line for each kernel, shape and
implementation: `max_error` against the reference in fp32 on the same numbers, the largest of any row relative to that row's length; `ratio_to_xla`,
how many times as fast as the XLA path; `fraction_of_copy_bandwidth`, the fewest bytes it must move over its time, against the copy; the same for the
matrix product. dense_xla and dense_cudnn are `jax.nn.dot_product_attention`: no gate, no lengths of each head, what a dense model pays.
On a CPU the Pallas kernels run in interpret mode: that shows that they are right; their time says nothing. With --json there is
nothing but JSON lines, each with its provenance.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Iterator

from dms_jax.command import Parser, run_command, start_devices
from dms_jax.errors import ConfigError
from dms_jax.kernels import block_sizes

NAME = "benchmarks.kernels"
KERNELS = tuple(block_sizes.KERNELS)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(NAME, __doc__)
    parser.add_argument("--quick", action="store_true", help="one small shape of each kernel")
    parser.add_argument("--kernel", choices=KERNELS, action="append", help="only this one; may be given several times")
    parser.add_argument(
        "--arm",
        metavar="NAME",
        action="append",
        help="only this one: xla, mosaic_gpu, pallas_tpu, dense_xla, dense_cudnn; may be repeated",
    )
    parser.add_argument("--repeats", type=int, default=5, help="timings of each (default 5); the median counts")
    parser.add_argument("--minutes", type=float, default=9.0, help="begin nothing new after this long (default 9)")
    parser.add_argument("--json", action="store_true", help="print JSON lines only")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    options = parse(argv)
    if options.repeats < 1 or not options.minutes > 0:
        raise ConfigError(
            f"--repeats must be at least 1 and --minutes above 0, got {options.repeats} and {options.minutes:g}"
        )
    from benchmarks.kernel_cases import DENSE
    from dms_jax.kernels.dispatch import IMPLEMENTATIONS

    if unknown := set(options.arm or ()) - {*IMPLEMENTATIONS, *DENSE}:
        raise ConfigError(f"--arm knows {', '.join((*IMPLEMENTATIONS, *DENSE))}; got {min(unknown)!r}")
    start_devices(8)  # of a CPU: its interpreter of GPU kernels runs each warpgroup on a thread of its own
    for record in run(options, time.monotonic() + 60 * options.minutes):
        print(json.dumps(record) if options.json else described(record), flush=True)


def run(options: argparse.Namespace, deadline: float) -> Iterator[dict]:
    """One record after the other; what there was no time for is a record that says so."""
    import jax
    import jax.numpy as jnp

    from benchmarks.timing import measure_ceilings
    from dms_jax.provenance import versions

    where = versions() | {"date": time.strftime("%Y-%m-%d", time.gmtime())}
    dtype = jnp.dtype(jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16)
    ceilings, lines = measure_ceilings(dtype, options.repeats, options.quick)
    yield from (line | {"provenance": where} for line in lines)
    for case in cases(options.quick, options.kernel or KERNELS, dtype):
        case = case()
        if time.monotonic() > deadline:
            yield {
                "kernel": case.kernel,
                **case.shape,
                "skipped": "no time left; give more --minutes, or one --kernel",
                "provenance": where,
            }
            continue
        for record in measured(case, ceilings, options.repeats, options.arm):
            yield record | {"provenance": where}


def cases(quick: bool, kernels, dtype) -> Iterator:
    """Functions that make the cases, so that one is in memory at a time."""
    from functools import partial

    import jax
    import jax.numpy as jnp

    from benchmarks.kernel_cases import compaction_case, slot_case, train_case, update_case

    def by_kernel(train, slots, compaction, update) -> dict[str, list]:
        slots = [partial(slot_case, *shape) for shape in slots]
        return {
            "train_attention": [partial(train_case, *shape, dtype) for shape in train],
            "decode_attention": [case for case in slots if case.args[1] == 1],
            "chunk_attention": [case for case in slots if case.args[1] > 1],
            "compaction": [partial(compaction_case, *shape, dtype, dtype) for shape in compaction],
            "decode_update": [partial(update_case, *shape, dtype, dtype) for shape in update],
        }

    fp8 = jnp.float8_e4m3fn
    if jax.default_backend() == "cpu":  # interpret mode: seconds for each block
        found = by_kernel(
            [(1, 128, 2, 1, 64, 40), (2, 256, 4, 2, 128, 60)],
            [
                (1, 1, 256, 150, 4, 2, 64, dtype, dtype),
                (2, 1, 512, 300, 8, 2, 128, dtype, fp8),
                (1, 64, 128, 100, 2, 1, 64, dtype, dtype),
            ],
            [(1, 64, 128, 2, 64), (2, 128, 512, 2, 128)],
            [(2, 128, 60, 4, 2, 64)],
        )
        found = {kernel: shapes[:1] if quick else shapes for kernel, shapes in found.items()}
    elif quick:
        found = by_kernel(
            [(1, 4096, 16, 4, 128, 256)],
            [(8, 1, 8192, 4096, 32, 8, 128, dtype, dtype), (1, 1024, 4096, 3000, 32, 8, 128, dtype, dtype)],
            [(8, 1024, 8192, 8, 128)],
            [(32, 4096, 3000, 32, 8, 128)],
        )
    else:
        decode = (
            (8, 4096, 128, dtype),
            (8, 32768, 128, dtype),
            (32, 4096, 128, dtype),
            (32, 4096, 64, dtype),
            (32, 4096, 128, fp8),
            (1, 32768, 128, dtype),
        )
        found = by_kernel(
            [(2, 8192, 32, 8, 128, 256), (1, 32768, 32, 8, 128, 256), (2, 8192, 32, 8, 64, 256)],
            [
                *(
                    (batch, 1, live * 5 // 4 // 64 * 64, live, 32, 8, head_dim, dtype, cached)
                    for batch, live, head_dim, cached in decode
                ),
                (4, 1024, 8192, 6000, 32, 8, 128, dtype, dtype),
            ],
            [(8, 1024, 8192, 8, 128), (64, 1024, 8192, 8, 128)],
            [(8, 8192, 4096, 32, 8, 128), (64, 8192, 4096, 32, 8, 128)],
        )
    return (case for kernel, cases in found.items() if kernel in kernels for case in cases)


def measured(case, ceilings, repeats: int, only: list[str] | None = None) -> Iterator[dict]:
    """XLA, the kernels that run here, and dense attention, or `only` those: one record each. Implementations alternate while they are timed."""
    import jax

    from benchmarks.kernel_cases import DENSE, error, in_fp32
    from benchmarks.timing import Chain, long_enough, time_all
    from dms_jax.kernels.dispatch import IMPLEMENTATIONS, XLA, Facts, why_not

    on_cpu = jax.default_backend() == "cpu"
    facts = Facts(case.shape["head_dim"], case.dtype, case.cache_dtype, case.shape.get("capacity", 128))
    base = {
        "kernel": case.kernel,
        **case.shape,
        "dtype": case.dtype.name,
        "cache_dtype": jax.numpy.dtype(case.cache_dtype).name,
    }
    arms, found, failed = {}, {}, {}

    def precise(f):
        with jax.default_matmul_precision("highest"):
            return jax.block_until_ready(jax.jit(f)(*in_fp32(case.inputs)))

    def attempt(name: str, f, wanted, notes: dict) -> None:
        try:  # what a compiler or driver says is a result too, and the others go on
            wrong = None if wanted is None else error(case, jax.block_until_ready(jax.jit(f)(*case.inputs)), wanted)
            arms[name] = long_enough(lambda times: Chain(f, case.feed, case.inputs, times), case.least_seconds)
            found[name] = {"max_error": wrong if wrong is None or math.isfinite(wrong) else None} | notes
            if wrong is not None and not math.isfinite(wrong):
                found[name]["wrong"] = True
            jax.block_until_ready(arms[name]())
        except Exception as why:
            arms.pop(name, None)
            failed[name] = " ".join(str(why).split())[:500]

    wanted = precise(case.reference)
    for name in (name for name in IMPLEMENTATIONS if only is None or name in only):
        interpret = on_cpu and name != XLA
        if (why := why_not(case.kernel, name, facts, interpret)) is not None:
            print(f"{case.kernel}: {name} {why}", file=sys.stderr)
        else:
            attempt(name, case.run(name, interpret), wanted, {"interpreted": True} if interpret else {})
    dense = None
    for name, how in DENSE.items():
        left_out = (only is not None and name not in only) or (how == "cudnn" and jax.default_backend() != "gpu")
        f = None if left_out else case.dense(how)
        if f is None:
            continue
        if dense is None and case.shape.get("length", 0) <= 4096:  # all scores in fp32; longer ones would not fit
            try:
                dense = precise(case.dense("xla"))
            except Exception as why:
                print(
                    f"{case.kernel}: no reference for dense attention: {' '.join(str(why).split())[:200]}",
                    file=sys.stderr,
                )
        attempt(name, f, dense, {"dense": True})
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
        }
        record |= {"seconds_all": [t / arm.times for t in timing[name].all]} | found[name]
        if not on_cpu:
            record |= {
                "fraction_of_copy_bandwidth": case.min_bytes / seconds[name] / ceilings.copy_bytes,
                "fraction_of_matmul": case.flops / seconds[name] / ceilings.flops,
            }
        yield record | {"min_bytes": case.min_bytes, "flops": case.flops}


def described(record: dict) -> str:
    """The same, for people."""
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
        text += f", {record['fraction_of_copy_bandwidth']:.0%} of copy bandwidth, {record['fraction_of_matmul']:.0%} of matmul"
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
