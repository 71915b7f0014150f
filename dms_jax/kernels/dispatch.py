"""Choose the implementation of a kernel, and give the reasons against the others.

By default, a Pallas kernel runs where it has been found correct and faster than XLA: on the architectures that
`tuned.json` names, with their block sizes, which `python -m benchmarks.autotune` measures; and on any other device on
which the check of `self_check` succeeds when the kernel is first needed.
`implementation=` asks for an implementation by name; if it cannot run, the result is an error with the reason, never
another implementation.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dms_jax.errors import ConfigError, suggestion
from dms_jax.kernels.block_sizes import Blocks
from dms_jax.kernels.kernel_table import AUTO, GPU, KERNELS, TPU, XLA
from dms_jax.kernels.self_check import checked
from dms_jax.kernels.tuned import is_hopper, tuned_entry
from dms_jax.sharding import target_device


class KernelQuery(NamedTuple):
    """The facts that the choice of an implementation depends on."""

    head_dim: int
    dtype: Any  # of queries
    cache_dtype: Any = None  # of cached keys and values; None means the dtype of the queries
    capacity: int = 128  # slots per head
    page_size: int | None = None  # pairs of a page; None for slots
    xla_only_because: str | None = None  # why only XLA can do what the caller asks for; None if kernels can, too

    @property
    def kv_dtype(self) -> str:
        """The name of the dtype of keys and values."""
        return jnp.dtype(self.cache_dtype or self.dtype).name


class Implementation(NamedTuple):
    """An implementation: its platform (None: any), and `refuses(query, device_kind)`, which says why it cannot run."""

    platform: str | None
    refuses: Callable[[KernelQuery, str], str | None]


class Selected(NamedTuple):
    """The implementation that runs, and its block sizes; None for XLA and for kernels without block sizes."""

    name: str
    blocks: Blocks | None


def _takes_all(query: KernelQuery, device_kind: str) -> str | None:
    return None


def _gpu_refuses(query: KernelQuery, device_kind: str) -> str | None:
    if not is_hopper(device_kind):
        return f"needs a Hopper GPU (wgmma, TMA), got {device_kind}"
    if _cuda_version() in (12080, 12090):
        return "must not run on CUDA 12.8 or 12.9.0, which miscompile causal masks; install jax[cuda13]"
    return _refuses(query, {"bfloat16"}, 64)


def _cuda_version() -> int | None:
    """Return the CUDA version, 12090 for all of CUDA 12.9; None if this process has no GPU."""
    if jax.default_backend() != "gpu":
        return None
    try:
        from jax._src.lib import cuda_versions
    except ImportError:
        return None
    return None if cuda_versions is None else cuda_versions.cuda_runtime_get_version()


def _tpu_refuses(query: KernelQuery, device_kind: str) -> str | None:
    return _refuses(query, {"bfloat16", "float32"}, 128)


def _refuses(query: KernelQuery, dtypes: set[str], multiple: int) -> str | None:
    if query.head_dim not in (64, 128):
        return f"supports head sizes 64 and 128, got {query.head_dim}"
    if (name := jnp.dtype(query.dtype).name) not in dtypes:
        return f"computes in {' or '.join(sorted(dtypes))}, got {name}"
    if query.kv_dtype not in dtypes | {"float8_e4m3fn", "float8_e5m2"}:
        return f"reads caches of {', '.join(sorted(dtypes))} or fp8, got {query.kv_dtype}"
    if query.capacity % multiple:
        return f"needs a cache capacity that is a multiple of {multiple}, got {query.capacity}"
    if query.page_size is not None and query.page_size % multiple:
        return f"needs a page size that is a multiple of {multiple}, got {query.page_size}"
    return None


# In order of preference.
IMPLEMENTATIONS = {
    GPU: Implementation("gpu", _gpu_refuses),
    TPU: Implementation("tpu", _tpu_refuses),
    XLA: Implementation(None, _takes_all),
}


def unavailable_because(kernel: str, implementation: str, query: KernelQuery, interpret: bool = False) -> str | None:
    """Say why `implementation` cannot run on this device, or on the mesh that is set; None if it can."""
    if implementation == XLA:
        return None
    if implementation not in (existing := KERNELS[kernel].implementations):
        return f"does not exist; this kernel has {', '.join(existing)}"
    if query.xla_only_because is not None or interpret:
        return query.xla_only_because
    max_slots = KERNELS[kernel].written_for(implementation).max_slots
    if max_slots is not None and query.capacity > max_slots:
        return f"takes at most {max_slots} slots per head, got {query.capacity}"
    found, (platform, kind) = IMPLEMENTATIONS[implementation], target_device()
    if found.platform != platform:
        return f"runs on a {str(found.platform).upper()} only, but this is a {platform.upper()} ({kind})"
    return found.refuses(query, kind)


def not_default_because(kernel: str, implementation: str, query: KernelQuery) -> str | None:
    """Say why an `implementation` that can run is not the default here; None if it may be."""
    if implementation == XLA:
        return None
    kind = target_device()[1]
    entry = tuned_entry(kernel, implementation, kind, query.head_dim, query.kv_dtype)
    if entry is None:
        found = checked(kernel, implementation, query.head_dim, query.kv_dtype, (target_device()[0], kind))
        return (
            f"not yet measured on {kind} with head size {query.head_dim} and {query.kv_dtype}, and not checked here; "
            f"run `python -m benchmarks.autotune`, or use implementation={implementation} without a measurement"
            if found is None
            else found.refused_because
        )
    if entry.speed_to_xla < 1:
        return f"slower than xla on {kind}: {entry.speed_to_xla:.2f}x, measured {entry.date}"
    return None


def reasons(kernel: str, query: KernelQuery) -> dict[str, str | None]:
    """Say why each implementation, in order of preference, is not the default; the first None is the default."""
    return {
        name: unavailable_because(kernel, name, query) or not_default_because(kernel, name, query)
        for name in IMPLEMENTATIONS
    }


def select_implementation(
    kernel: str, query: KernelQuery, implementation: str = AUTO, interpret: bool = False, blocks: Blocks | None = None
) -> Selected:
    """Choose the implementation to run and its block sizes: `blocks` if given, else measured ones, else the defaults.

    Raises ConfigError if a named implementation cannot run.
    """
    if check_name(implementation) == AUTO:
        name = next(name for name, why in reasons(kernel, query).items() if why is None)
    else:
        name = implementation
        if (why := unavailable_because(kernel, name, query, interpret)) is not None:
            raise ConfigError(f"implementation {name} of {kernel} {why}; use implementation={XLA} or {AUTO}")
    if name == XLA or blocks is not None:
        return Selected(name, blocks)
    entry = tuned_entry(kernel, name, target_device()[1], query.head_dim, query.kv_dtype)
    if entry is not None:
        return Selected(name, entry.blocks)
    return Selected(name, KERNELS[kernel].written_for(name).default_blocks(query.head_dim, query.kv_dtype))


def is_available(kernel: str, query: KernelQuery, implementation: str = AUTO, interpret: bool = False) -> bool:
    """Return whether an *optional* kernel can run; if not, the caller composes the step from ordinary operations.

    Unlike `select_implementation`, this does not raise if a named implementation cannot run.
    """
    if check_name(implementation) == AUTO:
        return select_implementation(kernel, query).name != XLA
    return implementation != XLA and unavailable_because(kernel, implementation, query, interpret) is None


def check_name(implementation: str) -> str:
    """Return `implementation`. Raises ConfigError if there is no implementation of this name."""
    known = (AUTO, *IMPLEMENTATIONS)
    if implementation not in known:
        raise ConfigError(f"unknown implementation {implementation!r}; {suggestion(str(implementation), known)}")
    return implementation
