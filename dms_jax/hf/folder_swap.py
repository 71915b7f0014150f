"""Replace a model folder in one step, without touching the files of others in it. Begin with `replacing_folder`."""

import contextlib
import ctypes
import errno
import os
import shutil
import sys
import uuid
from collections.abc import Iterable, Iterator

from dms_jax.errors import ConfigError
from dms_jax.files import check_target, read_json
from dms_jax.hf.head_budget_file import HEAD_BUDGETS
from dms_jax.hf.safetensors_files import INDEX, is_plain_name

WEIGHTS = "model.safetensors"
RENAME_EXCHANGE, AT_FDCWD = 2, -100  # linux/fs.h and linux/fcntl.h


def check_folder(path: str, overwrite: bool, names: Iterable[str]) -> None:
    """Check that a model folder can be written to `path`: a new or empty folder, or with `overwrite` a model folder.

    `names` are those of the files that are written besides weights; none of them may be a link or a device.
    """
    if not os.path.lexists(path) or (os.path.isdir(path) and not os.listdir(path)):
        return
    if not overwrite:
        raise ConfigError(f"{path} exists; give another folder, or overwrite=True")
    if not os.path.exists(os.path.join(path, "config.json")):
        raise ConfigError(f"{path} exists and is not a model folder; give another folder")
    for name in {"config.json", INDEX, *names, *_weights_of(path)} & set(os.listdir(path)):
        check_target(os.path.join(path, name))


@contextlib.contextmanager
def replacing_folder(path: str) -> Iterator[str]:
    """Yield a temporary folder beside `path` to write a model to, which takes the place of `path` on success.

    Files of the old folder go if the new one has their names, and so do the weights that the old one loaded and the
    budgets of their heads. Everything else stays, as the same files and folders. Where Linux can exchange two folders,
    the process may be killed at any moment, and `path` is the old or the new folder; elsewhere, there is a moment
    without a folder at `path`.
    """
    from safetensors import SafetensorError

    path = os.path.realpath(path)  # a link to a folder stays a link
    parent, name = os.path.split(path)
    temporary = os.path.join(parent, f".{name}.tmp-{uuid.uuid4().hex[:8]}")
    replaced = False
    try:
        os.makedirs(temporary)
        yield temporary
        if not os.path.isdir(path) or not os.listdir(path):
            os.rename(temporary, path)
            return
        ours = set(os.listdir(temporary)) | _weights_of(path) | {HEAD_BUDGETS}
        _adopt(path, temporary, ours)
        _exchange(temporary, path)
        replaced = True
        _give_back(temporary, path, ours)
    except (OSError, SafetensorError) as why:  # the library has its own type for a full disk
        left = f"; some of the earlier files are in {temporary}" if replaced else ""
        raise ConfigError(f"cannot write {path}: {getattr(why, 'strerror', None) or why}{left}") from why
    finally:
        if not replaced:  # it holds our files, and links to those of others
            shutil.rmtree(temporary, ignore_errors=True)


def _weights_of(path: str) -> set[str]:
    """Return the names of the files from which a model folder loads its weights, the index included."""
    index = os.path.join(path, INDEX)
    if not os.path.lexists(index):
        return {WEIGHTS}
    try:
        named = read_json(index).get("weight_map", {}).values()
    except (ConfigError, AttributeError):  # damaged, so that nothing can be loaded from it
        named = ()
    return {INDEX, *filter(is_plain_name, named)}


def _adopt(old: str, new: str, ours: set[str]) -> None:
    """Give the new folder the mode of the old one, and a hard link to each file of others, if there can be links."""
    shutil.copymode(old, new)
    for entry in os.scandir(old):
        if entry.name not in ours and not entry.is_dir(follow_symlinks=False):
            with contextlib.suppress(OSError):  # then the file itself is moved after the exchange
                os.link(entry.path, os.path.join(new, entry.name), follow_symlinks=False)


def _give_back(old: str, new: str, ours: set[str]) -> None:
    """Empty and remove the old folder: our files go, those of others move to the new folder."""
    folders_first = sorted(os.scandir(old), key=lambda entry: not entry.is_dir(follow_symlinks=False))
    for entry in folders_first:  # since these were not in the new folder for a moment
        place = os.path.join(new, entry.name)
        is_folder = entry.is_dir(follow_symlinks=False)
        if not is_folder and (entry.name in ours or _is_same(entry.path, place)):
            os.unlink(entry.path)
        elif not os.path.lexists(place):
            os.rename(entry.path, place)
    if left := os.listdir(old):  # somebody has made entries with their names in the meantime
        print(f"kept {', '.join(sorted(left))} of the earlier {new} in {old}", file=sys.stderr)
    else:
        os.rmdir(old)


def _is_same(one: str, other: str) -> bool:
    return os.path.lexists(other) and os.path.samestat(os.lstat(one), os.lstat(other))


def _exchange(new: str, path: str) -> None:
    """Exchange two folders, in one step where the system can."""
    libc = ctypes.CDLL(None, use_errno=True) if sys.platform.startswith("linux") else None
    if libc is not None and hasattr(libc, "renameat2"):
        if libc.renameat2(AT_FDCWD, os.fsencode(new), AT_FDCWD, os.fsencode(path), RENAME_EXCHANGE) == 0:
            return
        if (number := ctypes.get_errno()) not in (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP):
            raise OSError(number, os.strerror(number))
    aside = f"{new}-old"
    os.rename(path, aside)
    try:
        os.rename(new, path)
    except BaseException:
        os.rename(aside, path)
        raise
    os.rename(aside, new)
