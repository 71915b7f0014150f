"""The cache of training text: its folder, and how it knows the content of the files."""

import hashlib
import os
from pathlib import Path
from typing import Any, NamedTuple

from dms_jax.errors import ConfigError
from dms_jax.files import user_cache
from dms_jax.training.data.documents import file_kind


def cache_folder(cache_dir: str | Path, name: str) -> Path:
    """Make the folder `name` in `cache_dir` and return it.

    `cache_dir` "" is dms_jax in the cache folder of the user.
    """
    try:
        if not cache_dir:
            return user_cache(name)
        folder = Path(cache_dir).expanduser() / name
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError) as why:  # RuntimeError: the user has no home folder
        raise ConfigError(f"cannot make the cache folder: {why}; set data.cache_dir to a writable folder") from why
    return folder


def file_sha256(path: str | Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Content(NamedTuple):
    """The identity of a file's or a dataset's content."""

    name: str  # of the dataset, or the kind of the file
    digest: str
    written: tuple[int, ...] = ()  # changes when a program writes to the file, even if it restores the content


def contents_of(names: list[str], datasets: dict[str, Any]) -> list[Content]:
    """Return what the files and datasets hold at this moment."""
    found = []
    for name in names:
        try:
            if name in datasets:
                found.append(Content(name, datasets[name]._fingerprint))
            else:
                state = os.stat(name)
                written = state.st_ino, state.st_mtime_ns
                found.append(Content(file_kind(Path(name)), file_sha256(name), written))
        except OSError as why:
            raise ConfigError(f"cannot read {name}: {why.strerror or why}") from why
    return found
