"""Parse and check the values of options that several commands share. Imports no JAX."""

import argparse
import dataclasses
import sys
import typing
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from dms_jax.config_reader import check_range, range_of
from dms_jax.errors import ConfigError


def named(values: list[str], option: str) -> dict[str, str]:
    """Parse values of the form NAME=FILE into name -> file. For FILE alone, the name is its stem."""
    found = {}
    for value in values:
        name, equals, path = value.partition("=")
        if not equals:
            name, path = Path(value).stem, value
        if not name or not path:
            raise ConfigError(f"{option} must be NAME=FILE or FILE, got {value!r}")
        if name in found:
            raise ConfigError(f"{option}: duplicate name {name!r}; write {option} OTHER_NAME={path}")
        found[name] = path
    return found


def numbers(text: str, kind: type, option: str) -> tuple:
    """Parse a comma-separated list of numbers."""
    try:
        return tuple(kind(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise ConfigError(f"{option} must be comma-separated numbers, got {text!r}") from None


def check_option_ranges(kind: type, options: argparse.Namespace) -> None:
    """Check parsed options against the ranges of the fields of the dataclass `kind`, matched by name."""
    for name, annotation in typing.get_type_hints(kind, include_extras=True).items():
        allowed, value = range_of(annotation), getattr(options, name, None)
        if allowed is not None and value is not None:
            check_range(f"--{name.replace('_', '-')}", value, allowed)


def options_of(kind: type, options: argparse.Namespace, **parsed: Any) -> Any:
    """Make a `kind` of the parsed options that it has fields for; `parsed` replaces those that needed parsing."""
    given = {field.name for field in dataclasses.fields(kind)} & vars(options).keys()
    return kind(**{name: getattr(options, name) for name in given - parsed.keys()}, **parsed)


def check_samples(samples: int, temperature: float) -> None:
    """Refuse several greedy samples per problem, since they would all be equal."""
    if samples > 1 and temperature == 0:
        raise ConfigError(
            f"--temperature must be above 0 for {samples} samples per problem, which would all be equal; "
            "use e.g. --temperature 0.7"
        )


def add_run_code(group) -> None:
    """Add the option --run-code: False without it, True, or "unconfined"."""
    text = "allow generated programs to run, confined by bubblewrap or unshare; or unconfined, with all your rights"
    group.add_argument("--run-code", nargs="?", const=True, default=False, choices=["unconfined"], help=text)


def check_run_code(tasks: Iterable[str], run_code: bool | str) -> None:
    """Refuse tasks that would run generated programs in a way that --run-code does not allow or the machine cannot."""
    from dms_jax.tasks.code_runner import UNCONFINED, require_run_code
    from dms_jax.tasks.registry import RUN_CODE

    for name in set(tasks) & set(RUN_CODE):
        require_run_code(name, run_code)
        if run_code == UNCONFINED:
            print(f"--run-code unconfined: the programs of {name} can do whatever you can do", file=sys.stderr)
