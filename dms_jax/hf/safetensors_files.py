"""Read slices of safetensors files, and write files and shards. Nothing here depends on what a tensor means."""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import ml_dtypes
import numpy as np

from dms_jax.errors import ConfigError, shown
from dms_jax.files import check_file, read_json, replacing, write_json

DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}
CONTENT_HASH = "content_sha256"  # key in the headers of adapters and caches
INDEX = "model.safetensors.index.json"
SHARD_BYTES = 5 * 10**9
CHUNK_BYTES = 64 * 2**20


class Tensors(Protocol):
    """Tensors under Hugging Face names that are read a slice at a time, from a model folder or from a GGUF file."""

    where: str  # the path to name in messages

    def names(self) -> Iterable[str]: ...
    def shape(self, name: str) -> tuple[int, ...]: ...
    def dtype(self, name: str) -> np.dtype: ...
    def read(self, name: str, index: tuple[slice, ...] = ()) -> np.ndarray: ...


class SafetensorsFiles:
    """The tensors of one or more safetensors files. Only requested slices are read."""

    def __init__(self, where: str, paths: list[str]):
        self.where = where
        self.handles = {path: _open(path) for path in paths}
        # A handle is not a dict.
        self.handle_of = {name: handle for handle in self.handles.values() for name in handle.keys()}  # noqa: SIM118

    def names(self) -> Iterable[str]:
        return self.handle_of.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.handle_of[name].get_slice(name).get_shape())

    def dtype(self, name: str) -> np.dtype:
        dtype = self.handle_of[name].get_slice(name).get_dtype()
        if dtype not in DTYPES:
            raise ConfigError(
                f"tensor {name} in {self.where} must be one of {', '.join(DTYPES)}, got {dtype}; convert it to BF16 "
                "first"
            )
        return DTYPES[dtype]

    def read(self, name: str, index: tuple[slice, ...] = ()) -> np.ndarray:
        if not index:
            return self.handle_of[name].get_tensor(name)
        return self.handle_of[name].get_slice(name)[index if len(index) > 1 else index[0]]

    def verify(self) -> None:
        """Read all of an adapter or cache, and refuse it if its content does not match the hash in its header."""
        metadata = self.metadata
        written = metadata.pop(CONTENT_HASH, None)
        if written != _content_hash(self.names(), self.read, metadata):
            raise ConfigError(
                f"{self.where} is damaged: its content does not match the {CONTENT_HASH} in its header; write it again"
            )

    @property
    def metadata(self) -> dict[str, str]:
        """The key-value pairs in the headers of the files."""
        return {key: value for handle in self.handles.values() for key, value in (handle.metadata() or {}).items()}


def open_folder(folder: str) -> SafetensorsFiles:
    """Open the tensors of a model folder: `model.safetensors`, or the shards that the index names."""
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
    # Only plain file names are allowed, because a downloaded index must not make us read outside its folder.
    if invalid := [
        name
        for name in file_of.values()
        if not isinstance(name, str) or os.path.basename(name) != name or not name.endswith(".safetensors")
    ]:
        raise ConfigError(
            f"{index} names {shown(invalid[0])}, which is not a .safetensors file in its folder; download the folder "
            "again"
        )
    files = sorted(set(file_of.values()))
    missing = [name for name in files if not os.path.isfile(os.path.join(folder, name))]
    if missing:
        raise ConfigError(f"{folder} lacks {shorten(missing)}, which {INDEX} names; download the folder again")
    tensors = SafetensorsFiles(folder, [os.path.join(folder, name) for name in files])
    if missing := sorted(file_of.keys() - tensors.names()):
        raise ConfigError(f"{INDEX} in {folder} names tensors that its files do not contain: {shorten(missing)}")
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

    check_file(path)
    try:
        return safe_open(path, framework="np")
    except (SafetensorError, OSError) as why:
        size = os.path.getsize(path) if os.path.exists(path) else 0
        raise ConfigError(f"{path} is damaged ({size} bytes): {' '.join(str(why).split())}") from why


