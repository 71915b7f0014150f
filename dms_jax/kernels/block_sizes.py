"""Block sizes of the kernels: their meaning, defaults that compile for every target, and what was measured (`tuned.json`)."""

import functools
import json
from pathlib import Path
from typing import NamedTuple

from dms_jax.config import ConfigError

TUNED = Path(__file__).parent / "tuned.json"


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
    parts: int = 1
    steps: int = 4  # blocks in flight (GPU)


class PlaceBlocks(NamedTuple):
    """Compaction: pairs of the chunk and slots of a block."""

    pairs: int
    slots: int = 512  # (TPU; a GPU touches only the rows that come)


Blocks = TrainBlocks | SlotBlocks | PlaceBlocks
KINDS: dict[str, type] = {"train_attention": TrainBlocks, "decode_attention": SlotBlocks, "chunk_attention": SlotBlocks, "compaction": PlaceBlocks}


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


# Sizes that fit into the fast memory of every target: the compile gate compiles them, `benchmarks.autotune` looks around them.
DEFAULTS: dict[tuple[str, str], Blocks] = {
    ("train_attention", "mosaic_gpu"): TrainBlocks(128, 128, 2),
    ("train_attention", "pallas_tpu"): TrainBlocks(1024, 512),
    ("decode_attention", "mosaic_gpu"): SlotBlocks(64, 128, 0, 4),
    ("decode_attention", "pallas_tpu"): SlotBlocks(64, 1024),
    ("chunk_attention", "mosaic_gpu"): SlotBlocks(128, 128, 1, 2),
    ("chunk_attention", "pallas_tpu"): SlotBlocks(512, 512),
    ("compaction", "mosaic_gpu"): PlaceBlocks(64),
    ("compaction", "pallas_tpu"): PlaceBlocks(256, 512),
}


def default_blocks(kernel: str, implementation: str, head_dim: int, dtype: str) -> Blocks | None:
    """None for a kernel without any."""
    blocks = DEFAULTS.get((kernel, implementation))
    if blocks == DEFAULTS["train_attention", "pallas_tpu"] and dtype == "float32":
        return TrainBlocks(512, 512)
    return blocks


@functools.cache
def _tuned(path: Path) -> tuple[TunedEntry, ...]:
    return read_tuned(path) if path.exists() else ()


def read_tuned(path: Path) -> tuple[TunedEntry, ...]:
    """Raises ConfigError for a file that `write_tuned` did not write."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        return tuple(_entry(fields) for fields in raw)
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
    blocks = fields.pop("blocks")
    return TunedEntry(blocks=None if blocks is None else KINDS[fields["kernel"]](**blocks), **fields)


def tuned_entry(kernel: str, implementation: str, device: str, head_dim: int, dtype: str) -> TunedEntry | None:
    """The measurement of a kernel on a kind of device; None where there is none."""
    wanted = (kernel, implementation, device, head_dim, dtype)
    return next((entry for entry in _tuned(TUNED) if entry[:5] == wanted), None)
