"""Read files as documents: text, chats or token ids, each with its place in the file for messages.

- .txt                    split at lines `<|endoftext|>`; if there are no such lines, at two or more blank lines
- .jsonl, .ndjson, .json  records of the shapes that `chat_records` reads: one per line, or in .json a list of them
- .parquet                the same as columns (`pip install "dms-jax[data]"`)
- .npy                    token ids: a 1-D array is one document, each row of a 2-D array is one document
- hf:NAME[:CONFIG][:SPLIT]   a dataset of `datasets.load_dataset`; the default split is `train`

The first two lines also read .gz and .zst files. Only one document is in memory at a time, except with .json.
"""

import io
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from tokenize import TokenError
from typing import Any

import numpy as np

from dms_jax.chat_records import DOCUMENT_KEYS, RECORD_KEYS, Keys, document_of, without_nulls
from dms_jax.errors import ConfigError
from dms_jax.files import (
    MAX_LINE,
    MAX_RATIO,
    PACKINGS,
    RECORD_KINDS,
    check_file,
    kinds_allowed,
    read_lines,
    read_records,
    regular_file,
    unpacked_limit,
)

PACKABLE = (".txt", *RECORD_KINDS)
KINDS = (*(kind + packing for kind in PACKABLE for packing in ("", *PACKINGS)), ".parquet", ".npy")
KINDS_SHOWN = f"{', '.join(PACKABLE)} (each also .gz or .zst), .parquet or .npy"
MARK = "<|endoftext|>"
BATCH_ROWS = 256  # of a table in memory


def expand_paths(paths: tuple[str, ...], say: Callable[[str], None] = lambda line: None) -> list[str]:
    """Replace each folder by the files of a known kind in it and its subfolders. Files and hf: names stay.

    `say` receives a line about what is skipped in a folder.
    """
    found = []
    for name in paths:
        path = Path(name).expanduser()
        if name.startswith("hf:"):
            found.append(name)
        elif path.is_dir():
            found += _files_below(path, say)
        elif not os.path.lexists(path):
            raise ConfigError(f"data file {path} does not exist (working folder {os.getcwd()})")
        elif not file_kind(path):
            raise ConfigError(f"data file {path} {kinds_allowed(path, f'{KINDS_SHOWN}, or be hf:NAME')}")
        else:
            regular_file(path)
            found.append(str(path))
    return found


def file_kind(path: Path) -> str:
    return next((kind for kind in KINDS if path.name.lower().endswith(kind)), "")


def _files_below(root: Path, say: Callable[[str], None]) -> list[str]:
    """Return the files of a known kind in a folder, sorted, except for hidden ones and links that leave the folder.

    Hidden files are copies and settings of other programs. A .json file beside files of other kinds most often
    describes them.
    """
    found: list[Path] = []
    skipped: Counter[str] = Counter()
    for folder, names, files in os.walk(root, onerror=lambda why: skipped.update(["unreadable"])):
        skipped["hidden"] += sum(name.startswith(".") for name in (*names, *files))
        names[:] = [name for name in names if not name.startswith(".")]
        skipped["linked folders"] += sum(os.path.islink(os.path.join(folder, name)) for name in names)
        for path in (Path(folder, name) for name in files if not name.startswith(".")):
            if path.is_symlink() and _leaves(path, root):
                skipped["links that leave it"] += 1
            elif path.is_file() and file_kind(path):
                found.append(path)
            else:
                skipped["of other kinds"] += 1
    others = [path for path in found if not file_kind(path).startswith(".json") or file_kind(path).startswith(".jsonl")]
    if others:
        skipped[".json beside other kinds (name them to read them)"] += len(found) - len(others)
    if any(skipped.values()):
        counts = ", ".join(f"{count} {what}" for what, count in skipped.items() if count)
        say(f"data folder {root}: {len(others or found)} files to read; skipped: {counts}")
    if not found:
        raise ConfigError(f"data folder {root} must hold a file of a known kind: {KINDS_SHOWN}")
    return sorted(map(str, others or found))


def _leaves(path: Path, root: Path) -> bool:
    """Return whether a link leads out of the folder, other than to the blobs of a hub cache, which holds only links."""
    root, target = root.resolve(), path.resolve()
    blobs = [parent.parent / "blobs" for parent in (root, *root.parents) if parent.name == "snapshots"]
    return not any(target.is_relative_to(allowed) for allowed in (root, *blobs[:1]))


def read_documents(name: str, keys: Keys, dataset: Any = None) -> Iterator[tuple[str, str | list | np.ndarray]]:
    """Yield (place, document) for each document of a file or dataset.

    Any fault raises a ConfigError that names the place.
    """
    kind = "hf" if dataset is not None else file_kind(Path(name)).split(".")[1]
    read = {"txt": _read_txt, "parquet": _read_parquet, "npy": _read_npy}.get(kind, _read_records)
    try:
        if dataset is not None:
            yield from _read_rows(name, dataset, keys)
        else:
            check_file(name)
            yield from read(name, keys)
    except ConfigError:
        raise
    except UnicodeDecodeError as why:
        raise ConfigError(
            f"{name}: byte {why.start} ({why.object[why.start]:#04x}) is not UTF-8; convert it with iconv"
        ) from why
    # pyarrow raises subclasses of these. TokenError is for the header of .npy, which is Python source.
    except (OSError, EOFError, ValueError, TokenError) as why:
        reason = "" if "allow_pickle" in str(why) else f": {' '.join(str(why).split())}"  # its advice would run code
        raise ConfigError(f"{name} is damaged or not a readable {kind} file{reason}") from why


