"""Parse and check the values of options that several commands share. Imports no JAX."""

import argparse
import contextlib
import dataclasses
import math
import sys
import typing
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from dms_jax.command import start_devices
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


def add_mesh(parser, axes: str, text: str) -> None:
    """Add the option --mesh, whose value has the form `axes`; `text` says what its sides mean."""
    parser.add_argument("--mesh", metavar=axes, help=text)


def add_inference_mesh(parser) -> None:
    """Add the option --mesh of a command that runs in `inference_mesh`."""
    text = "split rows over A and KV heads over B devices, which a CPU simulates, e.g. 2x4 (default: one device)"
    add_mesh(parser, "AxB", text)


@contextlib.contextmanager
def inference_mesh(mesh: str | None, rows: int, source: str) -> Iterator[None]:
    """Start JAX on one device, or on the devices of --mesh and with that mesh set.

    `rows` is how many rows run together, and `source` says where that number comes from.
    """
    if mesh is None:
        start_devices(1)
        yield
        return
    from dms_jax.sharding import INFERENCE_AXES, make_mesh, parse_mesh

    sizes = parse_mesh(mesh)
    if len(sizes) != 2:
        raise ConfigError(f"--mesh must be AxB, which splits rows over A and KV heads over B devices, got {mesh!r}")
    if rows % sizes[0]:
        raise ConfigError(
            f"--mesh {mesh} must split the rows of {source}, {rows}, evenly over {sizes[0]} devices; "
            f"use --mesh 1x{math.prod(sizes)}, or another --batch"
        )
    start_devices(math.prod(sizes))
    import jax

    with jax.set_mesh(make_mesh(*sizes, axes=INFERENCE_AXES)):
        yield


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
