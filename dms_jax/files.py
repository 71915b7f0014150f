"""Strict reading of files that a person or another program wrote, and atomic replacement of our own.

Nothing in a foreign file is ignored silently: duplicate keys, text that is not UTF-8 and excessive nesting raise a
`ConfigError` that names the file and, where possible, the line. Begin with `read_json`, `read_jsonl` and `read_yaml`
for reading, and with `replacing` for writing.
"""

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from dms_jax.errors import ConfigError, shown


def regular_file(path: str | os.PathLike[str]) -> None:
    """Raise ConfigError unless `path` is a regular file (after following links)."""
    if not Path(path).exists():
        raise ConfigError(f"cannot read {path}: the file does not exist")
    if not Path(path).is_file():
        raise ConfigError(f"cannot read {path}: it is not a regular file, but a folder, a device or a pipe")


def read_text(path: str | os.PathLike[str]) -> str:
    """Return the text of a UTF-8 file."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as why:
        line = why.object[: why.start].count(b"\n") + 1
        raise ConfigError(f"cannot read {path}, line {line}: not UTF-8 ({why.reason}); convert the file") from why
    except (OSError, ValueError) as why:  # ValueError: the path contains a NUL character
        raise ConfigError(f"cannot read {path}: {why}") from why


def parse_json(text: str | bytes, where: str) -> Any:
    """Parse JSON. `where` names the source of the text and begins the message about invalid JSON.

    Duplicate keys are refused, because Python's parser would silently keep the last one.
    """
    try:
        return json.loads(text, object_pairs_hook=_without_duplicates)
    except RecursionError as why:
        raise ConfigError(f"{where} is not valid JSON: it is nested too deeply") from why
    except ValueError as why:  # bad syntax, bytes that are not UTF-8, a number of thousands of digits, a duplicate key
        raise ConfigError(f"{where} is not valid JSON: {why}") from why


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
    lines = read_text(path).removeprefix("\ufeff").split("\n")  # the byte-order mark that Windows editors write
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            value = parse_json(line, where)
        except ConfigError:
            if torn_tail_ok and number == len(lines):
                return
            raise
        yield where, value


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
    An OSError passes through to the caller, who knows what to tell the user.
    """
    path = Path(path)
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
