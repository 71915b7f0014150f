"""Draw the figure of the README: mean KL to the dense model against live tokens, for each policy that was measured.

    python -m benchmarks.readme_figure
    python -m benchmarks.readme_figure --measurements FILE.jsonl --output FIGURE.png

The command reads the measurements that are committed in docs/measurements/ and needs no model. The KL of a policy is
its mean over the domains, which all have the same number of tokens. The colors are of medium lightness and the
background is transparent, so the same file reads well on a light page and on a dark one.
"""

import argparse
import math
from collections import defaultdict
from pathlib import Path
from typing import Any

from dms_jax.command import Parser, run_command
from dms_jax.errors import ConfigError
from dms_jax.files import read_jsonl, replacing

NAME = "benchmarks.readme_figure"
DOCS = Path(__file__).parent.parent / "docs"
MEASUREMENTS = DOCS / "measurements" / "smollm2-2026-11-25.jsonl"
FIGURE = DOCS / "figures" / "kl_against_live_tokens.png"
GRAY, ORANGE, VIOLET = "#7d8590", "#e0701a", "#8b70d6"  # each at least 3:1 against white and against GitHub's dark page
COLORS = {"dms": ORANGE, "quest": VIOLET}
LABELS = {"quest": "quest, reads 512\n(keeps all)"}  # `draw` labels its other point with its other budget
MIN_GAP = 0.17  # between two labels, in decades of KL


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(NAME, __doc__)
    add = parser.add_argument
    add(
        "--measurements",
        default=str(MEASUREMENTS),
        metavar="FILE",
        help="JSON lines of measurements (default: the committed ones)",
    )
    add("--output", default=str(FIGURE), metavar="FILE", help="the PNG to write (default %(default)s)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    options = parse(argv)
    curves = read_curves(options.measurements)
    try:
        with replacing(options.output) as temporary:
            draw(curves).savefig(temporary, format="png", dpi=200, transparent=True, metadata={"Software": None})
    except OSError as why:
        raise ConfigError(f"cannot write {options.output}: {why.strerror or why}; use another --output") from why
    print(f"wrote {options.output}")


def read_curves(path: str) -> dict[str, list[tuple[float, float]]]:
    """Return (live tokens, mean KL) of each policy but dense at each budget, averaged over domains, by increasing
    KL."""
    found: dict[tuple[str, str], list[tuple[float, float]]] = defaultdict(list)
    for where, record in read_jsonl(path):
        if "provenance" in record or record.get("policy") == "dense":
            continue
        try:
            found[record["policy"], record["budget"]].append((record["live_tokens"], record["kl_mean"]))
        except KeyError as missing:
            raise ConfigError(f"{where}: the key {missing} is missing; use a file like {MEASUREMENTS.name}") from None
    if not found:
        raise ConfigError(f"{path} must hold at least one measurement of a policy, got none")
    curves: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for (policy, _), points in found.items():
        live, kl = zip(*points, strict=True)
        curves[policy].append((sum(live) / len(live), sum(kl) / len(kl)))
    return {policy: sorted(points, key=lambda point: point[1]) for policy, points in curves.items()}


def draw(curves: dict[str, list[tuple[float, float]]]) -> Any:
    """Return the matplotlib figure. Each policy is labeled at its point of lowest KL, so that no legend is needed."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    figure = Figure(figsize=(8, 4.6), layout="constrained")
    axes = figure.add_subplot()
    for policy, points in curves.items():
        live, kl = zip(*points, strict=True)
        color, first = COLORS.get(policy, GRAY), policy == "dms"
        axes.plot(live, kl, "o-", color=color, lw=3 if first else 1.4, ms=8 if first else 5, zorder=3 if first else 2)
    for policy, height in spread({policy: points[0][1] for policy, points in curves.items()}).items():
        live, kl = curves[policy][0]
        color, text = COLORS.get(policy, GRAY), LABELS.get(policy, policy)
        line = {"arrowstyle": "-", "color": color, "lw": 0.8, "shrinkA": 1, "shrinkB": 4}
        place = {"xytext": (live * 1.09, height), "va": "center", "fontsize": 11, "color": color}
        axes.annotate(text, (live, kl), arrowprops=line, weight="bold" if policy == "dms" else "normal", **place)
    if "quest" in curves:
        live, kl = curves["quest"][-1]
        axes.annotate("reads 256", (live, kl), xytext=(live * 1.09, kl), va="center", fontsize=11, color=VIOLET)
    axes.set(
        xscale="log",
        yscale="log",
        xlim=(235, 1600),
        ylim=(0.002, 10),
        xlabel="live tokens per KV head after 1024 tokens",
    )
    axes.set_ylabel("mean KL to the dense model, nats per token")
    axes.xaxis.set(major_locator=FixedLocator([256, 512, 1024]), minor_locator=NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda live, _: f"{live:.0f}\n(CR {1024 / live:.0f})"))
    axes.yaxis.set(major_formatter=FuncFormatter(lambda kl, _: f"{kl:g}"), minor_locator=NullLocator())
    axes.grid(axis="y", color=GRAY, alpha=0.25, lw=0.8)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(GRAY)
    axes.tick_params(colors=GRAY, labelsize=11, length=0)
    for label in (axes.xaxis.label, axes.yaxis.label):
        label.set(color=GRAY, fontsize=11)
    return figure


def spread(heights: dict[str, float]) -> dict[str, float]:
    """Return heights for the labels of points at `heights`, at least MIN_GAP decades apart, in the order of the
    points."""
    placed: dict[str, float] = {}
    above = math.inf
    for policy, height in sorted(heights.items(), key=lambda item: -item[1]):
        above = min(math.log10(height), above - MIN_GAP)
        placed[policy] = 10**above
    return placed


if __name__ == "__main__":
    run_command(NAME, main)
