"""One table of the defaults that differ between CPUs, GPUs and TPUs."""

from dataclasses import dataclass
from typing import Literal

from dms_jax.sharding import target_device


@dataclass(frozen=True)
class PlatformDefaults:
    """The defaults of one platform. Options of the commands and arguments of the library override them."""

    # The dtype of weights and activations. A CPU multiplies bf16 in software.
    dtype: Literal["float32", "bfloat16"]
    # What the backward pass recomputes. A CPU has memory to spare, accelerators have FLOPs to spare.
    remat: Literal["full", "matmuls"]
    # Tokens per prefill chunk. The scores of a chunk against itself are [B N chunk chunk].
    prefill_chunk: int
    # Keys per block of training attention. On a CPU the scores of a block stay in a core's cache.
    attention_block: int
    # Cache slots per block of decode attention. On a CPU the keys and values of a block stay in a core's cache.
    slot_block: int
    # Whether decoding reads all slots in one block. On a GPU each further block is another kernel launch.
    one_block_decode: bool
    # Cache capacities are rounded up to a multiple of this, as the platform's kernels require.
    capacity_multiple: int
    # Whether decoding keeps the weights of each layer apart. On a CPU, XLA copies a layer out of a stacked array.
    unroll_layers: bool


DEFAULTS = {
    "cpu": PlatformDefaults("float32", "matmuls", 256, 128, 256, False, 64, True),
    "gpu": PlatformDefaults("bfloat16", "full", 1024, 512, 1024, True, 64, False),
    "tpu": PlatformDefaults("bfloat16", "full", 1024, 512, 1024, False, 128, False),
}


def platform_defaults(platform: str | None = None) -> PlatformDefaults:
    """The defaults of a platform ("cpu", "gpu" or "tpu"), or of the device for which the current program is traced."""
    return DEFAULTS[platform or target_device()[0]]
