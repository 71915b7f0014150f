"""`environment()`: what this process runs on, on one screen, for a notebook's first cell and for bug reports."""

import importlib.metadata
import os
from dataclasses import dataclass

import jax

from dms_jax.device_guard import NVIDIA, device_problem, installed_versions
from dms_jax.files import user_cache_path
from dms_jax.kernels.dispatch import KernelQuery, not_default_because, unavailable_because
from dms_jax.kernels.kernel_table import GPU, KERNELS, TPU
from dms_jax.kernels.tuned import tuned_entry
from dms_jax.platform_defaults import default_dtype
from dms_jax.provenance import versions

PACKAGES = ("numpy", "transformers")


@dataclass(frozen=True)
class Environment:
    """Versions, devices and defaults of this process. Its repr fits on one screen."""

    versions: dict[str, str | int]
    devices: tuple[str, ...]
    dtype: str  # of weights and activations, where none is asked for
    kernels: dict[str, str | None]  # kernel -> why it does not run here at a head size of 128; None if it runs
    caches: dict[str, str]  # what is kept -> its folder, or "not kept"
    problem: str | None  # what keeps JAX from a GPU that is there, and the line to type

    def __repr__(self) -> str:
        lines = [
            ", ".join(f"{name} {version}" for name, version in self.versions.items()),
            f"devices: {', '.join(self.devices)}; dtype {self.dtype}",
        ]
        for why in dict.fromkeys(self.kernels.values()):
            names = ", ".join(name for name, reason in self.kernels.items() if reason == why)
            lines.append(f"kernels that run: {names}" if why is None else f"XLA in place of {names}: {why}")
        lines += [f"{what}: {folder}" for what, folder in self.caches.items()]
        return "\n".join(lines if self.problem is None else [*lines, f"problem: {self.problem}"])


def environment() -> Environment:
    """Look at the packages, the devices and the cache folders of this process. Nothing is compiled or written."""
    devices, installed = jax.devices(), installed_versions()
    dtype = default_dtype(devices[0])
    query = KernelQuery(128, dtype)
    packages = {name: importlib.metadata.version(name) for name in PACKAGES} | installed
    compiled = jax.config.values["jax_compilation_cache_dir"]
    return Environment(
        versions={name: value for name, value in versions().items() if name not in ("device", "devices")} | packages,
        devices=tuple(f"{d.platform}:{d.id} {d.device_kind}" for d in devices[:8]) + ("...",) * (len(devices) > 8),
        dtype=dtype,
        kernels={name: _why_not(name, query, devices[0]) for name in KERNELS},
        caches={"compiled programs": compiled or "not kept", "data and base models": str(user_cache_path(""))},
        problem=device_problem(installed, devices[0].platform, os.path.exists(NVIDIA)),
    )


def _why_not(kernel: str, query: KernelQuery, device: jax.Device) -> str | None:
    """Say why the kernel for this kind of device does not run, without running its check."""
    if device.platform not in ("gpu", "tpu"):
        return f"Pallas kernels run on a GPU or a TPU, and this is a {device.platform.upper()}"
    name = GPU if device.platform == "gpu" else TPU
    if (why := unavailable_because(kernel, name, query)) is not None:
        return why
    if tuned_entry(kernel, name, device.device_kind, query.head_dim, query.kv_dtype) is None:
        return "not measured on this kind of device; checked and timed when it is first needed"
    return not_default_because(kernel, name, query)
