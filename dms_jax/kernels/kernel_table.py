"""The kernels, one record each: dispatch, autotuning, benchmarks, tests and docs/kernels.md read `KERNELS`.

A new kernel needs its own files in this folder, a record here, a function in `attention_api` that calls it, a suite in
`dms_jax/kernels/kernel_cases.py` and a test in `tests/kernels`. This module loads no JAX, because commands read it for
`--help`.
"""

import importlib
import itertools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from dms_jax.kernels.block_sizes import Blocks, PlaceBlocks, SlotBlocks, TrainBlocks

AUTO, XLA, GPU, TPU = "auto", "xla", "mosaic_gpu", "pallas_tpu"  # names of implementations
MIN_BLOCK = 64  # autotuning halves no block below this size


class PallasKernel(NamedTuple):
    """A kernel for one kind of accelerator, with its default block sizes and the alternatives that autotuning tries."""

    function: str  # "module:function", imported at its first call, so that a TPU host need not load Mosaic GPU
    # Sizes for heads of 128 in bf16, small enough for the fast memory of every target. None: it has no block sizes.
    blocks: Blocks | None = None
    per_head_dim: tuple[str, ...] = ()  # sizes that grow for smaller heads, so that a block keeps its bytes
    halved_in_fp32: tuple[str, ...] = ()  # sizes that are halved in fp32, for the same reason
    # Sizes to try: all combinations within a mapping. An int is a size, a float a multiple of the default.
    alternatives: tuple[Mapping[str, tuple[int | float, ...]], ...] = ()
    max_slots: int | None = None  # maximum number of slots per head; None: any number

    def default_blocks(self, head_dim: int, dtype: str) -> Blocks | None:
        """Return the block sizes for a device without measurements. `dtype` is the dtype of keys and values."""
        if self.blocks is None:
            return None
        sizes = self.blocks._asdict()
        sizes |= {name: sizes[name] * 128 // head_dim for name in self.per_head_dim}
        if dtype == "float32":
            sizes |= {name: sizes[name] // 2 for name in self.halved_in_fp32}
        return self.blocks._replace(**sizes)

    def candidates(self, head_dim: int, dtype: str) -> list[Blocks | None]:
        """Return the block sizes that `benchmarks.autotune` times, the default first. Some may turn out not to fit."""
        default = self.default_blocks(head_dim, dtype)
        if default is None:
            return [None]
        found: list[Blocks | None] = [default]
        for choices in self.alternatives:
            for values in itertools.product(*choices.values()):
                sizes = {
                    name: max(MIN_BLOCK, int(value * getattr(default, name))) if isinstance(value, float) else value
                    for name, value in zip(choices, values, strict=True)
                }
                found.append(default._replace(**sizes))
        return [*dict.fromkeys(found)]


class Kernel(NamedTuple):
    """One kernel and its implementations, which give the same result."""

    summary: str
    xla: str  # "module:function" of the portable function, which the kernels are tested against
    gpu: PallasKernel | None = None  # None: there is no such version, and XLA runs there
    tpu: PallasKernel | None = None
    blocks: Callable[..., Blocks] | None = None  # the type of its block sizes; None: it has no block sizes

    @property
    def implementations(self) -> tuple[str, ...]:
        """The implementations that exist, in order of preference."""
        return (*[name for name, version in ((GPU, self.gpu), (TPU, self.tpu)) if version is not None], XLA)

    def written_for(self, implementation: str) -> PallasKernel:
        """Return the kernel for `implementation`, which is `GPU` or `TPU` and one of `implementations`."""
        version = {GPU: self.gpu, TPU: self.tpu}[implementation]
        assert version is not None, f"there is no {implementation} version"
        return version


def load(function: str) -> Any:
    """Import the function named "module:function"."""
    module, _, name = function.partition(":")
    return getattr(importlib.import_module(module), name)


# GPU: four blocks of 16 KiB of bf16 keys, and as many of values, are in flight. TPU: blocks fill about 10 MiB of VMEM.
# `parts` is not tuned, because the best number depends on how many rows and heads there are.
ATTEND_SLOTS_TPU = PallasKernel(
    "dms_jax.kernels.slot_attention_tpu:attend_slots",
    SlotBlocks(512, 1024),
    halved_in_fp32=("rows", "keys"),
    alternatives=({"keys": (0.5, 1.0, 2.0, 4.0)},),
)
ATTEND_SLOTS_GPU = PallasKernel(
    "dms_jax.kernels.slot_attention_gpu:attend_slots",
    SlotBlocks(64, 64, 0, 4),
    per_head_dim=("keys",),
    alternatives=({"keys": (0.5, 1.0, 2.0), "steps": (2, 4, 6)},),
)
KERNELS = {
    "train_attention": Kernel(
        "attention with the eviction gate, value and gradient",
        xla="dms_jax.core.chunked_attention:gated_attention",
        gpu=PallasKernel(
            "dms_jax.kernels.train_attention_gpu:attend",
            TrainBlocks(128, 128, 2),
            alternatives=({"k": (64, 128, 256), "steps": (2, 3)}, {"q": (256,)}),
        ),
        tpu=PallasKernel(
            "dms_jax.kernels.train_attention_tpu:attend",
            TrainBlocks(1024, 512),
            halved_in_fp32=("q",),
            alternatives=({"k": (256, 512, 1024)}, {"q": (256, 512)}),
        ),
        blocks=TrainBlocks,
    ),
    "decode_attention": Kernel(
        "one query per row over the slots of a compact cache",
        xla="dms_jax.core.slot_attention:slot_attention",
        gpu=ATTEND_SLOTS_GPU,
        tpu=ATTEND_SLOTS_TPU,
        blocks=SlotBlocks,
    ),
    "chunk_attention": Kernel(
        "a prefill chunk over the slots of a compact cache and over itself",
        xla="dms_jax.core.slot_attention:slot_attention",
        gpu=PallasKernel(
            "dms_jax.kernels.slot_attention_gpu:attend_slots",
            SlotBlocks(128, 64, 1, 3),
            per_head_dim=("keys",),
            alternatives=({"keys": (0.5, 1.0, 2.0), "steps": (2, 3)},),
        ),
        tpu=ATTEND_SLOTS_TPU,
        blocks=SlotBlocks,
    ),
    "page_attention": Kernel(
        "query rows over all pairs in the pages of their KV head",
        xla="dms_jax.core.paged_attention:attend_pages",
        gpu=ATTEND_SLOTS_GPU._replace(function="dms_jax.kernels.page_attention_gpu:attend_pages"),
        tpu=ATTEND_SLOTS_TPU._replace(function="dms_jax.kernels.page_attention_tpu:attend_pages"),
        blocks=SlotBlocks,
    ),
    "compaction": Kernel(
        "the write of the live pairs of a prefill chunk into free slots",
        xla="dms_jax.core.compact_cache:write_pairs",
        gpu=PallasKernel(
            "dms_jax.kernels.compaction_gpu:write_pairs", PlaceBlocks(32), alternatives=({"pairs": (64, 128)},)
        ),
        tpu=PallasKernel(
            "dms_jax.kernels.compaction_tpu:write_pairs",
            PlaceBlocks(256, 256),
            alternatives=({"pairs": (64, 128)}, {"slots": (128, 512)}),
        ),
        blocks=PlaceBlocks,
    ),
    "decode_update": Kernel(
        "rotary embedding, eviction decision, slot choice and write of one token per row",
        xla="dms_jax.kernels.decode_update_xla:decode_update",
        gpu=PallasKernel("dms_jax.kernels.decode_update_gpu:decode_update"),
        # Position, expiry and score of all slots of eight heads must fit into VMEM.
        tpu=PallasKernel("dms_jax.kernels.decode_update_tpu:decode_update", max_slots=65536),
    ),
}
