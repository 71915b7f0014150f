"""Measured block sizes: `benchmarks.autotune` writes the fastest ones of each accelerator to `tuned.json`."""

import functools
import json
from pathlib import Path
from typing import NamedTuple

from dms_jax.errors import ConfigError
from dms_jax.files import parse_json, read_text, replacing
from dms_jax.kernels.block_sizes import Blocks
from dms_jax.kernels.kernel_table import KERNELS

TUNED = Path(__file__).parent / "tuned.json"
# GPUs of one architecture: measurements on one are used for the others until those are measured.
HOPPER = ("H100", "H200", "H20", "GH200")


class TunedEntry(NamedTuple):
    """One measurement by `benchmarks.autotune`."""

    kernel: str
    implementation: str
    device: str  # its kind, as JAX names it
    head_dim: int
    dtype: str  # of keys and values
    blocks: Blocks | None
    speed_to_xla: float
    max_error: float
    date: str
    jax: str


NUMBERS = {"head_dim": int, "speed_to_xla": float, "max_error": float}


def tuned_entry(kernel: str, implementation: str, device: str, head_dim: int, dtype: str) -> TunedEntry | None:
    """Return the measurement of a kernel on a kind of device, or else on one of its architecture; None without one."""
    found = {
        entry.device: entry
        for entry in _tuned(TUNED)
        if (*entry[:2], *entry[3:5]) == (kernel, implementation, head_dim, dtype)
    }
    alike = [entry for other, entry in found.items() if is_hopper(other) and is_hopper(device)]
    return found.get(device) or (alike[0] if alike else None)


def is_hopper(device: str) -> bool:
    """Return whether a kind of device, as JAX names it, is a GPU of the Hopper architecture."""
    return any(name in device for name in HOPPER)


@functools.cache
def _tuned(path: Path) -> tuple[TunedEntry, ...]:
    return read_tuned(path) if path.exists() else ()


def read_tuned(path: Path) -> tuple[TunedEntry, ...]:
    """Read the entries of a file that `write_tuned` wrote. Raises ConfigError for any other file."""
    try:
        return tuple(_entry(fields) for fields in parse_json(read_text(path), "its text"))
    except (ValueError, TypeError, KeyError, AttributeError) as why:
        raise ConfigError(
            f"{path} must be a table of tuned block sizes ({' '.join(str(why).split())}); "
            "delete it, or run `python -m benchmarks.autotune`"
        ) from why


def write_tuned(path: Path, entries: tuple[TunedEntry, ...]) -> None:
    """Write one measurement per line. The file is replaced in one step."""
    lines = [json.dumps(entry._asdict() | {"blocks": entry.blocks and entry.blocks._asdict()}) for entry in entries]
    with replacing(path) as temporary:
        temporary.write_text("[\n" + ",\n".join(lines) + "\n]\n", encoding="utf-8")
    _tuned.cache_clear()


def _entry(fields: dict) -> TunedEntry:
    kernel, blocks = fields["kernel"], fields.pop("blocks")
    if kernel not in KERNELS:
        raise ValueError(f"unknown kernel {kernel!r}")
    if blocks is not None:
        kind = KERNELS[kernel].blocks
        if kind is None:
            raise ValueError(f"{kernel} has no block sizes")
        blocks = kind(**blocks)
    entry = TunedEntry(blocks=blocks, **fields)
    for name, kind in NUMBERS.items():
        if type(value := getattr(entry, name)) is not kind or value != value:
            raise ValueError(f"{name} must be a number of type {kind.__name__}, got {value!r}")
    for name in TunedEntry._fields:
        if name not in NUMBERS and name != "blocks" and not isinstance(value := getattr(entry, name), str):
            raise ValueError(f"{name} must be a string, got {value!r}")
    if any(type(size) is not int or size < 0 for size in entry.blocks or ()):
        raise ValueError(f"block sizes must be whole numbers from 0 on, got {entry.blocks}")
    return entry
