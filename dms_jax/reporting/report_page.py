"""Build a report: read the measurements, draw the figures and fill in the template `report.html.j2`.

The page uses no scripts and loads nothing. The template escapes all text from files, after `visible` has replaced
characters that could hide or reorder the text around them.
"""

import re
from collections.abc import Iterator
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
from markupsafe import Markup, escape

from dms_jax.command import typed_as
from dms_jax.evaluation import aggregate
from dms_jax.evaluation.aggregate import AnswerResult, GreedyResult, Measured, RetentionResult, TextGroup
from dms_jax.reporting import report_figures as figures
from dms_jax.reporting import report_summary
from dms_jax.reporting.report_colors import LEVELS, css_values, css_variable, kept_level


class Measurements(NamedTuple):
    """All results by kind of measurement; an empty list for a kind that was not measured."""

    texts: list[TextGroup]
    answers: list[AnswerResult]
    greedy: list[GreedyResult]
    kept: list[RetentionResult]


def build(paths: list[str], title: str) -> dict[str, bytes]:
    """Return name -> content of all files of the report. The page comes last."""
    measured = aggregate.read_measured(paths)
    results = Measurements(
        aggregate.text_groups(measured.kind("text")),
        aggregate.answer_results(measured.kind("answers")),
        aggregate.greedy_results(measured.kind("greedy")),
        aggregate.retention_results(measured.kind("kept")),
    )
    drawings = list(drawn(results))
    rows = provenance(measured)
    html = page_template().render(
        title=title,
        summary=report_summary.summary(*results),
        files=measured.headers,
        provenance=rows,
        differing=[key for key, values in rows.items() if len(values) > 1],
        drawings={drawing.name: drawing for drawing in drawings},
        needles=[result for result in results.answers if result.cells],
        **results._asdict(),
    )
    pngs = {f"{drawing.name}.png": drawing.png for drawing in drawings}
    for number, result in enumerate(results.kept, 1):
        pngs[f"kept_text_{number}.png"] = figures.kept_text(result)
    return pngs | {"report.html": html.encode("utf-8")}


def drawn(results: Measurements) -> Iterator[figures.Drawing]:
    """Draw the figures of the kinds that were measured."""
    if any(result.policy != "dense" for group in results.texts for result in group.results):
        yield figures.kl_tails(results.texts)
        yield figures.kl_by_position(results.texts)
    if results.answers:
        yield figures.accuracy(results.answers)
    for task in dict.fromkeys(result.task for result in results.answers if result.cells):
        yield figures.needles(task, results.answers)
    if results.kept:
        yield figures.cr_by_head(results.kept)
        yield figures.cr_by_position(results.kept)


def page_template() -> jinja2.Template:
    """Load the template of the page, with the functions that it calls."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        finalize=visible,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    functions = (css_values, css_variable, kept_level, grouped, whitespace_marked, figures.needles_name, typed_as)
    functions += (report_summary.digits, report_summary.spread, report_summary.gap_sentence)
    names = {function.__name__: function for function in functions} | {"fmt": format, "LEVELS": LEVELS}
    return environment.get_template("report.html.j2", globals=names)


def grouped(results: list[Any], field: str) -> dict[str, list[Any]]:
    """Group results by a field. The template calls this."""
    return aggregate.grouped(results, attrgetter(field))


def visible(value: Any) -> Any:
    """Replace control characters by their symbols, and characters that change the direction of text by U+FFFD. The
    template applies this to everything that it prints except its own HTML."""
    if isinstance(value, Markup):
        return value
    text = re.sub("[\x00-\x08\x0b-\x1f]", lambda found: chr(0x2400 + ord(found[0])), str(value)).replace("\x7f", "␡")
    return re.sub("[\x80-\x9f\u202a-\u202e\u2066-\u2069]", "\ufffd", text)


def whitespace_marked(piece: str) -> Markup:
    """Return the HTML of one token, with visible newlines and tabs."""
    shown = escape(visible(piece))
    return shown.replace("\n", Markup("<i>↵</i>\n")).replace("\t", Markup("<i>⇥</i>\t"))


def provenance(measured: Measured) -> dict[str, list[str]]:
    """Return the values of each key of the files' headers: a single value if all files agree."""
    keys = dict.fromkeys(key for header in measured.headers.values() for key in header)
    values = {key: [str(header.get(key, "–")) for header in measured.headers.values()] for key in keys}
    return {key: list(dict.fromkeys(found)) for key, found in values.items()}