def row_chunks(shape: tuple[int, ...], itemsize: int) -> Iterator[tuple[slice, ...]]:
    """Yield the indices that read a tensor [rows ...] once, in order, about CHUNK_BYTES at a time."""
    rows = shape[0]
    step = max(1, CHUNK_BYTES // max(1, itemsize * int(np.prod(shape[1:]))))
    for start in range(0, rows, step):
        yield (slice(start, min(start + step, rows)), *(slice(0, size) for size in shape[1:]))


@dataclass(frozen=True)
class Write:
    """One tensor to write. `value()` is called only when its file is written."""

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
    """Divide tensors, in order, among files of at most `limit` bytes. A larger tensor gets a file of its own."""
    groups: list[list[Write]] = [[]]
    for write in writes:
        if groups[-1] and sum(w.nbytes for w in groups[-1]) + write.nbytes > limit:
            groups.append([])
        groups[-1].append(write)
    if len(groups) == 1:
        return [Shard("model.safetensors", groups[0])]
    return [Shard(f"model-{i + 1:05d}-of-{len(groups):05d}.safetensors", group) for i, group in enumerate(groups)]


def write_folder(folder: str, writes: list[Write], limit: int = SHARD_BYTES, writer: bool = True) -> None:
    """Write tensors as `model.safetensors`, or as several shards with an index.

    `writer=False` writes nothing but still computes the values, because every process must take part in gathering a
    sharded array.
    """
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
        write_json(os.path.join(folder, INDEX), index)


def save_file(path: str, tensors: dict[str, np.ndarray], metadata: dict[str, str], writer: bool = True) -> None:
    """Write one safetensors file.

    The arrays are made contiguous first, because the library's `save_file` silently writes a transposed array in the
    wrong order.
    """
    from safetensors.numpy import save_file as save

    if writer:
        save({name: np.ascontiguousarray(value) for name, value in tensors.items()}, path, metadata)


def new_path(path: str | os.PathLike[str], overwrite: bool) -> str:
    """Return the absolute path of a file to write. Raises ConfigError if it exists and must not be replaced."""
    path = os.path.abspath(os.fspath(path))
    if os.path.exists(path) and not overwrite:
        raise ConfigError(f"{path} exists; give another file, or overwrite=True")
    return path


def write_whole(path: str, tensors: dict[str, np.ndarray], metadata: dict[str, str]) -> None:
    """Write an adapter or cache, whole or not at all, with the hash of its content in its header.

    Raises ConfigError.
    """
    from safetensors import SafetensorError

    content = {CONTENT_HASH: _content_hash(tensors, tensors.__getitem__, metadata)}
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with replacing(path) as temporary:
            save_file(os.fspath(temporary), tensors, metadata | content)
    except (OSError, SafetensorError) as why:  # the library has its own type for a full disk
        raise ConfigError(f"cannot write {path}: {why}") from why


def open_own(path: str | os.PathLike[str], what: str, kind: str, version: str) -> SafetensorsFiles:
    """Open an adapter or cache whose header must have this kind and version; `what` is e.g. "a cache", for messages."""
    path = os.fspath(path)
    if not os.path.isfile(path):
        raise ConfigError(f"{path}: no such {what.split()[-1]} file")
    tensors = SafetensorsFiles(path, [path])
    if tensors.metadata.get("kind") != kind:
        raise ConfigError(f"{path} is not {what} of dms_jax: its header does not have kind={kind}")
    if tensors.metadata.get("version") != version:
        raise ConfigError(
            f"{path} must be {what} of version {version}, got version {tensors.metadata.get('version')}; write it again"
        )
    return tensors


def _drain(group: list[Write]) -> dict:
    """Compute every value and drop it."""
    for write in group:
        write.value()
    return {}


def shorten(names: list[str], limit: int = 6) -> str:
    """Return the first few of a list of names, and the number of the others, for a message."""
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
