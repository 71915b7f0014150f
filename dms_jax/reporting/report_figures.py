"""The figures of a report. Each is drawn once and rendered twice: as a PNG, and as an SVG for the page, whose colors
follow the reader's light or dark theme."""

import io
import math
import re
import warnings
from collections.abc import Iterable
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, NullFormatter, SymmetricalLogLocator

from dms_jax.evaluation.aggregate import AnswerResult, RetentionResult, TextGroup, TextResult
from dms_jax.evaluation.statistics import fraction_above
from dms_jax.reporting.report_colors import INK, MUTED, PAPER, RULE, VARIABLES, kept_color, policy_look

STYLE = {
    **{"font.family": ["DejaVu Sans"], "font.size": 10, "axes.titlesize": 10.5, "axes.titlelocation": "left"},
    **{"figure.labelsize": 10, "legend.frameon": False, "axes.axisbelow": True},
    **{"axes.grid": True, "grid.color": RULE, "axes.spines.top": False, "axes.spines.right": False},
    **dict.fromkeys(["text.color", "axes.labelcolor", "axes.titlecolor", "xtick.labelcolor", "ytick.labelcolor"], INK),
    **dict.fromkeys(["axes.edgecolor", "xtick.color", "ytick.color"], MUTED),
    **{"figure.facecolor": PAPER, "axes.facecolor": "none"},
    **{"svg.fonttype": "none", "svg.hashsalt": "report", "text.parse_math": False},
}
MAPS = STYLE | {"axes.grid": False}


class Drawing(NamedTuple):
    name: str  # file name of the PNG, without its suffix
    svg: str
    png: bytes
    alt: str


@matplotlib.rc_context(STYLE)
def kl_tails(groups: list[TextGroup]) -> Drawing:
    """One panel for each group: the fraction of tokens whose KL is above a value."""
    figure, panels = _panels(len(groups), height=3.0)
    results = [result for group in groups for result in group.results]
    top = max([3.0, *(result.kl_max for result in results if math.isfinite(result.kl_max))])
    thresholds = np.geomspace(1e-3, 1.2 * top, 120)
    bottom = 0.5 / max(result.kl_tokens.size for result in results)
    for panel, group in zip(panels, groups, strict=True):
        for result in _drawn(group):
            above = fraction_above(result.kl_tokens, thresholds)
            panel.plot(thresholds[above > 0], above[above > 0], **_style(result.policy))
        panel.set(title=_title(group), xscale="log", yscale="log", xlim=(1e-3, 1.3 * top), ylim=(bottom, 1.3))
        _plain_numbers(panel.xaxis, panel.yaxis)
    _label(figure, "KL(dense || policy) of a token, nats", "fraction of tokens above")
    _legend(figure, [result for group in groups for result in _drawn(group)])
    return _rendered(figure, "kl_tails", "Fraction of tokens whose KL is above a value, one line for each policy")


@matplotlib.rc_context(STYLE)
def kl_by_position(groups: list[TextGroup]) -> Drawing:
    """One panel for each group: the mean KL of 16 equal parts of the row."""
    figure, panels = _panels(len(groups), height=2.8)
    top = 1e-3
    for panel, group in zip(panels, groups, strict=True):
        edges = np.linspace(0, group.length, min(16, group.length) + 1)
        centers = (edges[:-1] + edges[1:]) / 2
        for result in _drawn(group):
            positions = np.concatenate([np.arange(len(row)) for row in result.kl_rows.values()])
            count, total = (np.histogram(positions, edges, weights=kl)[0] for kl in (None, result.kl_tokens))
            means = total[count > 0] / count[count > 0]
            top = max(top, means.max())
            panel.plot(centers[count > 0], means, **_style(result.policy))
        if group.budget and group.budget < group.length:
            panel.axvline(group.budget, color=MUTED, lw=1, ls=":")
        panel.set(title=_title(group), xlim=(0, group.length))
        panel.set_yscale("symlog", linthresh=1e-3)
        panel.yaxis.set_major_locator(SymmetricalLogLocator(base=10, linthresh=1e-3))
        _plain_numbers(panel.yaxis)
    panels[0].set_ylim(0, 1.4 * top if math.isfinite(top) else None)
    _label(figure, "position in the row, tokens", "mean KL, nats")
    _legend(figure, [result for group in groups for result in _drawn(group)])
    return _rendered(figure, "kl_by_position", "Mean KL by position in the row, one line for each policy")


