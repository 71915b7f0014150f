"""The figures of a plan, and the two ways to print them: `as_json` and `as_text`.

Each figure carries its unit and its source, so that printing needs no knowledge of a particular plan.
"""

from collections.abc import Iterable
from typing import Any, Literal, NamedTuple

Source = Literal["compiled", "analytic", "measured", "assumed"]
GIB = 2**30


class Figure(NamedTuple):
    """One line of a plan."""

    name: str  # JSON key; "bytes_per_device.weights" becomes the key "weights" in the object "bytes_per_device"
    value: Any  # a number, a bool, a mapping from kind to number, or {} for an object whose parts are separate figures
    unit: str
    source: Source
    formula: str = ""
    note: str = ""  # details of the source, e.g. which data sheet

    @property
    def origin(self) -> str:
        """The source, in detail where there is a note."""
        return self.note or self.source


def as_json(figures: Iterable[Figure]) -> dict[str, Any]:
    """Return the values by name, and two more keys: the `source` and the `formulas` of the figures by name."""
    values, source, formulas = {}, {}, {}
    for figure in figures:
        group, _, part = figure.name.partition(".")
        if part:
            values.setdefault(group, {})[part] = figure.value
        else:
            values[group] = dict(figure.value) if isinstance(figure.value, dict) else figure.value
        source[figure.name] = figure.origin
        if figure.formula:
            formulas[figure.name.rstrip("0123456789")] = (
                figure.formula
            )  # hours_to_cr2, hours_to_cr4 and hours_to_cr8 share one formula
    return values | {"source": source, "formulas": formulas}


def as_text(figures: Iterable[Figure]) -> list[str]:
    """Return the lines of a table with one line per number, and then the formulas."""
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
    """Format a number with its unit for people."""
    if number is None:
        return "-"
    if isinstance(number, bool):
        return "yes" if number else "no"
    return FORMATS[unit](number) if unit in FORMATS else f"{number:.6g} {unit}".strip()
