"""JSON that a person or another program wrote, read so that nothing in it is passed over in silence."""

import json
import os
from typing import Any

from dms_jax.config import ConfigError, shown


def parse_json(text: str | bytes, where: str) -> Any:
    """The value of a JSON text. Raises ConfigError for what is no JSON, and for a key that stands twice: the last would win unseen."""
    try:
        return json.loads(text, object_pairs_hook=_once)
    except RecursionError as why:
        raise ConfigError(f"{where} is not valid JSON: it is nested too deeply") from why
    except ValueError as why:  # a JSONDecodeError, bytes that are no UTF-8, a number of thousands of digits, `_once`
        raise ConfigError(f"{where} is not valid JSON: {why}") from why


def read_json(path: str | os.PathLike[str]) -> dict:
    """The mapping in a JSON file. Raises ConfigError."""
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read()
    except (OSError, ValueError) as why:  # ValueError: not UTF-8, or a path that holds a NUL
        raise ConfigError(f"cannot read {path}: {why}") from why
    raw = parse_json(text, os.fspath(path))
    if not isinstance(raw, dict):
        raise ConfigError(f"{path} must hold a JSON object, got {type(raw).__name__}")
    return raw


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {shown(key)} stands twice")
        found[key] = value
    return found
