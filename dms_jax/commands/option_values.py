"""Values of options that several commands share. Imports no JAX."""

import argparse
from pathlib import Path

from dms_jax.engine.generation_config import GenerationConfig
from dms_jax.errors import ConfigError


def named(values: list[str], option: str) -> dict[str, str]:
    """`NAME=FILE` or `FILE`, whose stem is then its name."""
    found = {}
    for value in values:
        name, equals, path = value.partition("=")
        if not equals:
            name, path = Path(value).stem, value
        if not name or not path:
            raise ConfigError(f"{option} wants NAME=FILE, got {value!r}")
        if name in found:
            raise ConfigError(f"{option} names {name!r} twice; give each its own name: {option} NAME=FILE")
        found[name] = path
    return found


def numbers(text: str, kind: type, option: str) -> tuple:
    """With commas between."""
    try:
        return tuple(kind(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise ConfigError(f"{option} wants numbers with commas between, got {text!r}") from None


def check_sampling(options: argparse.Namespace, chains: int) -> None:
    """Of --temperature and --top-p, for so many chains. Raises ConfigError."""
    GenerationConfig(temperature=options.temperature, top_p=options.top_p)
    if chains > 1 and options.temperature == 0:
        raise ConfigError(
            f"{chains} chains at --temperature 0 are {chains} times the same answer; use e.g. --temperature 0.7"
        )


def read_text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as why:
        raise ConfigError(f"cannot read {path}: {why}") from why
