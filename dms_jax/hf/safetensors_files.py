"""Read slices of safetensors files, and write files and shards. Nothing here depends on what a tensor means."""

import hashlib
import json
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import ml_dtypes
import numpy as np

from dms_jax.errors import ConfigError, shown
from dms_jax.files import check_file, check_target, mode_of_new_file, read_json, replacing, set_mode, write_json
from dms_jax.hf.folder_files import member

DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}
CONTENT_HASH = "content_sha256"  # key in the headers of adapters and caches
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
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
    """The tensors of one or more safetensors files. Only requested slices are read.

    `file_of`: the path to read each of these names from, whatever other files hold it too.
    """

    def __init__(self, where: str, paths: list[str], file_of: dict[str, str] | None = None):
        self.where = where
        self.handles = {path: _open(path) for path in paths}
        files_with: dict[str, list[str]] = {}
        for path, handle in self.handles.items():
            for name in handle.keys():  # noqa: SIM118  # a handle is not a dict
                files_with.setdefault(name, []).append(path)
        file_of = file_of or {}
        if absent := sorted(name for name, path in file_of.items() if path not in files_with.get(name, ())):
            raise ConfigError(
                f"{INDEX} in {where} names tensors that their files do not contain: {shorten(absent)}; download the "
                "folder again"
            )
        if repeated := sorted(name for name, found in files_with.items() if len(found) > 1):
            which = " and ".join(os.path.basename(path) for path in files_with[repeated[0]][:2])
            text = f"{where}: {len(repeated)} tensors are in two files: {shorten(repeated)} in {which}"
            if undecided := [name for name in repeated if name not in file_of]:
                raise ConfigError(f"{text}; {INDEX} must say which of them holds {undecided[0]}")
            warnings.warn(f"{text}; they are read from the file that {INDEX} names", stacklevel=4)
        self.handle_of = {name: self.handles[file_of.get(name, found[0])] for name, found in files_with.items()}

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
    """Open the tensors of a model folder: `model.safetensors`, or the shards that the index names.

    Other safetensors files beside an index are not read, and a warning names them.
    """
    index = os.path.join(folder, INDEX)
    if not os.path.lexists(index):
        if os.path.lexists(os.path.join(folder, SINGLE)):
            return SafetensorsFiles(folder, [member(folder, SINGLE)])
        found = sorted(name for name in os.listdir(folder) if name.endswith((".safetensors", ".bin", ".pth", ".gguf")))
        raise ConfigError(
            f"{folder} has neither {SINGLE} nor {INDEX}" + (f"; it has {shorten(found)}" if found else "")
        )
    file_of = _weight_map(folder)
    files = sorted(set(file_of.values()))
    unknown = sorted(name for name in os.listdir(folder) if name.endswith(".safetensors") and name not in files)
    if SINGLE in unknown:
        raise ConfigError(
            f"{folder} has both {SINGLE} and {INDEX}, which does not name it, so they are two sets of weights; remove "
            "the outdated one"
        )
    if unknown:
        warnings.warn(f"{folder}: {shorten(unknown)} is not read, because {INDEX} does not name it", stacklevel=3)
    paths = {name: member(folder, name) for name in files}
    return SafetensorsFiles(folder, list(paths.values()), {name: paths[file] for name, file in file_of.items()})


def _weight_map(folder: str) -> dict[str, str]:
    """Return the names of tensors in the index of a folder with their files, all of which exist."""
    index = os.path.join(folder, INDEX)
    file_of = read_json(member(folder, INDEX)).get("weight_map")
    if not isinstance(file_of, dict) or not file_of:
        raise ConfigError(f"{index} has no weight_map")
    # Only plain file names are allowed, because a downloaded index must not make us read outside its folder.
    if invalid := [name for name in file_of.values() if not is_plain_name(name)]:
        raise ConfigError(
            f"{index} names {shown(invalid[0])}, which is not a .safetensors file in its folder; download the folder "
            "again"
        )
    if missing := [name for name in sorted(set(file_of.values())) if not os.path.exists(os.path.join(folder, name))]:
        raise ConfigError(f"{folder} lacks {shorten(missing)}, which {INDEX} names; download the folder again")
    return file_of


def is_plain_name(name: object) -> bool:
    """Whether an entry of an index names a .safetensors file in the folder of the index itself."""
    return isinstance(name, str) and os.path.basename(name) == name and name.endswith(".safetensors")


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
    wrong order. The library also makes its files private, whatever the umask says.
    """
    from safetensors.numpy import save_file as save

    if writer:
        mode = mode_of_new_file(path)
        save({name: np.ascontiguousarray(value) for name, value in tensors.items()}, path, metadata)
        set_mode(path, mode)


def new_path(path: str | os.PathLike[str], overwrite: bool) -> str:
    """Return the absolute path of a file to write. Raises ConfigError if it exists and must not be replaced."""
    path = os.path.abspath(os.fspath(path))
    check_target(path)
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
    if not os.path.exists(path):
        raise ConfigError(f"{path}: no such {what.split()[-1]} file")
    check_file(path)
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
