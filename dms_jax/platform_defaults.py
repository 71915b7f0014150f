"""One table of the defaults that differ between CPUs, GPUs and TPUs."""

import re
from dataclasses import dataclass
from typing import Any, Literal

import jax

from dms_jax.sharding import target_device


@dataclass(frozen=True)
class PlatformDefaults:
    """Defaults of one platform. Options of commands and arguments of functions override them."""

    # Precision of weights and activations. A CPU multiplies bf16 in software.
    dtype: Literal["float32", "bfloat16"]
    # What the backward pass recomputes. A CPU has memory to spare, an accelerator has FLOPs to spare.
    remat: Literal["full", "matmuls"]
    # Tokens per prefill chunk. The scores of a chunk against itself take [B N chunk chunk].
    prefill_chunk: int
    # Keys per block of training attention. On a CPU, the scores of a block must fit into the cache of a core.
    attention_block: int
    # Cache slots per block of decode attention. On a CPU, the pairs of a block must fit into the cache of a core.
    slot_block: int
    # Decode without a loop over slots, because XLA on a GPU asks the host before each iteration of a loop.
    loop_free_decode: bool
    # Cache capacities are rounded up to a multiple of this number, as the platform's kernels require.
    capacity_multiple: int
    # Pairs of a page. Small pages waste fewer places at the end of each head; kernels copy whole pages.
    page_size: int
    # Keep the cache of `generate` in pages even where no kernel reads them. An accelerator would then gather all pages
    # of each head at every step.
    pages: bool
    # Keep the weights of each layer in arrays of their own for decoding, because XLA on a CPU copies a layer out of a
    # stacked array before it uses it.
    unroll_layers: bool
    # Numbers in a row of the fastest memory. The TPU compiler lays the pairs of a page side by side if one pair would
    # not fill such rows.
    lanes: int = 1
    # XLA fuses reads of an array into the write that follows, and then copies the array, because it cannot write in
    # place what it still reads.
    reads_in_writes: bool = False

    def pairs_in_rows(self, head_dim: int) -> bool:
        """Return whether the numbers of a pair lie next to each other in memory.

        If not, XLA copies a whole arena to read single pairs of it, but it reads whole pages in place.
        """
        return head_dim % self.lanes == 0


DEFAULTS = {
    "cpu": PlatformDefaults("float32", "matmuls", 256, 128, 256, False, 64, 32, True, True),
    "gpu": PlatformDefaults("bfloat16", "full", 1024, 512, 1024, True, 64, 64, False, False, reads_in_writes=True),
    "tpu": PlatformDefaults("bfloat16", "full", 1024, 512, 1024, False, 128, 128, False, False, 128),
}


def platform_defaults(platform: str | None = None) -> PlatformDefaults:
    """Return the defaults of "cpu", "gpu" or "tpu"; if None, of the platform for which the current program is
    traced."""
    return DEFAULTS[platform or target_device()[0]]


def default_dtype(device: Any = None) -> Literal["float32", "bfloat16"]:
    """Return the precision of weights and activations on a `jax.Device`; None is the first one of this process.

    A GPU of compute capability below 8.0, such as a T4, has no bf16: XLA emulates it, more slowly than it computes in
    fp32 (openxla/xla, issue 12429).
    """
    device = jax.devices()[0] if device is None else device
    version = re.fullmatch(r"(\d+)\.\d+", str(getattr(device, "compute_capability", "")))
    return "float32" if version and int(version[1]) < 8 else DEFAULTS[device.platform].dtype
