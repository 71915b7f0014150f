"""Build a report: read the measurements, draw the figures and fill in the template `report.html.j2`.

The page uses no scripts and loads nothing. All text from files is escaped by the template's autoescaping, after `visible` has
replaced characters that could hide or reorder the text around them.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
from markupsafe import Markup, escape

from dms_jax.evaluation import aggregate
from dms_jax.evaluation.aggregate import AnswerArm, GreedyArm, KeptArm, Measured, TextGroup
from dms_jax.reporting import report_figures as figures
from dms_jax.reporting import report_summary
from dms_jax.reporting.report_colors import LEVELS, css_values, css_variable, kept_level


class Arms(NamedTuple):
    """Everything that was measured, by kind; an empty list where nothing was."""

    texts: list[TextGroup]
    answers: list[AnswerArm]
    greedy: list[GreedyArm]
    kept: list[KeptArm]


def build(paths: list[str], title: str) -> dict[str, bytes]:
    """Name -> content of all files of the report, the page last."""
    measured = aggregate.read_measured(paths)
    arms = Arms(
        aggregate.text_groups(measured.kind("text")),
        aggregate.answer_arms(measured.kind("answers")),
        aggregate.greedy_arms(measured.kind("greedy")),
        aggregate.kept_arms(measured.kind("kept")),
    )
    drawings = list(drawn(arms))
    rows = provenance(measured)
    html = page_template().render(
        title=title,
        summary=report_summary.summary(*arms),
        files=measured.headers,
        provenance=rows,
        differing=[key for key, values in rows.items() if len(values) > 1],
        drawings={drawing.name: drawing for drawing in drawings},
        needles=[arm for arm in arms.answers if arm.cells],
        **arms._asdict(),
    )
    pngs = {f"{drawing.name}.png": drawing.png for drawing in drawings}
    for number, arm in enumerate(arms.kept, 1):
        pngs[f"kept_text_{number}.png"] = figures.kept_text(arm)
    return pngs | {"report.html": html.encode("utf-8")}


def drawn(arms: Arms) -> Iterator[figures.Drawing]:
    """The figures of what was measured."""
    if any(arm.policy != "dense" for group in arms.texts for arm in group.arms):
        yield figures.kl_tails(arms.texts)
        yield figures.kl_by_position(arms.texts)
    if arms.answers:
        yield figures.accuracy(arms.answers)
    for task in dict.fromkeys(arm.task for arm in arms.answers if arm.cells):
        yield figures.needles(task, arms.answers)
    if arms.kept:
        yield figures.cr_by_head(arms.kept)
        yield figures.cr_by_position(arms.kept)


def page_template() -> jinja2.Template:
    """The template of the page with the functions that it calls."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        finalize=visible,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    functions = (css_values, css_variable, kept_level, grouped, whitespace_marked, figures.needles_name)
    functions += (report_summary.digits, report_summary.spread, report_summary.gap_sentence)
    named = {function.__name__: function for function in functions}
    return environment.get_template("report.html.j2", globals=named | {"fmt": format, "LEVELS": LEVELS})


def visible(value: Any) -> Any:
    """Replace control characters by their symbols and characters that change the direction of text by U+FFFD. The template applies
    this to everything that it prints, except to HTML of its own."""
    if isinstance(value, Markup):
        return value
    text = re.sub("[\x00-\x08\x0b-\x1f]", lambda found: chr(0x2400 + ord(found[0])), str(value)).replace("\x7f", "␡")
    return re.sub("[\x80-\x9f\u202a-\u202e\u2066-\u2069]", "\ufffd", text)


def whitespace_marked(piece: str) -> Markup:
    """The HTML of one token, in which a newline and a tab can be seen."""
    shown = escape(visible(piece))
    return shown.replace("\n", Markup("<i>↵</i>\n")).replace("\t", Markup("<i>⇥</i>\t"))


def provenance(measured: Measured) -> dict[str, list[str]]:
    """The values of each key of the files' headers; one value where all files agree."""
    keys = dict.fromkeys(key for header in measured.headers.values() for key in header)
    values = {key: [str(header.get(key, "–")) for header in measured.headers.values()] for key in keys}
    return {key: list(dict.fromkeys(found)) for key, found in values.items()}


def grouped(arms: list[Any], field: str) -> dict[str, list[Any]]:
    """Arms by the value of a field, in the order of the first arm of each value."""
    found: dict[str, list[Any]] = {}
    for arm in arms:
        found.setdefault(getattr(arm, field), []).append(arm)
    return found
