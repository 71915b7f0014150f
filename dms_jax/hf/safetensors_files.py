"""Tensors on disk: read slices of a folder of safetensors files, write shards. Nothing here knows what a tensor means."""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import ml_dtypes
import numpy as np

from dms_jax.errors import ConfigError, shown
from dms_jax.files import read_json

DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}
CONTENT_HASH = "content_sha256"  # in the header of files of ours
INDEX = "model.safetensors.index.json"
SHARD_BYTES = 5 * 10**9
CHUNK_BYTES = 64 * 2**20


class Tensors(Protocol):
    """Named tensors that are read a slice at a time: a Hugging Face folder, or a GGUF file under Hugging Face names."""

    where: str  # for messages

    def names(self) -> Iterable[str]: ...
    def shape(self, name: str) -> tuple[int, ...]: ...
    def dtype(self, name: str) -> np.dtype: ...
    def read(self, name: str, index: tuple[slice, ...] = ()) -> np.ndarray: ...


class SafetensorsFiles:
    """The tensors of some safetensors files. Only asked-for slices are read."""

    def __init__(self, where: str, paths: list[str]):
        self.where = where
        self.handles = {path: _open(path) for path in paths}
        self.handle_of = {name: handle for handle in self.handles.values() for name in handle.keys()}  # noqa: SIM118

    def names(self) -> Iterable[str]:
        return self.handle_of.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.handle_of[name].get_slice(name).get_shape())

    def dtype(self, name: str) -> np.dtype:
        dtype = self.handle_of[name].get_slice(name).get_dtype()
        if dtype not in DTYPES:
            raise ConfigError(
                f"tensor {name} in {self.where} is {dtype}; supported are {', '.join(DTYPES)}. Convert it to BF16 first"
            )
        return DTYPES[dtype]

    def read(self, name: str, index: tuple[slice, ...] = ()) -> np.ndarray:
        if not index:
            return self.handle_of[name].get_tensor(name)
        return self.handle_of[name].get_slice(name)[index if len(index) > 1 else index[0]]

    def verify(self) -> None:
        """Refuse a file of ours whose bytes are not those that were written: no shape shows a flipped bit. Reads it all."""
        metadata = self.metadata
        written = metadata.pop(CONTENT_HASH, None)
        if written != _content_hash(self.names(), self.read, metadata):
            raise ConfigError(
                f"{self.where} is damaged: its content is not what its header says ({CONTENT_HASH}); write it again"
            )

    @property
    def metadata(self) -> dict[str, str]:
        """The strings in the headers."""
        return {key: value for handle in self.handles.values() for key, value in (handle.metadata() or {}).items()}


def open_folder(folder: str) -> SafetensorsFiles:
    """The tensors of a model folder: `model.safetensors`, or the shards that its index names."""
    index = os.path.join(folder, INDEX)
    if not os.path.exists(index):
        if os.path.isfile(os.path.join(folder, "model.safetensors")):
            return SafetensorsFiles(folder, [os.path.join(folder, "model.safetensors")])
        found = sorted(name for name in os.listdir(folder) if name.endswith((".safetensors", ".bin", ".pth", ".gguf")))
        raise ConfigError(
            f"{folder} has neither model.safetensors nor {INDEX}" + (f"; it has {shorten(found)}" if found else "")
        )
    file_of = read_json(index).get("weight_map")
    if not isinstance(file_of, dict) or not file_of:
        raise ConfigError(f"{index} has no weight_map")
    # A plain name only: a downloaded index must not make us read outside its folder.
    if strange := [
        name
        for name in file_of.values()
        if not isinstance(name, str) or os.path.basename(name) != name or not name.endswith(".safetensors")
    ]:
        raise ConfigError(
            f"{index} names {shown(strange[0])}, which is no .safetensors file of its folder; download the folder again"
        )
    files = sorted(set(file_of.values()))
    absent = [name for name in files if not os.path.isfile(os.path.join(folder, name))]
    if absent:
        raise ConfigError(f"{folder} lacks {shorten(absent)}, which {INDEX} names; download the folder again")
    tensors = SafetensorsFiles(folder, [os.path.join(folder, name) for name in files])
    if unheld := sorted(file_of.keys() - tensors.names()):
        raise ConfigError(f"{INDEX} in {folder} names tensors that its files do not hold: {shorten(unheld)}")
    return tensors


def _content_hash(names: Iterable[str], read: Callable[[str], np.ndarray], metadata: dict[str, str]) -> str:
    digest = hashlib.sha256(json.dumps(sorted(metadata.items())).encode())
    for name in sorted(names):
        value = np.ascontiguousarray(read(name))
        digest.update(f"{name} {value.dtype} {list(value.shape)}\n".encode())
        digest.update(value.reshape(-1).view(np.uint8))
    return digest.hexdigest()