@matplotlib.rc_context(STYLE)
def accuracy(results: list[AnswerResult]) -> Drawing:
    """One panel for each task: accuracy with its interval against live tokens. A line joins the budgets of a policy."""
    tasks = list(dict.fromkeys(result.task for result in results))
    figure, panels = _panels(len(tasks), height=3.0)
    for panel, task in zip(panels, tasks, strict=True):
        here = [result for result in results if result.task == task]
        for policy in sorted({result.policy for result in here}, key=_order):
            points = sorted(
                (result for result in here if result.policy == policy), key=lambda result: result.live_tokens
            )
            value, low, high = np.array([result.accuracy[:3] for result in points]).T
            look = policy_look(policy)
            if policy == "dense":
                panel.axhline(value[-1], color=look.color, lw=1.2, ls=look.dash, zorder=2)
            live, errors = [result.live_tokens for result in points], [value - low, high - value]
            panel.errorbar(live, value, errors, **_style(policy, marker=True), elinewidth=1, ms=7 if look.first else 5)
        panel.set(title=task, ylim=(-0.03, 1.03))
        panel.set_xscale("log", base=2)
        _plain_numbers(panel.xaxis)
    _label(figure, "live tokens per KV head (log scale; fewer is a smaller cache)", "accuracy")
    _legend(figure, results, marker=True)
    return _rendered(figure, "accuracy", "Accuracy against live tokens, one panel for each task")


def needles_name(task: str) -> str:
    return f"needles_{re.sub('[^A-Za-z0-9_-]+', '_', task)}"


