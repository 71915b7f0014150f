"""Which implementation of a kernel runs, in which order they are asked, and why one does not run here.

By default a Pallas kernel is taken on a device where it has been measured to be right and faster than XLA: `tuned.json` holds
the measurements and the block sizes, `python -m benchmarks.autotune` makes them. `implementation=` names one instead; what cannot
run then is an error with its reason, never another implementation.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dms_jax.errors import ConfigError, suggestion
from dms_jax.kernels.block_sizes import Blocks, default_blocks, tuned_entry
from dms_jax.sharding import target_device

AUTO, XLA, GPU, TPU = "auto", "xla", "mosaic_gpu", "pallas_tpu"


class Facts(NamedTuple):
    """What the choice depends on."""

    head_dim: int
    dtype: Any  # of queries
    cache_dtype: Any = None  # of cached keys and values; None: that of the queries
    capacity: int = 128  # slots of a head
    only_xla: str | None = None  # why no kernel can do what is asked


class Implementation(NamedTuple):
    platform: str | None  # None: any
    refuses: Callable[[Facts, str], str | None]  # given the device kind: why it cannot take this


class Chosen(NamedTuple):
    name: str
    blocks: Blocks | None  # None: XLA, or a kernel without any


def _takes_all(facts: Facts, device_kind: str) -> str | None:
    return None


def _gpu_refuses(facts: Facts, device_kind: str) -> str | None:
    if not any(kind in device_kind for kind in ("H100", "H200", "H20", "GH200")):
        return f"needs a Hopper GPU (wgmma, TMA), this is {device_kind}"
    if _cuda_version() in (12080, 12090):
        return "meets a miscompilation of causal masks in CUDA 12.8 and 12.9.0, which this process has; install jax[cuda13]"
    return _refuses(facts, {"bfloat16"}, 64)


def _cuda_version() -> int | None:
    """12090 for all of CUDA 12.9; None where no GPU will run the program."""
    if jax.default_backend() != "gpu":
        return None
    try:
        from jax._src.lib import cuda_versions
    except ImportError:
        return None
    return None if cuda_versions is None else cuda_versions.cuda_runtime_get_version()


def _tpu_refuses(facts: Facts, device_kind: str) -> str | None:
    return _refuses(facts, {"bfloat16", "float32"}, 128)


def _refuses(facts: Facts, dtypes: set[str], multiple: int) -> str | None:
    if facts.head_dim not in (64, 128):
        return f"is written for head sizes 64 and 128, this model has {facts.head_dim}"
    if (name := jnp.dtype(facts.dtype).name) not in dtypes:
        return f"computes in {' or '.join(sorted(dtypes))}, not in {name}"
    if facts.cache_dtype is not None and (name := jnp.dtype(facts.cache_dtype).name) not in dtypes | {
        "float8_e4m3fn",
        "float8_e5m2",
    }:
        return f"reads caches of {', '.join(sorted(dtypes))} or fp8, not of {name}"
    if facts.capacity % multiple:
        return f"wants a capacity that is a multiple of {multiple}, this cache has {facts.capacity}"
    return None


# The book-keeping of all slots of eight heads must fit into VMEM.
MOST_SLOTS = {("decode_update", TPU): 65536}
# In order of preference.
IMPLEMENTATIONS = {
    GPU: Implementation("gpu", _gpu_refuses),
    TPU: Implementation("tpu", _tpu_refuses),
    XLA: Implementation(None, _takes_all),
}


def why_not(kernel: str, implementation: str, facts: Facts, interpret: bool = False) -> str | None:
    """Why `implementation` cannot run for the device at hand (or the mesh that is set); None when it can."""
    found, (platform, kind) = IMPLEMENTATIONS[implementation], target_device()
    if implementation != XLA and facts.only_xla is not None:
        return facts.only_xla
    if interpret:
        return None
    if (most := MOST_SLOTS.get((kernel, implementation), facts.capacity)) < facts.capacity:
        return f"holds at most {most} slots of a head at once, this cache has {facts.capacity}"
    if found.platform is not None and found.platform != platform:
        return f"runs on a {found.platform.upper()}, this is a {platform.upper()} ({kind})"
    return found.refuses(facts, kind)


def not_preferred(kernel: str, implementation: str, facts: Facts) -> str | None:
    """Why `implementation`, which could run, is not the default here."""
    if implementation == XLA:
        return None
    kind = target_device()[1]
    entry = tuned_entry(kernel, implementation, kind, facts.head_dim, jnp.dtype(facts.cache_dtype or facts.dtype).name)
    if entry is None:
        dtype = jnp.dtype(facts.cache_dtype or facts.dtype).name
        return (
            f"not measured on {kind} with head size {facts.head_dim} and {dtype} yet; `python -m benchmarks.autotune` measures bfloat16 and "
            f"float8_e4m3fn, and implementation= names it unmeasured"
        )
    if entry.speed_to_xla < 1:
        return f"slower than xla on {kind}: {entry.speed_to_xla:.2f}x, measured {entry.date}"
    return None


def reasons(kernel: str, facts: Facts) -> dict[str, str | None]:
    """For each implementation, in order: why it is not taken by default; None for those that could be. The first None is taken."""
    return {name: why_not(kernel, name, facts) or not_preferred(kernel, name, facts) for name in IMPLEMENTATIONS}


def choose(
    kernel: str, facts: Facts, implementation: str = AUTO, interpret: bool = False, blocks: Blocks | None = None
) -> Chosen:
    """The implementation that runs, with its block sizes (`blocks` where given). Raises ConfigError for a name that cannot run."""
    check_name(implementation)
    if implementation == AUTO:
        name = next(name for name, why in reasons(kernel, facts).items() if why is None)
    else:
        name = implementation
        if (why := why_not(kernel, name, facts, interpret)) is not None:
            raise ConfigError(f"implementation {name} of {kernel} {why}; use implementation={XLA} or {AUTO}")
    if name == XLA or blocks is not None:
        return Chosen(name, blocks)
    dtype = jnp.dtype(facts.cache_dtype or facts.dtype).name
    entry = tuned_entry(kernel, name, target_device()[1], facts.head_dim, dtype)
    return Chosen(name, entry.blocks if entry is not None else default_blocks(kernel, name, facts.head_dim, dtype))


def runs(kernel: str, facts: Facts, implementation: str = AUTO, interpret: bool = False) -> bool:
    """Whether a kernel does it that one can do without: where `choose` would refuse a name, the step is composed of its parts."""
    if check_name(implementation) == AUTO:
        return choose(kernel, facts).name != XLA
    return implementation != XLA and why_not(kernel, implementation, facts, interpret) is None


def check_name(implementation: str) -> str:
    """The same; ConfigError when there is no such implementation."""
    if implementation not in (AUTO, *IMPLEMENTATIONS):
        known = (AUTO, *IMPLEMENTATIONS)
        raise ConfigError(f"unknown implementation {implementation!r}; {suggestion(str(implementation), known)}")
    return implementation
