"""Read files as documents: text, chats or token ids, each with its place in the file for messages.

- .txt [.gz]    split at lines `<|endoftext|>`; if there are no such lines, at two or more blank lines
- .jsonl [.gz]  one object per line: {"text": str}, or {"messages": [{"role": str, "content": str}, ...]}
- .parquet      the same two columns (`pip install "dms-jax[data]"`)
- .npy          token ids: a 1-D array is one document, each row of a 2-D array is one document
- hf:NAME[:CONFIG][:SPLIT]   a dataset of `datasets.load_dataset`; the default split is `train`
"""

import gzip
import os
import re
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from tokenize import TokenError
from typing import Any, NamedTuple

import numpy as np

from dms_jax.errors import ConfigError
from dms_jax.files import parse_json

KINDS = (".txt", ".txt.gz", ".jsonl", ".jsonl.gz", ".parquet", ".npy")


class Keys(NamedTuple):
    """The keys under which a record may hold its document. The first key that a record has is used."""

    text: str
    messages: str

    def __str__(self) -> str:
        return f"{self.text!r} or {self.messages!r} (set data.text_key or data.messages_key)"


def expand_paths(paths: tuple[str, ...]) -> list[str]:
    """Replace each folder by the files of a known kind in it and its subfolders. Files and hf: names stay."""
    found = []
    for name in paths:
        path = Path(name).expanduser()
        inside = (
            sorted(str(p) for p in path.rglob("*") if p.is_file() and file_kind(p) and not p.name.startswith("."))
            if path.is_dir()
            else []
        )
        if name.startswith("hf:"):
            found.append(name)
        elif inside or (path.is_file() and file_kind(path)):
            found += inside or [str(path)]
        elif path.is_dir():
            raise ConfigError(f"data folder {path} must hold a file of a known kind: {', '.join(KINDS)}")
        elif path.exists():
            raise ConfigError(f"data file {path} must end in one of {', '.join(KINDS)}, or be hf:NAME")
        else:
            raise ConfigError(f"data file {path} does not exist (working folder {os.getcwd()})")
    return found


def file_kind(path: Path) -> str:
    return next((kind for kind in KINDS if path.name.lower().endswith(kind)), "")


def read_documents(name: str, keys: Keys, dataset: Any = None) -> Iterator[tuple[str, str | list | np.ndarray]]:
    """Yield (place, document) for each document of a file or dataset.

    Any fault raises a ConfigError that names the place.
    """
    kind = "hf" if dataset is not None else file_kind(Path(name)).removesuffix(".gz").removeprefix(".")
    read = {"txt": _read_txt, "jsonl": _read_jsonl, "parquet": _read_parquet, "npy": _read_npy}.get(kind)
    try:
        yield from read(name, keys) if read else _read_records(name, enumerate(dataset, 1), keys)
    except ConfigError:
        raise
    except UnicodeDecodeError as why:
        raise ConfigError(
            f"{name}: byte {why.start} ({why.object[why.start]:#04x}) is not UTF-8; convert it with iconv"
        ) from why
    # pyarrow and gzip raise subclasses of these. TokenError is for the header of .npy, which is Python source.
    except (OSError, EOFError, ValueError, zlib.error, TokenError) as why:
        raise ConfigError(f"{name} is damaged or not a readable {kind} file: {' '.join(str(why).split())}") from why


def _open(name: str):
    return gzip.open(name, "rb") if name.lower().endswith(".gz") else open(name, "rb")


def _read_txt(name: str, keys: Keys) -> Iterator[tuple[str, str]]:
    with _open(name) as file:
        raw = file.read()
    if b"\0" in raw:
        raise ConfigError(f"{name}: byte {raw.index(0)} is NUL, so this is not a text file")
    text = raw.decode().removeprefix("\ufeff").replace("\r\n", "\n")
    marked = re.split(r"^<\|endoftext\|>[ \t]*$", text, flags=re.MULTILINE)
    parts = marked if len(marked) > 1 else re.split(r"\n(?:[ \t]*\n){2,}", text)
    for number, part in enumerate(parts[:-1] if len(parts) > 1 and not parts[-1].strip() else parts, 1):
        yield f"{name}: document {number}", part.strip("\n")