@matplotlib.rc_context(MAPS)
def needles(task: str, results: list[AnswerResult]) -> Drawing:
    """One map of depth x length for each result, first those of DMS and of the dense model."""
    results = [result for result in results if result.task == task and result.cells]
    results.sort(key=lambda result: (_order(result.policy), -result.live_tokens))
    lengths = sorted({length for result in results for length, _ in result.cells})
    depths = sorted({depth for result in results for _, depth in result.cells})
    columns, width = max(2, min(5, 20 // len(lengths))), max(2.15, 0.46 * len(lengths))
    figure, panels = _panels(len(results), height=0.34 * len(depths) + 0.65, columns=columns, width=width)
    label = lambda value: f"{value:.2f}".removeprefix("0") if 0 < value < 1 else f"{value:g}"
    for panel, result in zip(panels, results, strict=True):
        found = {cell: accuracy.value for cell, accuracy in result.cells.items()}
        _cells(panel, np.array([[found.get((x, y), np.nan) for x in lengths] for y in depths]), 1, label)
        panel.set_xticks(np.arange(len(lengths)), [f"{length:g}" for length in lengths])
        panel.set_yticks(np.arange(len(depths)), [f"{depth:.0%}" for depth in depths])
        weight = "bold" if policy_look(result.policy).first else "normal"
        panel.set_title(f"{result.name}: {result.accuracy.value:.0%}", fontsize=9, fontweight=weight)
    _label(figure, "length of the prompt, tokens", "depth of the needle")
    return _rendered(figure, needles_name(task), f"Accuracy of {task} by length and depth, one map for each method")


@matplotlib.rc_context(MAPS)
def cr_by_head(results: list[RetentionResult]) -> Drawing:
    """A map of layers x heads for each result, and beside it the compression ratio of each layer."""
    layers, heads = np.max([result.live_per_head.shape for result in results], axis=0)
    top = max(float(np.max(result.length / np.maximum(result.live_per_head, 1))) for result in results)
    width, columns, rows = max(2.4, 0.48 * heads + 0.4), min(2, len(results)), -(-len(results) // 2)
    height = max(2.4, 0.235 * layers + 1.3)
    figure = Figure(figsize=((width + 2.0) * columns, height * rows), layout="constrained")
    grid = figure.subplots(rows, 2 * columns, squeeze=False, width_ratios=[width, 1.6] * columns)
    for panel in grid.ravel()[2 * len(results) :]:
        panel.remove()
    label = lambda value: f"{np.exp(value):.{1 if np.exp(value) >= 9.995 else 2}f}"
    for (left, right), result in zip(grid.reshape(-1, 2), results, strict=False):
        ratio = result.length / np.maximum(result.live_per_head, 1e-9)
        _cells(left, np.log(ratio), np.log(max(top, 1.01)), label, size=7.5)
        left.set(title=f"{result.domain}, {result.name}: CR {result.realised_cr:.2f}", xlabel="KV head", ylabel="layer")
        left.set(xticks=np.arange(ratio.shape[1]), yticks=np.arange(0, len(ratio), 1 if len(ratio) <= 32 else 4))
        layer = result.length / result.live_per_head.mean(axis=1)
        right.barh(np.arange(len(layer)), layer, color=policy_look("dms").color, height=0.7)
        right.axvline(1, color=MUTED, lw=1, ls=":")
        right.set(ylim=left.get_ylim(), yticks=[], xlabel="CR of the layer", xlim=(0, None))
        right.grid(axis="x")
    return _rendered(figure, "cr_by_layer_and_head", "Realised compression ratio of each layer and KV head")


@matplotlib.rc_context(STYLE)
def cr_by_position(results: list[RetentionResult]) -> Drawing:
    """Live tokens (left) and compression ratio (right) after each token, one line for each result."""
    figure = Figure(figsize=(9.8, 3.2), layout="constrained")
    live, ratio = figure.subplots(1, 2, gridspec_kw={"wspace": 0.06})
    longest, color = max(result.length for result in results), policy_look("dms").color
    dense = {"color": policy_look("dense").color, "ls": ":", "lw": 1.3}
    live.plot([0, longest], [0, longest], **dense)
    beside = {"xytext": (-6, 4), "textcoords": "offset points", "ha": "right", "fontsize": 9}
    live.annotate("dense: keeps every token", (longest * 0.5, longest * 0.5), **beside)
    ratio.axhline(1, **dense)
    for result, dash in zip(
        results, ["-", "--", "-.", (0, (1, 1)), (0, (5, 1, 1, 1, 1, 1))] * len(results), strict=False
    ):
        x = np.arange(1, result.length + 1)
        live.plot(x, result.live_by_position, color=color, ls=dash, lw=2, label=f"{result.domain}, {result.name}")
        ratio.plot(x, x / np.maximum(result.live_by_position, 1e-9), color=color, ls=dash, lw=2)
    for axes, label in ((live, "live tokens per KV head"), (ratio, "realised CR (tokens seen / live)")):
        axes.set(xlabel="tokens seen", ylabel=label, xlim=(0, longest), ylim=(0, None))
    live.legend(loc="upper left", fontsize=9)
    alt = "Live tokens and compression ratio after each token; the diagonal is dense"
    return _rendered(figure, "cr_by_position", alt)


def kept_text(result: RetentionResult, columns: int = 110, lines: int = 48) -> bytes:
    """Draw the beginning of a text as a PNG, each token on the color of its kept fraction. The page shows all of it."""
    with matplotlib.rc_context(MAPS | {"font.family": ["DejaVu Sans Mono"]}), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # this font lacks the letters of some scripts: boxes here, correct on the page
        cells = list(_text_cells(result.pieces, columns))
        rows = min(cells[-1][0] + 1, lines) if cells else 1
        letter = 10 / 72 * 0.602  # width in inches of a letter of this font at 10 points
        height = rows * 0.21 + 0.4
        figure = Figure(figsize=(columns * letter / 0.96, height))
        axes = figure.add_axes((0.02, 0.02, 0.96, 0.96 - 0.3 / height))
        axes.set(xlim=(0, columns), ylim=(rows, 0))
        axes.axis("off")
        for row, column, chunk, position in cells:
            if row < rows:
                color = kept_color(result.kept[position])
                axes.add_patch(Rectangle((column, row + 0.05), len(chunk), 0.9, color=color, lw=0))
                axes.text(column, row + 0.52, chunk, fontsize=10, va="center", ha="left")
        title = f"{result.domain}, {result.name}; the stronger the color, the more heads keep the token"
        figure.text(0.02, 0.985, title, va="top")
        return _png(figure)


def _text_cells(pieces: Iterable[str], columns: int) -> Iterable[tuple[int, int, str, int]]:
    """Wrap a text at `columns` letters. Yields (row, column, part of a token, position of the token)."""
    row, column = 0, 0
    for position, piece in enumerate(pieces):
        for part in re.split("(\n)", piece):
            shown = "↵" if part == "\n" else part.replace("\t", "⇥").replace("\r", "")
            for start in range(0, len(shown), columns):
                chunk = shown[start : start + columns]
                if column + len(chunk) > columns:
                    row, column = row + 1, 0
                yield row, column, chunk, position
                column += len(chunk)
            if part == "\n":
                row, column = row + 1, 0


def _panels(count: int, height: float, columns: int = 0, width: float = 0) -> tuple[Figure, list]:
    """Make `count` panels of `height` inches, in rows of at most `columns`; 0 is 3, or 2 where that fills the rows."""
    columns = min(count, columns or (2 if count == 4 else 3))
    width = width or {1: 6.0, 2: 5.0}.get(columns, 3.5)
    rows = -(-count // columns)
    figure = Figure(figsize=(width * columns + 0.5, height * rows + 0.9), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, sharex=False, sharey=True).ravel()
    for unused in axes[count:]:
        unused.remove()
    return figure, list(axes[:count])


def _drawn(group: TextGroup) -> list[TextResult]:
    """All results but dense, to which they are compared. DMS comes last, so that its line lies on top."""
    return sorted(
        (result for result in group.results if result.policy != "dense"), key=lambda result: -_order(result.policy)[0]
    )


def _order(policy: str) -> tuple[int, str]:
    return {"dms": 0, "dense": 1}.get(policy, 2), policy


def _title(group: TextGroup) -> str:
    return f"{group.domain}, {group.length} tokens" + (f", budget {group.budget}" if group.budget else "")


def _style(policy: str, marker: bool = False) -> dict:
    look = policy_look(policy)
    style = {"color": look.color, "ls": look.dash, "lw": look.width, "zorder": 4 if look.first else 3}
    return style | ({"marker": look.marker} if marker else {})


def _label(figure: Figure, x: str, y: str) -> None:
    """Label the axes that all panels share."""
    figure.supxlabel(x)
    figure.supylabel(y)


def _legend(figure: Figure, results: Iterable[TextResult | AnswerResult], marker: bool = False) -> None:
    policies = sorted({result.policy for result in results}, key=_order)
    handles = [Line2D([], [], label=policy, **_style(policy, marker)) for policy in policies]
    columns = max(1, int(figure.get_figwidth() / 1.75))
    figure.legend(handles=handles, loc="outside upper left", ncols=columns, fontsize=9.5, handlelength=2.8)


def _plain_numbers(*axes) -> None:
    """Label ticks with plain numbers, such as 0.01, instead of powers of ten."""
    for axis in axes:
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_formatter(NullFormatter())


def _cells(panel, values: np.ndarray, top: float, label, size: float = 8.5) -> None:
    """Draw a heat map of values from 0 to `top`, with `label(value)` in each cell; the cell of a nan stays empty."""
    colors = matplotlib.colormaps["cividis"]
    for (row, column), value in np.ndenumerate(values):
        if np.isfinite(value):
            shade = min(max(value / top, 0.0), 1.0)
            cell = Rectangle((column - 0.5, row - 0.5), 1, 1, facecolor=colors(shade), edgecolor="none")
            ink = "#fff" if shade < 0.55 else "#000"
            number = panel.text(column, row, label(value), color=ink, fontsize=size, ha="center", va="center_baseline")
            for part in (panel.add_patch(cell), number):
                part.set_in_layout(False)  # it lies inside the axes; measuring hundreds of parts takes seconds
    panel.set(xlim=(-0.5, values.shape[1] - 0.5), ylim=(values.shape[0] - 0.5, -0.5))
    panel.tick_params(length=0)
    panel.spines[:].set_visible(False)


def _rendered(figure: Figure, name: str, alt: str) -> Drawing:
    png, file = _png(figure), io.StringIO()
    figure.patch.set_visible(False)
    figure.set_layout_engine("none")  # keep the layout of the PNG
    figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    svg = re.sub(r"\A.*?(?=<svg)|<metadata>.*?</metadata>", "", file.getvalue(), flags=re.S)
    for color, variable in VARIABLES.items():
        svg = svg.replace(color, f"var(--{variable})")  # the style sheet of the page has its light and its dark value
    return Drawing(name, svg, png, alt)


def _png(figure: Figure) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=144, metadata={"Software": None})
    return file.getvalue()
