"""The figures of a report, each once as SVG for the page, in whose light and dark colours it is drawn, and once as a PNG."""

import io
import math
import re
import warnings
from collections.abc import Sequence
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, NullFormatter, SymmetricalLogLocator

from dms_jax.evaluation.aggregate import AnswerArm, KeptArm, TextArm, TextGroup
from dms_jax.evaluation.statistics import fraction_above
from dms_jax.reporting.report_colors import INK, MUTED, PAPER, RULE, VARIABLES, kept_color, policy_look

STYLE = {
    "font.family": ["DejaVu Sans"],
    "font.size": 10,
    "axes.titlesize": 10.5,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.edgecolor": MUTED,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "grid.color": RULE,
    "grid.linewidth": 0.8,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.facecolor": "none",
    "figure.facecolor": PAPER,
    "legend.frameon": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "report",
    "text.parse_math": False,
}


class Drawing(NamedTuple):
    name: str  # of the PNG, without suffix
    svg: str
    png: bytes
    alt: str


def kl_tails(groups: list[TextGroup]) -> Drawing:
    with matplotlib.rc_context(STYLE):
        figure, panels = _panels(len(groups), height=3.0, share=True)
        top = max([3.0, *(arm.kl_max for group in groups for arm in group.arms if math.isfinite(arm.kl_max))])
        thresholds = np.geomspace(1e-3, 1.2 * top, 120)
        most = max(arm.kl_tokens.size for group in groups for arm in group.arms)
        for panel, group in zip(panels, groups, strict=True):
            for arm in _drawn(group):
                above = fraction_above(arm.kl_tokens, thresholds)
                seen = above > 0
                _line(panel, thresholds[seen], above[seen], arm.policy)
            panel.set(title=_title(group), xscale="log", yscale="log", xlim=(1e-3, 1.3 * top), ylim=(0.5 / most, 1.3))
            _plain_ticks(panel)
        figure.supxlabel("KL(dense || policy) of a token, nats", fontsize=10)
        figure.supylabel("fraction of tokens above", fontsize=10)
        _legend(figure, [arm.policy for group in groups for arm in _drawn(group)])
        return _rendered(figure, "kl_tails", "Fraction of tokens whose KL is above a value, one line for each policy")


def kl_by_position(groups: list[TextGroup], buckets: int = 16) -> Drawing:
    with matplotlib.rc_context(STYLE):
        figure, panels = _panels(len(groups), height=2.8, share=True)
        top = 1e-3
        for panel, group in zip(panels, groups, strict=True):
            edges = np.linspace(0, group.length, min(buckets, group.length) + 1)
            for arm in _drawn(group):
                where = np.concatenate([np.arange(len(row)) for row in arm.kl_rows.values()])
                count, _ = np.histogram(where, edges)
                total, _ = np.histogram(where, edges, weights=arm.kl_tokens)
                means = total[count > 0] / count[count > 0]
                top = max(top, means.max())
                _line(panel, ((edges[:-1] + edges[1:]) / 2)[count > 0], means, arm.policy)
            if group.budget and group.budget < group.length:
                panel.axvline(group.budget, color=MUTED, lw=1, ls=":")
            panel.set(title=_title(group), xlim=(0, group.length))
            panel.set_yscale("symlog", linthresh=1e-3)
            panel.yaxis.set_major_locator(SymmetricalLogLocator(base=10, linthresh=1e-3))
            panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        panels[0].set_ylim(0, 1.4 * top if math.isfinite(top) else None)
        figure.supxlabel("position in the row, tokens", fontsize=10)
        figure.supylabel("mean KL, nats", fontsize=10)
        _legend(figure, [arm.policy for group in groups for arm in _drawn(group)])
        return _rendered(figure, "kl_by_position", "Mean KL by position in the row, one line for each policy")