def _read_jsonl(name: str, keys: Keys) -> Iterator[tuple[str, str | list]]:
    """Read line by line, unlike `files.read_jsonl`, because a corpus may not fit into memory."""
    with _open(name) as file:
        for number, line in enumerate(file, 1):
            where = f"{name}:{number}"
            try:
                text = line.decode().removeprefix("\ufeff")
            except UnicodeDecodeError as why:
                raise ConfigError(f"{where}: byte {why.start} of the line is not UTF-8; convert it with iconv") from why
            if line.strip():
                yield where, _document(parse_json(text, where), where, keys)


def _read_parquet(name: str, keys: Keys) -> Iterator[tuple[str, str | list]]:
    try:
        from pyarrow import parquet  # an optional dependency, and slow to import
    except ImportError as why:
        raise ConfigError(f'{name} needs pyarrow: pip install "dms-jax[data]"') from why
    with parquet.ParquetFile(name) as file:
        columns = [key for key in (keys.text, keys.messages) if key in file.schema_arrow.names]
        if not columns:
            raise ConfigError(f"{name} must have a column {keys}, got {', '.join(file.schema_arrow.names)}")
        records = (record for batch in file.iter_batches(columns=columns[:1]) for record in batch.to_pylist())
        yield from _read_records(name, enumerate(records, 1), keys)


def _read_records(name: str, records: Iterable, keys: Keys) -> Iterator[tuple[str, str | list]]:
    """Yield the documents in the rows of a table. A null value is an empty document."""
    for number, record in records:
        where = f"{name}: row {number}"
        yield where, _document({key: "" if value is None else value for key, value in record.items()}, where, keys)


def _read_npy(name: str, keys: Keys) -> Iterator[tuple[str, np.ndarray]]:
    ids = np.load(name, mmap_mode="r", allow_pickle=False)
    if ids.ndim not in (1, 2) or ids.dtype.kind not in "iu":
        raise ConfigError(f"{name} must hold integer token ids, 1-D or 2-D, got {ids.dtype} of shape {ids.shape}")
    if (size := os.path.getsize(name)) != (whole := getattr(ids, "offset", size - ids.nbytes) + ids.nbytes):
        raise ConfigError(f"{name} is damaged: its header describes {whole} bytes, got {size}")
    for number, row in enumerate(ids if ids.ndim == 2 else ids[None]):
        yield (f"{name}: row {number}" if ids.ndim == 2 else name), row


def _document(record: object, where: str, keys: Keys) -> str | list:
    """Check one record and return its text or its messages."""
    if not isinstance(record, dict):
        raise ConfigError(f"{where}: record must be an object with {keys}, got {str(record)[:60]!r}")
    key = next((key for key in (keys.text, keys.messages) if key in record), None)
    if key is None:
        raise ConfigError(
            f"{where}: record must have a key {keys}, got {', '.join(map(repr, record)) or 'an empty object'}"
        )
    value = record[key]
    if key == keys.text and not isinstance(value, str):
        raise ConfigError(f"{where}: {key!r} must be a string, got {type(value).__name__}")
    is_chat = isinstance(value, list) and all(_is_message(item) for item in value)
    if key != keys.text and value != "" and not is_chat:  # "" stands for a null in a table
        raise ConfigError(
            f"{where}: {key!r} must be a list of {{'role': str, 'content': str}}, got {str(value)[:60]!r}"
        )
    for text in [value] if isinstance(value, str) else [m["content"] for m in value]:
        if "\0" in text:
            raise ConfigError(f"{where}: character {text.index(chr(0))} of {key!r} is NUL; clean the text")
        if not text.isascii() and re.search("[\ud800-\udfff]", text):
            raise ConfigError(
                f"{where}: {key!r} holds half of a surrogate pair, which is not a character; clean the text"
            )
    return value


def _is_message(item: object) -> bool:
    return isinstance(item, dict) and isinstance(item.get("role"), str) and isinstance(item.get("content"), str)
