"""One table of the defaults that differ between CPUs, GPUs and TPUs."""

from dataclasses import dataclass
from typing import Literal

from dms_jax.sharding import target_device


@dataclass(frozen=True)
class PlatformDefaults:
    """Defaults of one platform. Options of the commands and arguments of the library override them."""

    dtype: Literal["float32", "bfloat16"]  # of weights and activations; a CPU multiplies bf16 in software
    remat: Literal[
        "full", "matmuls"
    ]  # what the backward pass recomputes: a CPU has memory to spare, accelerators have FLOPs
    prefill_chunk: int  # tokens per prefill chunk; scores of a chunk against itself are [B N chunk chunk]
    attention_block: int  # keys per block of training attention; a block's scores stay in a CPU core's cache
    slot_block: int  # cache slots per block of decode attention; a block's keys and values stay in a CPU core's cache
    one_block_decode: (
        bool  # read all slots in one block when decoding: on a GPU each further block is another kernel launch
    )
    capacity_multiple: int  # cache capacities are rounded up to a multiple of it, as the platform's kernels require
    unroll_layers: (
        bool  # keep each layer's weights apart for decoding: XLA on a CPU copies a layer out of a stacked array
    )


DEFAULTS = {
    "cpu": PlatformDefaults("float32", "matmuls", 256, 128, 256, False, 64, True),
    "gpu": PlatformDefaults("bfloat16", "full", 1024, 512, 1024, True, 64, False),
    "tpu": PlatformDefaults("bfloat16", "full", 1024, 512, 1024, False, 128, False),
}


def platform_defaults(platform: str | None = None) -> PlatformDefaults:
    """Defaults of the named platform ("cpu", "gpu" or "tpu"), or of the device that the program being traced is for."""
    return DEFAULTS[platform or target_device()[0]]