def accuracy(arms: list[AnswerArm]) -> Drawing:
    """One panel a task: accuracy with its interval against live tokens, the budgets of a policy joined by a line."""
    tasks = list(dict.fromkeys(arm.task for arm in arms))
    with matplotlib.rc_context(STYLE):
        figure, panels = _panels(len(tasks), height=3.0, share=True)
        for panel, task in zip(panels, tasks, strict=True):
            here = [arm for arm in arms if arm.task == task]
            for policy in sorted({arm.policy for arm in here}, key=_order):
                points = sorted((arm for arm in here if arm.policy == policy), key=lambda arm: arm.live_tokens)
                value, low, high = np.array([arm.accuracy[:3] for arm in points]).T
                look = policy_look(policy)
                if policy == "dense":
                    panel.axhline(value[-1], color=look.color, lw=1.2, ls=look.dash, zorder=2)
                panel.errorbar(
                    [arm.live_tokens for arm in points],
                    value,
                    [value - low, high - value],
                    color=look.color,
                    marker=look.marker,
                    ls=look.dash,
                    lw=look.width,
                    elinewidth=1,
                    ms=7 if look.first else 5,
                    zorder=4 if look.first else 3,
                )
            panel.set(title=task, ylim=(-0.03, 1.03), xscale="log")
            panel.set_xscale("log", base=2)
            _plain_ticks(panel, y=False)
        figure.supxlabel("live tokens per KV head (log scale; fewer is a smaller cache)", fontsize=10)
        figure.supylabel("accuracy", fontsize=10)
        _legend(figure, [arm.policy for arm in arms], markers=True)
        return _rendered(figure, "accuracy", "Accuracy against live tokens, one panel for each task")


