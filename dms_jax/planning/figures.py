"""A plan is a list of figures. Each figure knows its unit and where it comes from; JSON and text are two loops over the list."""

from collections.abc import Iterable
from typing import Any, Literal, NamedTuple

Source = Literal["compiled", "analytic", "measured", "assumed"]
GIB = 2**30


class Figure(NamedTuple):
    """One line of a plan."""

    name: str  # key of the JSON; "bytes_per_device.weights" is the part `weights` of "bytes_per_device"
    value: Any  # a number, a truth value, or a mapping: numbers by kind, or {} for a figure whose parts are figures themselves
    unit: str
    source: Source
    formula: str = ""
    note: str = ""  # what the source is in detail, e.g. which data sheet

    @property
    def origin(self) -> str:
        return self.note or self.source


def as_json(figures: Iterable[Figure]) -> dict[str, Any]:
    """Values by name, and beside them `source` and `formulas` by the name of the figure."""
    values, source, formulas = {}, {}, {}
    for figure in figures:
        group, _, part = figure.name.partition(".")
        if part:
            values.setdefault(group, {})[part] = figure.value
        else:
            values[group] = dict(figure.value) if isinstance(figure.value, dict) else figure.value
        source[figure.name] = figure.origin
        if figure.formula:
            formulas[figure.name.rstrip("0123456789")] = figure.formula  # hours_to_cr2, 4 and 8 share one formula
    return values | {"source": source, "formulas": formulas}


def as_text(figures: Iterable[Figure]) -> list[str]:
    """A line for each number, then the formulas."""
    lines, formulas = [f"{'figure':<42}{'value':>16}  source"], {}
    for figure in figures:
        numbers = figure.value if isinstance(figure.value, dict) else {"": figure.value}
        for kind, number in numbers.items():
            name = f"{figure.name}.{kind}" if kind else figure.name
            lines.append(f"{name:<42}{shown(number, figure.unit):>16}  {figure.origin}")
        if figure.formula:
            formulas[figure.name.rstrip("0123456789")] = figure.formula
    return [*lines, "", "formulas", *(f"  {name}: {formula}" for name, formula in formulas.items())]


FORMATS = {
    "bytes": lambda number: f"{number / GIB:.2f} GiB",
    "FLOPs": "{:.3e}".format,
    "s": "{:.3f} s".format,
    "h": "{:.2f} h".format,
    "tokens/s": "{:.0f} tokens/s".format,
    "fraction": "{:.1%}".format,
}


def shown(number: float | bool | None, unit: str) -> str:
    """A number with its unit, for people."""
    if number is None:
        return "-"
    if isinstance(number, bool):
        return "yes" if number else "no"
    return FORMATS[unit](number) if unit in FORMATS else f"{number:.6g} {unit}".strip()
