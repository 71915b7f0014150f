"""Say in one line why JAX does not use a GPU that is there, with the line to type. Without it, all runs on the CPU."""

import functools
import importlib.metadata
import os
import re
import warnings
from collections.abc import Mapping

PLUGINS = tuple(f"jax-cuda{cuda}-{part}" for cuda in (12, 13) for part in ("plugin", "pjrt"))
NVIDIA = "/dev/nvidia0"


def device_problem(installed: Mapping[str, str], platform: str, has_nvidia: bool) -> str | None:
    """Return what keeps JAX from a GPU, in one line; None if nothing does.

    Args:
      installed: package -> version, of jaxlib and those of `PLUGINS` that are installed.
      platform: the one that JAX runs on: "cpu", "gpu" or "tpu".
      has_nvidia: whether this machine has an NVIDIA GPU.
    """
    jaxlib = installed["jaxlib"]
    for name in PLUGINS:
        if name in installed and _release(installed[name]) != _release(jaxlib):
            extra = name.split("-")[1]
            return (
                f"{name} {installed[name]} does not fit jaxlib {jaxlib}, so JAX runs on the {platform.upper()}; type: "
                f'pip install "jax[{extra}]=={jaxlib}", and restart'
            )
    if has_nvidia and platform == "cpu":
        return (
            f"this machine has an NVIDIA GPU ({NVIDIA}), but JAX sees a CPU only; type: "
            'pip install "dms-jax[cuda12]", or cuda13 if the driver is 580 or newer, and restart'
        )
    return None


def installed_versions() -> dict[str, str]:
    """Return the versions of jaxlib and of the installed CUDA plugins."""
    found = {}
    for name in ("jaxlib", *PLUGINS):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


@functools.cache
def warn_once(platform: str) -> None:
    """Warn about `device_problem` of this process, unless the user chose the platform."""
    if os.environ.get("JAX_PLATFORMS"):
        return
    problem = device_problem(installed_versions(), platform, os.path.exists(NVIDIA))
    if problem is not None:
        warnings.warn(problem, stacklevel=3)


def _release(version: str) -> list[str]:
    """Return major, minor and patch, which must be equal; builds of one release may differ."""
    return re.findall(r"\d+", version)[:3]
