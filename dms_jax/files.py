"""Strict reading of files that a person or another program wrote, and atomic replacement of our own.

Nothing in a foreign file is ignored silently: duplicate keys, text that is not UTF-8 and excessive nesting raise a
`ConfigError` that names the file and, where possible, the line. Files are regular, may be packed (.gz, .zst), and have
bounds: MAX_LINE and MAX_FILE. Begin with `read_json`, `read_jsonl`, `read_records` and `read_yaml` for reading, and
with `replacing` for writing.
"""

import contextlib
import gzip
import io
import itertools
import json
import os
import stat
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import yaml

from dms_jax.errors import ConfigError, shown

LFS_POINTER = b"version https://git-lfs.github.com/spec/v1"  # how each such file begins
MAX_FILE = 2**30  # bytes of a text that is read as a whole
MAX_LINE = 2**28  # bytes of a line, and of a document of training text
MAX_RATIO = 100  # of the bytes in a compressed file, above MAX_LINE, to its size
LINE_COST = 16
MAX_DEPTH = 500  # of brackets in JSON; how many Python itself can take depends on its version
PACKINGS = (".gz", ".zst")
RECORD_KINDS = (".jsonl", ".ndjson", ".json")
_TABLE = 'convert it, e.g. with pandas: read_csv(FILE).to_json("FILE.jsonl", orient="records", lines=True)'
_ARCHIVE = "unpack it first"
CONVERSIONS = {  # what to do with files that people have and that are not read
    **dict.fromkeys((".csv", ".tsv", ".xlsx", ".xls"), _TABLE),
    **dict.fromkeys(
        (".arrow", ".feather", ".orc"),
        'convert it, e.g. with datasets: Dataset.from_file(FILE).to_parquet("FILE.parquet")',
    ),
    **dict.fromkeys((".bz2", ".xz", ".lz4", ".zip", ".tar", ".tgz", ".7z", ".rar"), _ARCHIVE),
    **dict.fromkeys((".md", ".html", ".htm", ".pdf", ".docx", ".xml", ".py"), "save its text as .txt"),
}


def regular_file(path: str | os.PathLike[str]) -> None:
    """Raise ConfigError unless `path` is a regular file (after following links).

    A pipe would block until somebody writes to it, and a device such as /dev/zero has no end.
    """
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError) as why:  # ValueError: the path contains a NUL character
        raise ConfigError(f"cannot read {path}: {getattr(why, 'strerror', None) or why}") from why
    if not stat.S_ISREG(mode):
        kinds = {stat.S_IFDIR: "folder", stat.S_IFIFO: "pipe", stat.S_IFSOCK: "socket"}
        kind = kinds.get(stat.S_IFMT(mode), "device")
        raise ConfigError(f"cannot read {path}: it must be a regular file, got a {kind}")


def refuse_lfs_pointer(head: bytes, path: str | os.PathLike[str]) -> None:
    """Raise ConfigError if `head`, the first bytes of a file, is the stand-in that git-lfs leaves for a large file."""
    if head.startswith(LFS_POINTER):
        raise ConfigError(f"{path} is a git-lfs pointer, not the file itself; run `git lfs pull` in its folder")


def check_file(path: str | os.PathLike[str]) -> None:
    """Raise ConfigError unless `path` is a regular file that can be opened and is no stand-in of git-lfs."""
    regular_file(path)
    try:
        with open(path, "rb") as file:
            refuse_lfs_pointer(file.read(len(LFS_POINTER)), path)
    except OSError as why:
        raise ConfigError(f"cannot read {path}: {why.strerror or why}") from why


def unpacked_limit(path: str | os.PathLike[str]) -> int:
    """Return how many bytes a compressed file may hold: text shrinks to a tenth, and a bomb to a thousandth."""
    return max(MAX_LINE, MAX_RATIO * os.path.getsize(path))