def _open(path: str):
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(path, framework="np")
    except (SafetensorError, OSError) as why:
        size = os.path.getsize(path) if os.path.exists(path) else 0
        raise ConfigError(f"{path} is damaged ({size} bytes): {' '.join(str(why).split())}") from why


def row_chunks(shape: tuple[int, ...], itemsize: int) -> Iterator[tuple[slice, ...]]:
    """Indices that together read a tensor once, in order, at most about CHUNK_BYTES at a time."""
    rows = shape[0]
    step = max(1, CHUNK_BYTES // max(1, itemsize * int(np.prod(shape[1:]))))
    for start in range(0, rows, step):
        yield (slice(start, min(start + step, rows)), *(slice(0, size) for size in shape[1:]))


@dataclass(frozen=True)
class Write:
    """One tensor to write; `value()` makes it when its turn comes."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    value: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape)) * self.dtype.itemsize


class Shard(NamedTuple):
    file: str
    writes: list[Write]


def plan_shards(writes: list[Write], limit: int = SHARD_BYTES) -> list[Shard]:
    """Tensors in order, into files of at most `limit` bytes (a single larger tensor gets its own)."""
    groups: list[list[Write]] = [[]]
    for write in writes:
        if groups[-1] and sum(w.nbytes for w in groups[-1]) + write.nbytes > limit:
            groups.append([])
        groups[-1].append(write)
    if len(groups) == 1:
        return [Shard("model.safetensors", groups[0])]
    return [Shard(f"model-{i + 1:05d}-of-{len(groups):05d}.safetensors", group) for i, group in enumerate(groups)]


def write_folder(folder: str, writes: list[Write], limit: int = SHARD_BYTES, writer: bool = True) -> None:
    """Write tensors as `model*.safetensors` with an index when there are several. `writer=False`: another process writes, but
    every process must make the values, since gathering a sharded array takes all of them."""
    shards = plan_shards(writes, limit)
    for file, group in shards:
        save_file(
            os.path.join(folder, file),
            {w.name: w.value() for w in group} if writer else _drain(group),
            {"format": "pt"},
            writer,
        )
    if len(shards) > 1 and writer:
        index = {
            "metadata": {"total_size": sum(w.nbytes for w in writes)},
            "weight_map": {w.name: shard.file for shard in shards for w in shard.writes},
        }
        with open(os.path.join(folder, INDEX), "w", encoding="utf-8") as file:
            json.dump(index, file, indent=2)


def save_file(path: str, tensors: dict[str, np.ndarray], metadata: dict[str, str], writer: bool = True) -> None:
    """One safetensors file. `save_file` of the library writes a transposed array wrongly and says nothing, hence the copy."""
    from safetensors.numpy import save_file as save

    if writer:
        save({name: np.ascontiguousarray(value) for name, value in tensors.items()}, path, metadata)


def new_path(path: str | os.PathLike[str], overwrite: bool) -> str:
    """The absolute path of a file to write; ConfigError when it is there already and must not be replaced."""
    path = os.path.abspath(os.fspath(path))
    if os.path.exists(path) and not overwrite:
        raise ConfigError(f"{path} exists; give another file, or overwrite=True")
    return path


def write_whole(path: str, tensors: dict[str, np.ndarray], metadata: dict[str, str]) -> None:
    """One safetensors file of ours that appears whole or not at all; its header says the hash of all of it. Raises ConfigError."""
    from safetensors import SafetensorError

    temporary = f"{path}.tmp-{os.getpid()}"
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        save_file(temporary, tensors, metadata | {CONTENT_HASH: _content_hash(tensors, tensors.__getitem__, metadata)})
        os.replace(temporary, path)
    except (OSError, SafetensorError) as why:  # the library wraps a full disk in its own type
        raise ConfigError(f"cannot write {path}: {why}") from why
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


def open_own(path: str | os.PathLike[str], what: str, kind: str, version: str) -> SafetensorsFiles:
    """A file of ours, `what` it is with its article ("a cache"), whose header says `kind` and `version`. Raises ConfigError."""
    path = os.fspath(path)
    if not os.path.isfile(path):
        raise ConfigError(f"{path}: no such {what.split()[-1]} file")
    tensors = SafetensorsFiles(path, [path])
    if tensors.metadata.get("kind") != kind:
        raise ConfigError(f"{path} is not {what} of dms_jax (its header has no kind={kind})")
    if tensors.metadata.get("version") != version:
        raise ConfigError(
            f"{path} is {what} of version {tensors.metadata.get('version')}, this dms_jax reads {version}"
        )
    return tensors


def _drain(group: list[Write]) -> dict:
    for write in group:
        write.value()
    return {}


def shorten(names: list[str], most: int = 6) -> str:
    """The first few of a list of names, and how many more."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
