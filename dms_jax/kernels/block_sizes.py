"""Block sizes of the kernels: their meaning, defaults that compile for every target, and what was measured (`tuned.json`)."""

import functools
import json
from pathlib import Path
from typing import NamedTuple

from dms_jax.errors import ConfigError
from dms_jax.files import parse_json

KERNELS = {
    "train_attention": "attention with the eviction gate, value and gradient",
    "decode_attention": "one query a row over the slots of a compact cache",
    "chunk_attention": "a prefill chunk over the slots and over itself",
    "compaction": "survivors of a prefill chunk into free slots",
    "decode_update": "rotary embedding, eviction decision, slot choice and write of one token",
}
TUNED = Path(__file__).parent / "tuned.json"
# What was measured on the first holds on the second until that is measured itself: the same multiprocessors, another memory.
ALIKE = (("H200", "H100"), ("H100", "H200"), ("H200", "GH200"))


class TrainBlocks(NamedTuple):
    """Training attention: queries and keys of a block."""

    q: int
    k: int
    steps: int = 2  # blocks in flight (GPU)

    def fit(self, length: int) -> "TrainBlocks":
        """No larger than rows of `length` tokens need."""
        most = max(128, 1 << (length - 1).bit_length())
        return self._replace(q=min(self.q, most), k=min(self.k, most))


class SlotBlocks(NamedTuple):
    """Attention over slots: query rows and keys of a block, and into how many parts the slots of a head are split."""

    rows: int
    keys: int
    parts: int = 1  # (GPU) 0: as many as keep all multiprocessors busy
    steps: int = 4  # blocks in flight (GPU)


class PlaceBlocks(NamedTuple):
    """Compaction: pairs of the chunk and slots of a block."""

    pairs: int
    slots: int = 512  # (TPU; a GPU touches only the rows that come)


Blocks = TrainBlocks | SlotBlocks | PlaceBlocks
KINDS: dict[str, type] = {
    "train_attention": TrainBlocks,
    "decode_attention": SlotBlocks,
    "chunk_attention": SlotBlocks,
    "compaction": PlaceBlocks,
}


class TunedEntry(NamedTuple):
    """One measurement of `benchmarks.autotune`."""

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


def default_blocks(kernel: str, implementation: str, head_dim: int, dtype: str) -> Blocks | None:
    """Sizes that fit into the fast memory of every target (`pytest -m aot` compiles them); None for a kernel without any. `dtype` is
    that of keys and values."""
    keys = 8192 // head_dim  # on a GPU: four blocks of 16 KiB of bf16 keys, and as many of values, are in flight
    wide = 512 if dtype == "float32" else 1024  # on a TPU: about 10 MiB of VMEM
    return {
        ("train_attention", "mosaic_gpu"): TrainBlocks(128, 128, 2),
        ("train_attention", "pallas_tpu"): TrainBlocks(wide, 512),
        ("decode_attention", "mosaic_gpu"): SlotBlocks(64, keys, 0, 4),
        ("decode_attention", "pallas_tpu"): SlotBlocks(wide // 2, wide),
        ("chunk_attention", "mosaic_gpu"): SlotBlocks(128, keys, 1, 3),
        ("chunk_attention", "pallas_tpu"): SlotBlocks(wide // 2, wide),
        ("compaction", "mosaic_gpu"): PlaceBlocks(32),
        ("compaction", "pallas_tpu"): PlaceBlocks(256, 256),
    }.get((kernel, implementation))


def candidates(kernel: str, implementation: str, head_dim: int, dtype: str) -> list[Blocks | None]:
    """What `benchmarks.autotune` tries: the default first, then its neighbours. Some may not fit; that is found out there."""
    default = default_blocks(kernel, implementation, head_dim, dtype)
    if default is None:
        return [None]
    others: list[Blocks] = []
    if isinstance(default, TrainBlocks):
        sizes = (64, 128, 256) if implementation == "mosaic_gpu" else (256, 512, 1024)
        others = [
            default._replace(k=k, steps=steps)
            for k in sizes
            for steps in ((2, 3) if implementation == "mosaic_gpu" else (2,))
        ]
        others += [default._replace(q=q) for q in ((256,) if implementation == "mosaic_gpu" else (256, 512))]
    elif isinstance(default, SlotBlocks):
        keys = (max(64, default.keys // 2), default.keys, default.keys * 2)
        if implementation == "mosaic_gpu":  # `parts` is not tuned: it depends on the number of rows and heads
            others = [
                default._replace(keys=k, steps=s) for k in keys for s in ((2, 4, 6) if default.rows == 64 else (2, 3))
            ]
        else:
            others = [default._replace(keys=k) for k in (*keys, default.keys * 4)]
    else:
        others = [default._replace(pairs=pairs) for pairs in (64, 128)]
        others += [default._replace(slots=slots) for slots in (128, 512)] if implementation == "pallas_tpu" else []
    return list(dict.fromkeys([default, *others]))


@functools.cache
def _tuned(path: Path) -> tuple[TunedEntry, ...]:
    return read_tuned(path) if path.exists() else ()


def read_tuned(path: Path) -> tuple[TunedEntry, ...]:
    """Raises ConfigError for a file that `write_tuned` did not write."""
    try:
        return tuple(_entry(fields) for fields in parse_json(path.read_text(encoding="utf-8"), "it"))
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as why:
        raise ConfigError(
            f"{path} holds no tuned block sizes ({' '.join(str(why).split())}); delete it, or run `python -m benchmarks.autotune`"
        ) from why


def write_tuned(path: Path, entries: tuple[TunedEntry, ...]) -> None:
    """One measurement a line; the file appears whole or not at all."""
    lines = [json.dumps(entry._asdict() | {"blocks": entry.blocks and entry.blocks._asdict()}) for entry in entries]
    temporary = path.with_suffix(".new")
    temporary.write_text("[\n" + ",\n".join(lines) + "\n]\n", encoding="utf-8")
    temporary.replace(path)
    _tuned.cache_clear()


def _entry(fields: dict) -> TunedEntry:
    kernel, blocks = fields["kernel"], fields.pop("blocks")
    if kernel not in KERNELS:
        raise ValueError(f"there is no kernel {kernel!r}")
    entry = TunedEntry(blocks=None if blocks is None else KINDS[kernel](**blocks), **fields)
    for name, kind in NUMBERS.items():
        if type(value := getattr(entry, name)) is not kind or value != value:
            raise ValueError(f"{name} is {value!r}")
    if wrong := [
        name
        for name in TunedEntry._fields
        if name not in NUMBERS and name != "blocks" and not isinstance(getattr(entry, name), str)
    ]:
        raise ValueError(f"{wrong[0]} is no text")
    if any(type(size) is not int or size < 0 for size in entry.blocks or ()):
        raise ValueError(f"blocks are {entry.blocks}")
    return entry


def tuned_entry(kernel: str, implementation: str, device: str, head_dim: int, dtype: str) -> TunedEntry | None:
    """The measurement of a kernel on a kind of device, or on one with the same multiprocessors; None where there is none."""
    found = {
        entry.device: entry
        for entry in _tuned(TUNED)
        if (*entry[:2], *entry[3:5]) == (kernel, implementation, head_dim, dtype)
    }
    return found.get(device) or next(
        (entry for other, entry in found.items() if any(t in other and o in device for t, o in ALIKE)), None
    )