class _Bounded(io.RawIOBase):
    """A stream that raises ConfigError(complaint) instead of giving more than `limit` bytes.

    A line counts as LINE_COST more, because even an empty one takes time.
    """

    def __init__(self, inner: Any, limit: int, complaint: str):
        self.inner, self.left, self.complaint = inner, limit, complaint

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count = self.inner.readinto(buffer)
        self.left -= count + LINE_COST * bytes(buffer[:count]).count(b"\n")
        if self.left < 0:
            raise ConfigError(self.complaint)
        return count


@contextlib.contextmanager
def opened(path: str | os.PathLike[str]) -> Iterator[io.BufferedReader]:
    """Open a file for reading bytes, unpacking it if its name ends in .gz or .zst. Raise ConfigError for any fault."""
    check_file(path)
    packing = next((end for end in PACKINGS if os.fspath(path).lower().endswith(end)), "")
    complaint = f"{path} unpacks to more than {MAX_RATIO} times its size; unpack it yourself if it may be so large"
    try:
        with open(path, "rb") as raw:
            stream = {"": lambda: raw, ".gz": lambda: gzip.GzipFile(fileobj=raw), ".zst": lambda: _zstd(raw, path)}[
                packing
            ]()
            yield io.BufferedReader(_Bounded(stream, unpacked_limit(path), complaint), 2**17) if packing else raw
    except (OSError, EOFError, zlib.error) as why:  # pyarrow raises OSError
        damage = f"it is damaged or not a {packing} file: " if packing else ""
        reason = " ".join(str(getattr(why, "strerror", None) or why).split())
        raise ConfigError(f"cannot read {path}: {damage}{reason}") from why


def _zstd(raw: BinaryIO, path: str | os.PathLike[str]) -> Any:
    try:
        import pyarrow  # optional, and slow to import
    except ImportError as why:
        raise ConfigError(f'{path} needs pyarrow: pip install "dms-jax[data]", or unpack it with zstd -d') from why
    return pyarrow.input_stream(raw, compression="zstd")


def read_text(path: str | os.PathLike[str]) -> str:
    """Return the text of a UTF-8 file, which may be packed. All line ends become newlines."""
    with opened(path) as file:
        if os.path.getsize(path) > MAX_FILE:
            raise ConfigError(f"{path} must have at most {MAX_FILE // 2**20} MiB, got more; split it")
        raw = file.read()
    try:
        return raw.decode().replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as why:
        number = raw[: why.start].count(b"\n") + 1
        raise _not_utf8(f"{path}, line {number}", why) from why


def _not_utf8(where: str, why: UnicodeDecodeError) -> ConfigError:
    return ConfigError(f"cannot read {where}: not UTF-8 (byte {why.object[why.start]:#04x}); convert it with iconv")


def read_lines(path: str | os.PathLike[str]) -> Iterator[tuple[int, str]]:
    """Yield (number from 1, line with its newline) of a UTF-8 file, which may be packed and larger than memory."""
    with opened(path) as file:
        for number in itertools.count(1):
            raw = file.readline(MAX_LINE + 1)
            if not raw:
                return
            if len(raw) > MAX_LINE:
                raise ConfigError(
                    f"{path}, line {number} must have at most {MAX_LINE // 2**20} MiB, got more; split it"
                )
            try:
                line = raw.decode()
            except UnicodeDecodeError as why:
                raise _not_utf8(f"{path}, line {number}", why) from why
            yield number, line.removeprefix("\ufeff") if number == 1 else line  # the mark that Windows editors write


