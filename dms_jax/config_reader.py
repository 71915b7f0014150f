"""Turn plain values (YAML, JSON, `--set a.b=c`) into frozen configuration dataclasses, strictly.

A field states its range and its meaning in its type: `steps: Annotated[int, AtLeast(1), "number of steps"] = 55`.
`check_ranges`, called from `__post_init__`, checks the ranges of every instance, however it was made. `keys_help`
prints ranges and meanings for `--help`. Begin with `build`.
"""

import dataclasses
import json
import math
import numbers
import sys
import textwrap
import types
import typing
from collections.abc import Collection
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from dms_jax.errors import ConfigError, shown, suggestion
from dms_jax.files import parse_yaml

MAX_INT = 2**31 - 1  # the largest size or count, because JAX indexes with int32


@dataclass(frozen=True)
class Range:
    """The finite numbers that a field may hold.

    Bounds are inclusive unless `exclusive_min` or `exclusive_max` is set.
    """

    min: float
    max: float = math.inf
    exclusive_min: bool = False
    exclusive_max: bool = False

    def __contains__(self, number: float) -> bool:
        above = number > self.min if self.exclusive_min else number >= self.min
        below = number < self.max if self.exclusive_max else number <= self.max
        return above and below and number < math.inf

    def __str__(self) -> str:
        if self.max < math.inf:
            left, right = "(" if self.exclusive_min else "[", ")" if self.exclusive_max else "]"
            return f"in {left}{self.min:g}, {self.max:g}{right}"
        return f"{'>' if self.exclusive_min else '>='} {self.min:g}"


def AtLeast(number: float) -> Range:
    """Range of the numbers >= `number`."""
    return Range(number)


def Above(number: float) -> Range:
    """Range of the numbers > `number`."""
    return Range(number, exclusive_min=True)


def Between(low: float, high: float, *, exclusive_max: bool = False) -> Range:
    """Range of the numbers from `low` to `high`, without `high` itself if `exclusive_max`."""
    return Range(low, high, exclusive_max=exclusive_max)


def range_of(kind: Any) -> Range | None:
    """Return the range in a field's type, such as `Annotated[int, AtLeast(1)] | None`; None if it has no range."""
    return next((extra for extra in _extras(kind) if isinstance(extra, Range)), None)


def meaning_of(kind: Any) -> str:
    """Return the meaning in a field's type, such as `Annotated[int, "rows per batch"]`; "" if it has no meaning."""
    return next((extra for extra in _extras(kind) if isinstance(extra, str)), "")


def _extras(kind: Any) -> tuple:
    """Return the annotations of a type, or of the annotated member of a union."""
    annotated = (part for part in (kind, *typing.get_args(kind)) if typing.get_origin(part) is Annotated)
    return next((typing.get_args(part)[1:] for part in annotated), ())


def keys_help(config: Any, path: str = "", only: Collection[str] | None = None) -> str:
    """List the keys of a configuration for `--help`: the default, the range or choices, and the meaning of each.

    `only`: the keys of the top level that are listed, or None for all.
    Defaults are printed as YAML, so that they can be copied into a file or after `--set`.
    """
    blocks = []
    for name, kind in typing.get_type_hints(type(config), include_extras=True).items():
        if only is not None and name not in only:
            continue
        value = getattr(config, name)
        if dataclasses.is_dataclass(value):
            blocks.append(keys_help(value, f"{path}{name}."))
            continue
        plain = typing.get_args(kind)[0] if typing.get_origin(kind) is Annotated else kind
        choices = typing.get_args(plain) if typing.get_origin(plain) is Literal else ()
        if plain is bool:
            choices = "true", "false"
        allowed = " | ".join(map(str, choices)) if choices else range_of(kind)
        lines = [f"  {path}{name} = {_as_yaml(value)}" + (f"  ({allowed})" if allowed else "")]
        lines += textwrap.wrap(meaning_of(kind), 110, initial_indent=" " * 6, subsequent_indent=" " * 6)
        blocks.append("\n".join(lines))
    return "\n".join(blocks)


def _as_yaml(value: Any) -> str:
    return value if isinstance(value, str) and value else json.dumps(value)