def needles(task: str, arms: list[AnswerArm]) -> Drawing:
    """Depth x length, one map an arm: DMS and dense first."""
    arms = sorted(
        (arm for arm in arms if arm.task == task and arm.cells), key=lambda arm: (_order(arm.policy), -arm.live_tokens)
    )
    lengths = sorted({length for arm in arms for length, _ in arm.cells})
    depths = sorted({depth for arm in arms for _, depth in arm.cells})
    with matplotlib.rc_context(STYLE | {"axes.grid": False}):
        columns = max(2, min(5, 20 // len(lengths)))
        width = max(2.15, 0.46 * len(lengths))
        figure, panels = _panels(len(arms), height=0.34 * len(depths) + 0.65, columns=columns, width=width, share=True)
        for panel, arm in zip(panels, arms, strict=True):
            values = np.array(
                [[arm.cells[x, y].value if (x, y) in arm.cells else np.nan for x in lengths] for y in depths]
            )
            _cells(
                panel, values, 0, 1, lambda value: f"{value:.2f}".removeprefix("0") if 0 < value < 1 else f"{value:g}"
            )
            panel.set(xticks=np.arange(len(lengths)), yticks=np.arange(len(depths)))
            panel.set_xticklabels([f"{length:g}" for length in lengths])
            panel.set_yticklabels([f"{depth:.0%}" for depth in depths])
            panel.set_title(
                f"{arm.name}: {arm.accuracy.value:.0%}",
                fontsize=9,
                fontweight="bold" if policy_look(arm.policy).first else "normal",
            )
        figure.supxlabel("length of the prompt, tokens", fontsize=10)
        figure.supylabel("depth of the needle", fontsize=10)
        return _rendered(
            figure,
            f"needles_{re.sub('[^A-Za-z0-9_-]+', '_', task)}",
            f"Accuracy of {task} by length and depth, one map for each arm",
        )


def cr_by_head(arms: list[KeptArm]) -> Drawing:
    """For each kept arm a map of layers x heads, and the layers' own ratios beside it."""
    layers, heads = np.max([arm.live_per_head.shape for arm in arms], axis=0)
    top = max(float(np.max(arm.length / np.maximum(arm.live_per_head, 1))) for arm in arms)
    with matplotlib.rc_context(STYLE | {"axes.grid": False}):
        width = max(2.4, 0.48 * heads + 0.4)
        figure = Figure(
            figsize=((width + 2.0) * min(2, len(arms)), max(2.4, 0.235 * layers + 1.3) * -(-len(arms) // 2)),
            layout="constrained",
        )
        grid = figure.subplots(
            -(-len(arms) // 2), 2 * min(2, len(arms)), squeeze=False, width_ratios=[width, 1.6] * min(2, len(arms))
        )
        for panel in grid.ravel()[2 * len(arms) :]:
            panel.remove()
        for (left, right), arm in zip(grid.reshape(-1, 2), arms, strict=False):
            ratio = arm.length / np.maximum(arm.live_per_head, 1e-9)
            _cells(
                left,
                np.log(ratio),
                0,
                np.log(max(top, 1.01)),
                lambda value: f"{np.exp(value):.{1 if np.exp(value) >= 9.995 else 2}f}",
                size=7.5,
            )
            left.set(title=f"{arm.domain}, {arm.name}: CR {arm.realised_cr:.2f}", xlabel="KV head", ylabel="layer")
            left.set(xticks=np.arange(ratio.shape[1]), yticks=np.arange(0, len(ratio), 1 if len(ratio) <= 32 else 4))
            layer = arm.length / arm.live_per_head.mean(axis=1)
            right.barh(np.arange(len(layer)), layer, color=policy_look("dms").color, height=0.7)
            right.axvline(1, color=MUTED, lw=1, ls=":")
            right.set(ylim=left.get_ylim(), yticks=[], xlabel="CR of the layer", xlim=(0, None))
            right.grid(axis="x")
        return _rendered(figure, "cr_by_layer_and_head", "Realised compression ratio of each layer and KV head")


def cr_by_position(arms: list[KeptArm]) -> Drawing:
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9.8, 3.2), layout="constrained")
        live, ratio = figure.subplots(1, 2, gridspec_kw={"wspace": 0.06})
        longest = max(arm.length for arm in arms)
        live.plot([0, longest], [0, longest], color=policy_look("dense").color, ls=":", lw=1.3)
        live.annotate(
            "dense: keeps every token",
            (longest * 0.5, longest * 0.5),
            xytext=(-6, 4),
            textcoords="offset points",
            ha="right",
            fontsize=9,
        )
        ratio.axhline(1, color=policy_look("dense").color, ls=":", lw=1.3)
        for arm, dash in zip(arms, ["-", "--", "-.", (0, (1, 1)), (0, (5, 1, 1, 1, 1, 1))] * len(arms), strict=False):
            x, color = np.arange(1, arm.length + 1), policy_look("dms").color
            live.plot(x, arm.live_by_position, color=color, ls=dash, lw=2, label=f"{arm.domain}, {arm.name}")
            ratio.plot(x, x / np.maximum(arm.live_by_position, 1e-9), color=color, ls=dash, lw=2)
        for axes, label in ((live, "live tokens per KV head"), (ratio, "realised CR (tokens seen / live)")):
            axes.set(xlabel="tokens seen", ylabel=label, xlim=(0, longest), ylim=(0, None))
        live.legend(loc="upper left", fontsize=9)
        return _rendered(
            figure, "cr_by_position", "Live tokens and compression ratio after each token, the diagonal is dense"
        )


def kept_text(arm: KeptArm, name: str, columns: int = 110, lines: int = 48) -> bytes:
    """PNG of the beginning of a text, each token on the colour of its kept fraction; the page shows all of it."""
    cells, row, column = [], 0, 0
    for position, piece in enumerate(arm.pieces):
        for index, part in enumerate(re.split("(\n)", piece)):
            shown = "↵" if part == "\n" else part.replace("\t", "⇥").replace("\r", "")
            for start in range(0, len(shown), columns):
                chunk = shown[start : start + columns]
                if column + len(chunk) > columns:
                    row, column = row + 1, 0
                cells.append((row, column, chunk, position))
                column += len(chunk)
            if part == "\n" and index:
                row, column = row + 1, 0
    rows = min(row + 1, lines)
    with (
        matplotlib.rc_context(STYLE | {"axes.grid": False, "font.family": ["DejaVu Sans Mono"]}),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter(
            "ignore"
        )  # the font lacks some scripts' letters: they are boxes here, and right on the page
        letter = 10 / 72 * 0.602  # inches: the width of one in this font, at 10 points
        figure = Figure(figsize=(columns * letter / 0.96, rows * 0.21 + 0.6))
        axes = figure.add_axes((0.02, 0.02, 0.96, 0.96 - 0.4 / (rows * 0.21 + 0.6)))
        axes.set(xlim=(0, columns), ylim=(rows, 0))
        axes.axis("off")
        for row, column, chunk, position in cells:
            if row < rows:
                axes.add_patch(
                    Rectangle((column, row + 0.05), len(chunk), 0.9, color=kept_color(arm.kept[position]), lw=0)
                )
                axes.text(column, row + 0.52, chunk, fontsize=10, va="center", ha="left")
        key = f"{name}: forgotten by all heads "
        figure.text(0.02, 0.985, f"{key}{11 * '  '} kept by all heads", va="top", fontsize=10)
        for step in range(11):
            left, high = 0.02 + (len(key) + 2 * step) * letter / figure.get_figwidth(), 0.18 / figure.get_figheight()
            figure.add_artist(
                Rectangle(
                    (left, 0.985 - high),
                    2 * letter / figure.get_figwidth(),
                    high,
                    color=kept_color(step / 10),
                    transform=figure.transFigure,
                )
            )
        return _png(figure)


def _panels(count: int, height: float, columns: int = 0, width: float = 0, share: bool = False) -> tuple[Figure, list]:
    """Panels beside each other; without a number of columns, as many as make full rows."""
    wide = min(count, columns or (2 if count == 4 else 3))
    width = width or {1: 6.0, 2: 5.0}.get(wide, 3.5)
    tall = -(-count // wide)
    figure = Figure(figsize=(width * wide + 0.5, height * tall + 0.9), layout="constrained")
    axes = figure.subplots(tall, wide, squeeze=False, sharex=False, sharey=share).ravel()
    for unused in axes[count:]:
        unused.remove()
    return figure, list(axes[:count])


def _drawn(group: TextGroup) -> list[TextArm]:
    """Arms that have a KL, DMS last and so on top."""
    return sorted((arm for arm in group.arms if arm.policy != "dense"), key=lambda arm: -_order(arm.policy)[0])


def _order(policy: str) -> tuple[int, str]:
    return {"dms": 0, "dense": 1}.get(policy, 2), policy


def _title(group: TextGroup) -> str:
    return f"{group.domain}, {group.length} tokens" + (f", budget {group.budget}" if group.budget else "")


def _line(panel, x: np.ndarray, y: np.ndarray, policy: str) -> None:
    look = policy_look(policy)
    panel.plot(x, y, color=look.color, ls=look.dash, lw=look.width, zorder=4 if look.first else 3)


def _legend(figure: Figure, policies: Sequence[str], markers: bool = False) -> None:
    handles = []
    for policy in sorted(set(policies), key=_order):
        look = policy_look(policy)
        handles.append(
            matplotlib.lines.Line2D(
                [],
                [],
                color=look.color,
                ls=look.dash,
                lw=look.width,
                marker=look.marker if markers else "",
                label=policy,
            )
        )
    figure.legend(
        handles=handles,
        loc="outside upper left",
        ncols=max(1, int(figure.get_figwidth() / 1.75)),
        fontsize=9.5,
        handlelength=2.8,
    )


def _plain_ticks(panel, y: bool = True) -> None:
    for axis in (panel.xaxis, panel.yaxis) if y else (panel.xaxis,):
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_formatter(NullFormatter())


def _cells(panel, values: np.ndarray, low: float, high: float, label, size: float = 8.5) -> None:
    """A heat map with its numbers; what was not measured stays empty."""
    colors = matplotlib.colormaps["cividis"]
    for (row, column), value in np.ndenumerate(values):
        if np.isfinite(value):
            shade = min(max((value - low) / (high - low), 0.0), 1.0)
            cell = panel.add_patch(
                Rectangle((column - 0.5, row - 0.5), 1, 1, facecolor=colors(shade), edgecolor="none")
            )
            ink = "#fff" if shade < 0.55 else "#000"
            number = panel.text(column, row, label(value), ha="center", va="center_baseline", fontsize=size, color=ink)
            cell.set_in_layout(False)  # they are inside the axes: measuring hundreds of them takes seconds
            number.set_in_layout(False)
    panel.set(xlim=(-0.5, values.shape[1] - 0.5), ylim=(values.shape[0] - 0.5, -0.5))
    panel.tick_params(length=0)
    for spine in panel.spines.values():
        spine.set_visible(False)


def _rendered(figure: Figure, name: str, alt: str) -> Drawing:
    png, file = _png(figure), io.StringIO()
    figure.patch.set_visible(False)
    figure.set_layout_engine("none")  # as it was laid out for the PNG
    figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.S)
    for color, variable in VARIABLES.items():  # the page says what they are in light and in dark
        svg = svg.replace(color, f"var(--{variable})")
    return Drawing(name, svg, png, alt)


def _png(figure: Figure) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=144, metadata={"Software": None})
    return file.getvalue()