def parse_json(text: str | bytes, where: str) -> Any:
    """Parse JSON. `where` names the source of the text and begins the message about invalid JSON.

    Python's parser is more lenient than is safe. It keeps the last of several equal keys, and accepts half of a
    surrogate pair, which no file and no tokenizer can take. Its infinities and NaN are accepted, because Python writes
    them.
    """
    try:
        text = text if isinstance(text, str) else text.decode()
        value = json.loads(text, object_pairs_hook=_without_duplicates)
        if text.count("[") + text.count("{") > MAX_DEPTH and _is_deeper(value, MAX_DEPTH):
            raise RecursionError
        if not text.isascii():
            text.encode()
        if "\\ud" in text or "\\uD" in text:
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except RecursionError as why:
        raise ConfigError(f"{where} is not valid JSON: it is nested too deeply") from why
    except json.JSONDecodeError as why:
        line = f"line {why.lineno}, " if why.lineno > 1 else ""
        raise ConfigError(f"{where} is not valid JSON: {why.msg} at {line}column {why.colno}") from why
    except UnicodeEncodeError as why:
        raise ConfigError(f"{where} holds half of a surrogate pair, which is not valid UTF-8; clean the text") from why
    except ValueError as why:  # bytes that are not UTF-8, a number of thousands of digits, a duplicate key
        reason = str(why).partition("; use sys.")[0]  # Python's advice is for programmers
        raise ConfigError(f"{where} is not valid JSON: {reason}") from why


def _is_deeper(value: Any, limit: int) -> bool:
    level = [value]
    for _ in range(limit):
        level = [
            child
            for item in level
            if isinstance(item, dict | list)
            for child in (item.values() if isinstance(item, dict) else item)
        ]
    return bool(level)


def read_json(path: str | os.PathLike[str]) -> dict:
    """Return the object in a JSON file."""
    raw = parse_json(read_text(path), os.fspath(path))
    if not isinstance(raw, dict):
        raise ConfigError(f"{path} must hold a JSON object, got {type(raw).__name__}")
    return raw


def read_jsonl(path: str | os.PathLike[str], torn_tail_ok: bool = False) -> Iterator[tuple[str, Any]]:
    """Yield ("FILE, line N", value) for each line of a JSON Lines file; the place is for messages. Skip blank lines.

    `torn_tail_ok`: ignore a last line that does not parse and does not end in a newline. A killed writer leaves such a
    line behind.
    """
    for number, line in read_lines(path):
        line = line.removeprefix("\ufeff")  # of a file that was appended to another
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            value = parse_json(line, where)
        except ConfigError:
            if torn_tail_ok and not line.endswith("\n"):
                return
            raise
        yield where, value


def read_records(path: str | os.PathLike[str]) -> Iterator[tuple[str, Any]]:
    """Yield (place, value) for each record of a file of RECORD_KINDS: one per line, or a JSON list, or one record."""
    if kind_of(path, RECORD_KINDS) != ".json":
        yield from read_jsonl(path)
        return
    try:
        whole = parse_json(read_text(path).removeprefix("\ufeff"), os.fspath(path))
    except ConfigError as why:
        raise ConfigError(f"{why}; if each line is a record of its own, rename it to .jsonl") from why
    if isinstance(whole, list):
        yield from ((f"{path}, item {number}", value) for number, value in enumerate(whole, start=1))
    else:
        yield os.fspath(path), whole


def kind_of(path: str | os.PathLike[str], kinds: tuple[str, ...]) -> str:
    """Return which of `kinds`, such as ".txt", a file is by its name, packed (.gz, .zst) or not; "" for another one."""
    name = os.fspath(path).lower()
    packing = next((end for end in PACKINGS if name.endswith(end)), "")
    return next((kind for kind in kinds if name.removesuffix(packing).endswith(kind)), "")


def kinds_allowed(path: str | os.PathLike[str], kinds: str) -> str:
    """Return how a message about a file of another kind goes on: what its name must end in, and how to convert it."""
    found = kind_of(path, tuple(CONVERSIONS))
    return f"must end in {kinds}, got {path}" + (f"; {CONVERSIONS[found]}" if found else "")


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"duplicate key {shown(key)}")
        found[key] = value
    return found


def read_yaml(path: str) -> dict:
    """Return the mapping in a YAML file; {} for an empty file."""
    raw = parse_yaml(read_text(path), f"{path} is not valid YAML")
    if raw is not None and not isinstance(raw, dict):
        raise ConfigError(f"{path} must hold `key: value` lines, got {type(raw).__name__}")
    return raw or {}


