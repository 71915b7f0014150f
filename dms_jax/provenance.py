"""Provenance of measurements: versions, devices and commit, for the first line of every file of results."""

import platform
import subprocess
from pathlib import Path


def versions() -> dict[str, str | int]:
    """Return the versions, the devices and the commit of the running process."""
    import flax
    import jax
    import optax
    import orbax.checkpoint

    import dms_jax

    return {
        "dms_jax": dms_jax.__version__,
        "python": platform.python_version(),
        "jax": jax.__version__,
        "flax": flax.__version__,
        "optax": optax.__version__,
        "orbax": orbax.checkpoint.__version__,
        "device": jax.devices()[0].device_kind,
        "devices": jax.device_count(),
        "processes": jax.process_count(),
        "commit": _commit(),
    }


def _commit() -> str:
    try:
        describe = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
        return subprocess.run(describe, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"
