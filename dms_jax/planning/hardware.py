"""Accelerators that need not be at hand: their data sheets, and meshes of devices to compile for (`target_mesh`).

The real compiler of the hardware compiles, but nothing is executed: arguments are `jax.ShapeDtypeStruct`, and the
`memory_analysis()` of a compiled program is that of the target.
"""

import importlib.util
import math
import os
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh

from dms_jax.errors import ConfigError, shown, suggestion
from dms_jax.files import machine_memory
from dms_jax.platform_defaults import platform_defaults


class Chip(NamedTuple):
    """One device. Rates are those of the data sheet; `benchmarks.kernels` measures what a program achieves."""

    platform: str  # "gpu" or "tpu"
    hbm_bytes: float
    bandwidth: float  # bytes/s
    flops: float  # dense bf16 FLOP/s
    link: float  # bytes/s per device and direction to other devices of the same host or slice
    source: str


CHIPS = {
    "h100": Chip("gpu", 80e9, 3.35e12, 989e12, 450e9, "NVIDIA H100 SXM data sheet"),
    "h200": Chip("gpu", 141e9, 4.8e12, 989e12, 450e9, "NVIDIA H200 SXM data sheet"),
    "v5e": Chip("tpu", 16e9, 819e9, 197e12, 100e9, "cloud.google.com/tpu/docs/v5e"),
    "v5p": Chip("tpu", 95e9, 2765e9, 459e12, 300e9, "cloud.google.com/tpu/docs/v5p"),
    "v6e": Chip("tpu", 32e9, 1640e9, 918e12, 224e9, "cloud.google.com/tpu/docs/v6e"),
}
DEVICE_KINDS = {  # part of the name that JAX reports -> key of CHIPS; the first match counts
    "H100": "h100",
    "H200": "h200",
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5p": "v5p",
    "TPU v5": "v5p",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
}
GPU_DESCRIPTIONS = {"h100": "h100_sxm", "h200": "h200"}  # files in targets/, which XLA wrote on such a device
SLICES = {  # number of sides of a TPU slice -> number of chips -> shape of the slice
    2: {1: "2x2", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"},
    3: {
        1: "2x2x1",
        4: "2x2x1",
        8: "2x2x2",
        16: "2x2x4",
        32: "2x4x4",
        64: "4x4x4",
        128: "4x4x8",
        256: "4x8x8",
        512: "8x8x8",
    },
}
GPUS_PER_HOST = (1, 2, 4, 8)  # sizes that clouds offer
EXAMPLES = "h100x8, h200x1, v5e-8, v6e-16, v5p-2x2x2"
COUNT = "[1-9][0-9]{0,3}"  # regular expression for a number of devices, or of chips along one side
USABLE = 0.92  # fraction of the memory; driver, compiler and fragmentation take the rest
KIND_NAMES = {  # `device_kind` as JAX reports it
    "h100": "NVIDIA H100 80GB HBM3",
    "h200": "NVIDIA H200",
    "v5e": "TPU v5 lite",
    "v5p": "TPU v5",
    "v6e": "TPU v6 lite",
}


class Hardware(NamedTuple):
    """A number of devices of one kind, which need not be at hand."""

    name: str
    kind: str  # a key of CHIPS, or "cpu"
    count: int

    @property
    def chip(self) -> Chip | None:
        """The data sheet; None for a CPU."""
        return CHIPS.get(self.kind)

    @property
    def platform(self) -> str:
        return self.chip.platform if self.chip else "cpu"

    @property
    def usable_bytes(self) -> float:
        """Usable memory of each device; for a CPU, that of the whole machine."""
        return USABLE * (self.chip.hbm_bytes if self.chip else machine_memory())

    @property
    def source(self) -> str:
        """Source of `usable_bytes`, for the plan."""
        return (
            f"{USABLE:.0%} of the data sheet's memory ({self.chip.source})"
            if self.chip
            else f"{USABLE:.0%} of this machine's memory"
        )


def number_bytes(platform: str) -> int:
    """Bytes of one weight or activation in the default dtype of a platform."""
    return {"float32": 4, "bfloat16": 2}[platform_defaults(platform).dtype]


def chip_of(device_kind: str) -> Chip | None:
    """Find the data sheet of a device by its `device_kind` in JAX; None for an unknown device."""
    return next((CHIPS[name] for part, name in DEVICE_KINDS.items() if part in device_kind), None)


def parse_hardware(name: str) -> tuple[str, int, str | None]:
    """Parse the name of accelerators into (kind, number of devices, shape of the TPU slice).

    "h100x8" becomes ("h100", 8, None); "v5e-8" and "v5e-2x4", whose numbers count chips, become ("v5e", 8, "2x4").
    """
    text = name.strip().lower()
    if match := re.fullmatch(rf"(h100|h200)x({COUNT})", text):
        kind, count = match[1], int(match[2])
        if not 1 <= count <= 8:
            raise ConfigError(f"hardware {shown(name)}: a host must have 1 to 8 GPUs, got {count}")
        return kind, count, None
    if match := re.fullmatch(rf"(v5e|v6e|v5p)-({COUNT}(?:x{COUNT})*)", text):
        kind, shape = match[1], match[2]
        axes = 3 if kind == "v5p" else 2
        sizes = SLICES[axes]
        if "x" in shape:
            if shape.count("x") != axes - 1:
                raise ConfigError(
                    f"hardware {shown(name)}: a {kind} slice must have {axes} sides, e.g. {kind}-{sizes[16]}"
                )
            return kind, math.prod(map(int, shape.split("x"))), shape
        if int(shape) not in sizes:
            raise ConfigError(
                f"hardware {shown(name)}: a {kind} slice must have one of {', '.join(map(str, sizes))} chips"
            )
        return kind, int(shape), sizes[int(shape)]
    raise ConfigError(f"unknown hardware {shown(name)}; {suggestion(text, EXAMPLES.split(', '))} (also cpu and cpux8)")


def hardware_of(name: str) -> Hardware:
    """Parse the name of accelerators (`parse_hardware`) or of simulated devices on this machine: "cpu", "cpux8"."""
    if match := re.fullmatch(rf"cpu(?:x({COUNT}))?", name.strip().lower()):
        return Hardware(name, "cpu", int(match[1] or 1))
    kind, count, _ = parse_hardware(name)
    return Hardware(name, kind, count)


def larger(hardware: Hardware) -> Hardware | None:
    """Return the next larger host or slice of the same kind, with at least twice as many devices, or None."""
    if hardware.kind == "cpu":
        return None
    separator, counts = (
        ("x", GPUS_PER_HOST) if hardware.platform == "gpu" else ("-", SLICES[3 if hardware.kind == "v5p" else 2])
    )
    count = next((count for count in counts if count >= 2 * hardware.count and count % hardware.count == 0), None)
    return None if count is None else Hardware(f"{hardware.kind}{separator}{count}", hardware.kind, count)


def missing_compiler(name: str) -> str | None:
    """Return why this machine cannot compile for the accelerators `name`, or None if it can."""
    if parse_hardware(name)[2] is not None:
        return None if importlib.util.find_spec("libtpu") else 'needs libtpu; pip install "dms-jax[tpu]"'
    plugins = [f"jax_cuda{version}_plugin" for version in (12, 13)]
    if any(map(importlib.util.find_spec, plugins)):
        return None
    return 'needs the CUDA plugin of JAX; pip install "dms-jax[cuda]"'


def target_mesh(name: str, shape: tuple[int, ...], axes: tuple[str, ...] = ("data", "model")) -> Mesh:
    """Make a mesh of devices to compile for. While it is set (`jax.set_mesh`), `sharding.target_device` returns them.

    Raises ConfigError if the hardware is unknown, has a different number of devices, or lacks its compiler.
    """
    kind, count, slice_shape = parse_hardware(name)
    if math.prod(shape) != count:
        raise ConfigError(f"mesh {'x'.join(map(str, shape))} needs {math.prod(shape)} devices, but {name} has {count}")
    if (why := missing_compiler(name)) is not None:
        raise ConfigError(f"{name}: {why}")
    if slice_shape is None:
        description = (Path(__file__).parent / "targets" / f"{GPU_DESCRIPTIONS[kind]}.textproto").read_text()
        try:
            devices = topologies.get_topology_desc(
                platform="cuda", topology_name="", target_config=description, topology=f"1x1x{count}"
            ).devices
        except NotImplementedError as why:
            raise ConfigError(
                f"{name}: JAX did not load its CUDA plugin because this machine has no GPU; set JAX_PLATFORMS=cpu to "
                "compile for one"
            ) from why
    else:
        # Without this, libtpu asks a metadata server which TPU this machine has.
        os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
        # Compiling does not take a TPU away from another process.
        os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
        devices = topologies.get_topology_desc(platform="tpu", topology_name=f"{kind}:{slice_shape}").devices
    return Mesh(np.array(devices[:count]).reshape(shape), axes, axis_types=(AxisType.Auto,) * len(axes))