class _StrictLoader(yaml.SafeLoader):
    """A YAML loader that refuses duplicate keys in a mapping. PyYAML itself would silently keep the last one."""

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key_node, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if isinstance(key_node, yaml.ScalarNode) and key_node.tag != "tag:yaml.org,2002:merge":
                if key_node.value in seen:
                    problem = f"duplicate key {shown(key_node.value)}"
                    raise yaml.constructor.ConstructorError(None, None, problem, key_node.start_mark)
                seen.add(key_node.value)
        return super().construct_mapping(node, deep)


def parse_yaml(text: str, complaint: str) -> Any:
    """Parse YAML. `complaint` begins the message about invalid YAML."""
    try:
        return yaml.load(text, _StrictLoader)
    except RecursionError as why:
        raise ConfigError(f"{complaint}: it is nested too deeply") from why
    except Exception as why:  # YAMLError, or what int(), datetime() and others raise for a scalar
        mark, problem = getattr(why, "problem_mark", None), getattr(why, "problem", None)
        reason = f"line {mark.line + 1}: {problem}" if mark is not None and problem else str(why)
        raise ConfigError(f"{complaint}: {' '.join(reason.split())}") from why


def write_json(path: str | os.PathLike[str], value: Any, indent: int | None = 2) -> None:
    """Write a value as a JSON file in UTF-8. The file appears whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(value, indent=indent, ensure_ascii=False), encoding="utf-8")


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield the path of a temporary file beside `path`, for the caller to write.

    On success the temporary file replaces `path` in one step. On any error it is removed and `path` stays as it was.
    A replaced file keeps its mode, and a new one gets that of the umask, whatever the library that writes it does.
    An OSError passes through to the caller, who knows what to tell the user.
    """
    path = Path(path)
    check_target(path)
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    mode = stat.S_IMODE(os.stat(path).st_mode) if os.path.exists(path) else mode_of_new_file(temporary)
    try:
        yield temporary
        set_mode(temporary, mode)
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def machine_memory() -> int:
    """Return the bytes of memory of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def user_cache(name: str) -> Path:
    """Make `user_cache_path(name)`, and return it. Raises OSError, or RuntimeError if the user has no home folder."""
    folder = user_cache_path(name)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def user_cache_path(name: str) -> Path:
    """Return the folder `name` for dms_jax in the user's cache folder; it need not exist."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dms_jax" / name


def check_target(path: str | os.PathLike[str]) -> None:
    """Refuse to write to anything but a regular file or a path that does not exist.

    Replacing a link or a device would turn it into a regular file, and opening a pipe would wait for its reader.
    """
    try:
        mode = os.lstat(path).st_mode
    except (OSError, ValueError):  # it does not exist; or it cannot, and then the writer says why
        return
    if not stat.S_ISREG(mode):
        kind = next((name for is_kind, name in _KINDS if is_kind(mode)), "a special file")
        raise ConfigError(f"{path} must be a regular file, got {kind}; give another path to write to")


_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISLNK, "a symbolic link"),
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISSOCK, "a socket"),
    (lambda mode: stat.S_ISCHR(mode) or stat.S_ISBLK(mode), "a device"),
)


def mode_of_new_file(path: str | os.PathLike[str]) -> int:
    """Return the mode that the umask gives to a new file at `path`, which is made and removed for that.

    Reading the umask itself means to change it for a moment, for all threads.
    """
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
    with open(path, "xb") as file:
        mode = os.fstat(file.fileno()).st_mode
    os.unlink(path)
    return stat.S_IMODE(mode)


def set_mode(path: str | os.PathLike[str], mode: int) -> None:
    """Give a file a mode, if it does not have it; a file system where all files have one mode may refuse to set any."""
    if stat.S_IMODE(os.stat(path).st_mode) != mode:
        os.chmod(path, mode)