def _read_txt(name: str, keys: Keys) -> Iterator[tuple[str, str]]:
    number, last = 0, ""
    for part in _parts(name):
        if number:
            yield f"{name}: document {number}", last
        number, last = number + 1, part
    if number == 1 or last.strip():  # a mark may follow the last document, too
        yield f"{name}: document {number}", last


def _parts(name: str) -> Iterator[str]:
    """Yield the text between the marks, or, in a text without marks, between two or more blank lines."""
    by_mark = any(_is_mark(line) for line in _text_lines(name))
    part, blanks, blank = io.StringIO(), 0, ""  # the number of blank lines just before, and the last of them
    for at, line in enumerate(_text_lines(name)):
        is_mark = by_mark and _is_mark(line)
        if not by_mark and at and line.endswith("\n") and not line.strip(" \t\n"):
            blanks, blank = blanks + 1, line
            continue
        if is_mark or blanks > 1:
            yield part.getvalue().strip("\n")
            part = io.StringIO()
        elif blanks:
            part.write(blank)
        blanks = 0
        part.write("" if is_mark else line)
        if part.tell() > MAX_LINE:
            raise ConfigError(
                f"{name} must have documents of at most {MAX_LINE // 2**20} MiB, got a larger one; separate documents "
                "by lines `<|endoftext|>`"
            )
    yield part.getvalue().strip("\n")


def _is_mark(line: str) -> bool:
    return line.startswith(MARK) and not line[len(MARK) :].strip(" \t\n")


def _text_lines(name: str) -> Iterator[str]:
    """Yield the lines of a text with their newlines, and "" after a newline at the end."""
    line = ""
    for number, line in read_lines(name):
        if "\0" in line:
            raise ConfigError(f"{name}, line {number} has a NUL character, so this is not a text file")
        line = line[:-2] + "\n" if line.endswith("\r\n") else line
        yield line
    if not line or line.endswith("\n"):
        yield ""


def _read_records(name: str, keys: Keys) -> Iterator[tuple[str, str | list]]:
    for where, record in read_records(name):
        yield where, document_of(record, where, keys)


def _read_parquet(name: str, keys: Keys) -> Iterator[tuple[str, str | list]]:
    try:
        from pyarrow import parquet  # an optional dependency, and slow to import
    except ImportError as why:
        raise ConfigError(f'{name} needs pyarrow: pip install "dms-jax[data]"') from why
    with parquet.ParquetFile(name) as file:
        names = file.schema_arrow.names
        if not any(key in names for key in (*keys, *DOCUMENT_KEYS)):
            raise ConfigError(f"{name} must have a column {keys}, got {', '.join(names)}")
        columns = [key for key in dict.fromkeys((*keys, *RECORD_KEYS)) if key in names]
        if twice := [key for key in columns if names.count(key) > 1]:
            raise ConfigError(f"{name} must have one column {twice[0]!r}, got {names.count(twice[0])}")
        limit = left = unpacked_limit(name)
        groups = [file.metadata.row_group(i) for i in range(file.metadata.num_row_groups)]
        pages = [group.column(i) for group in groups for i in range(group.num_columns)]
        too_large = sum(p.total_uncompressed_size for p in pages if p.path_in_schema.split(".")[0] in columns) > limit
        records = (record for batch in file.iter_batches(BATCH_ROWS, columns=columns) for record in batch.to_pylist())
        for where, document in _read_rows(name, () if too_large else records, keys):
            left -= len(document) if isinstance(document, str) else sum(len(m["content"]) for m in document)
            if too_large := left < 0:
                break
            yield where, document
        if too_large:
            raise ConfigError(f"{name} unpacks to more than {MAX_RATIO} times its size; write it as .jsonl if it may")


def _read_rows(name: str, records: Iterable, keys: Keys) -> Iterator[tuple[str, str | list]]:
    """Yield the documents in the rows of a table, where a null is the same as a missing key."""
    for number, record in enumerate(records, 1):
        where, found = f"{name}: row {number}", without_nulls(record)
        is_null = not any(key in found for key in (*keys, *DOCUMENT_KEYS)) and any(
            key in record for key in (*keys, *DOCUMENT_KEYS)
        )
        yield where, "" if is_null else document_of(found, where, keys)


def _read_npy(name: str, keys: Keys) -> Iterator[tuple[str, np.ndarray]]:
    ids = np.load(name, mmap_mode="r", allow_pickle=False)
    if ids.ndim not in (1, 2) or ids.dtype.kind not in "iu":
        raise ConfigError(f"{name} must hold integer token ids, 1-D or 2-D, got {ids.dtype} of shape {ids.shape}")
    if (size := os.path.getsize(name)) != (whole := getattr(ids, "offset", size - ids.nbytes) + ids.nbytes):
        raise ConfigError(f"{name} is damaged: its header describes {whole} bytes, got {size}")
    for number, row in enumerate(ids if ids.ndim == 2 else ids[None]):
        yield (f"{name}: row {number}" if ids.ndim == 2 else name), row