def check_range(name: str, value: float, allowed: Range) -> None:
    """Check one number; `name` is the key or the option that messages begin with."""
    if value not in allowed:
        finite = "" if isinstance(value, int) or math.isfinite(value) else "a finite number "
        raise ConfigError(f"{name} must be {finite}{allowed}, got {shown(value)}")


def check_ranges(config: Any, path: str = "") -> None:
    """Check the fields of a configuration against the ranges in their types. Whole numbers must also fit into an int32.

    `path`, for example "dms.", precedes the names of the fields in messages. Numbers of other types, such as NumPy's
    scalars, become Python's, which JSON can hold.
    """
    plain = typing.get_type_hints(type(config))
    for name, kind in typing.get_type_hints(type(config), include_extras=True).items():
        value, allowed, kinds = getattr(config, name), range_of(kind), typing.get_args(plain[name]) or (plain[name],)
        if allowed is None or (value is None and type(None) in kinds):
            continue
        whole = int in kinds
        if not isinstance(value, numbers.Integral if whole else numbers.Real) or isinstance(value, bool):
            raise ConfigError(f"{path}{name} must be a {'whole ' * whole}number {allowed}, got {shown(value)}")
        if not isinstance(value, int | float):
            value = int(value) if isinstance(value, numbers.Integral) else float(value)
            object.__setattr__(config, name, value)
        if not whole and abs(value) > sys.float_info.max:
            raise ConfigError(f"{path}{name} must be a finite number {allowed}, got {shown(value)}")
        check_range(f"{path}{name}", value, allowed)
        if whole and value > MAX_INT:
            raise ConfigError(f"{path}{name} must be below 2**31, got {shown(value)}")


_KINDS = {int: "a whole number", str: "text", bool: "true or false", dict: "a mapping"}


def build(cls: type, raw: dict, path: str = "") -> Any:
    """Build the dataclass `cls` from nested plain values.

    Unknown keys and wrong types raise errors that name the key.
    """
    if not isinstance(raw, dict):
        raise ConfigError(f"`{path.rstrip('.') or 'config'}` must be a mapping of keys, got {shown(raw)}")
    known = typing.get_type_hints(cls)
    for name in raw.keys() - known.keys():
        raise ConfigError(f"unknown config key `{path}{name}`; {suggestion(str(name), known)}")
    return cls(**{name: _coerce(known[name], value, f"{path}{name}") for name, value in raw.items()})


def _coerce(kind: Any, value: Any, path: str) -> Any:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is Annotated:
        return _coerce(arguments[0], value, path)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        return _coerce(next(a for a in arguments if a is not type(None)), value, path)
    if origin is Literal:
        if value not in arguments or type(value) not in map(type, arguments):  # 1 == 1.0 == True
            raise ConfigError(f"`{path}` must be one of {', '.join(map(str, arguments))}; got {shown(value)}")
        return value
    if dataclasses.is_dataclass(kind):
        return value if isinstance(value, kind) else build(kind, value, f"{path}.")
    if origin is tuple:
        items = value if isinstance(value, list | tuple) else [value]
        return tuple(_coerce(arguments[0], item, path) for item in items)
    if kind is float and isinstance(value, int | float | str) and not isinstance(value, bool):
        try:
            number = float(value)  # PyYAML reads `1e-4` as a string
        except (ValueError, OverflowError):
            number = math.nan
        if math.isfinite(number):
            return number
        raise ConfigError(f"`{path}` must be a finite number, got {shown(value)}")
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ConfigError(f"`{path}` must be {_KINDS.get(kind, kind.__name__)}, got {shown(value)}")
    return value


def parse_assignment(assignment: str) -> dict:
    """Parse one `--set dotted.key=value` into nested plain values, `{"dotted": {"key": value}}`."""
    key, equals, text = assignment.partition("=")
    if not equals or not key:
        raise ConfigError(f"--set must be key=value, e.g. dms.window_size=256; got {shown(assignment)}")
    *parents, last = key.strip().split(".")
    values = {last: parse_yaml(text, f"--set {shown(assignment)}: {shown(text)} is not a YAML value")}
    for parent in reversed(parents):
        values = {parent: values}
    return values


def merge(into: dict, raw: dict) -> None:
    """Merge the nested mapping `raw` into `into`, in place. Keys that `raw` does not contain keep their values."""
    for key, value in raw.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            merge(into[key], value)
        else:
            into[key] = value
