"""Find the files of a model folder without leaving it.

A downloaded folder must not make us read, hash or export a file elsewhere on this machine, so a link is followed only
inside its folder and, in a cache of the Hugging Face hub, to its blobs.
"""

import os

from dms_jax.errors import ConfigError
from dms_jax.files import check_file


def member(folder: str, name: str) -> str:
    """Return the path of a file in a model folder.

    Raises ConfigError if it is a link that leaves the folder, not a regular file, or a pointer of git-lfs.
    """
    path = os.path.join(folder, name)
    if leaves(folder, name):
        raise ConfigError(f"{path} is a link that leaves its folder, to {os.path.realpath(path)}; copy the file there")
    check_file(path)
    return path


def leaves(folder: str, name: str) -> bool:
    """Whether a file in a model folder is a link to a file outside of it."""
    root = os.path.realpath(folder)
    allowed = [root]
    snapshots = os.path.dirname(root)
    model = os.path.dirname(snapshots)
    if os.path.basename(snapshots) == "snapshots" and os.path.basename(model).startswith("models--"):
        # Hub cache: CACHE/models--OWNER--NAME/snapshots/REVISION/FILE -> ../../blobs/HASH, which since version 2 of the
        # library is a link to CACHE/blobs/..., the store that all models share.
        allowed += [os.path.join(model, "blobs"), os.path.join(os.path.dirname(model), "blobs")]
    target = os.path.realpath(os.path.join(folder, name))
    place = os.path.dirname(target)
    if os.path.basename(place) == "blobs" and os.path.basename(os.path.dirname(place)).startswith("models--"):
        return False  # a folder that `huggingface-cli download --local-dir` filled with links to the hub cache
    return not any(os.path.commonpath([target, place]) == place for place in allowed)
