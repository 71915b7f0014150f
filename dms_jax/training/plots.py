"""The two plots of a run: losses and compression over steps, and the kept fraction by layer and head. Also the picture
of an inspection, which has the costs of ratios in place of losses.
"""

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure  # not pyplot, which would choose a backend for the whole process

from dms_jax.files import replacing
from dms_jax.training.inspection_report import TOLERATED_KL, Inspection


def plot_training(steps: list[dict], path: Path) -> None:
    """Plot losses (left) and target, nominal and realised compression ratio (right) over optimizer steps."""
    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    x = [line["step"] for line in steps]
    for key, label in (
        ("loss/distill", "distillation, KL in nats per token"),
        ("loss/compression", "compression, missing evict fraction"),
    ):
        left.plot(x, [line[key] for line in steps], label=label)
    left.set(xlabel="step", title="Losses")
    left.set_yscale("symlog", linthresh=1e-3)
    for key, label in (
        ("cache/target_cr", "target (nominal)"),
        ("cache/nominal_cr", "nominal"),
        ("cache/realised_cr", "realised in the row"),
    ):
        right.plot(x, [line[key] for line in steps], label=label)
    right.set(xlabel="step", title="Compression ratio (training, with noise)", ylim=(0.9, None))
    for axes in (left, right):
        axes.legend()
        axes.grid(alpha=0.3)
    _write(figure, path)


def plot_kept_fraction(live_per_head: np.ndarray, length: int, path: Path) -> None:
    """Plot the fraction of pairs that are live after a held-out row of `length` tokens.

    `live_per_head` [L K]: mean live pairs.
    """
    figure = Figure(figsize=_heads_size(live_per_head), layout="constrained")
    axes = figure.subplots()
    title = f"Kept fraction of {length} tokens\nrealised CR {length / live_per_head.mean():.2f}"
    _draw_heads(axes, live_per_head / length, title)
    _write(figure, path)


def plot_inspection(inspection: Inspection, path: Path) -> None:
    """Plot proxies and KL over the compression ratio (left), and the fraction that each head keeps (right)."""
    curve, index = inspection.curve, inspection.shown_ratio()
    width, height = _heads_size(curve.kept[index])
    figure = Figure(figsize=(6.5 + width, max(4.0, height)), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(6.5, width))
    for values, label in (
        (curve.common, "one threshold"),
        (curve.equal, "equal budgets"),
        (curve.oracle, "oracle"),
        (curve.other_shift, f"decision_shift {1 - inspection.decision_shift}"),
    ):
        left.plot(curve.ratios, values, "--", marker=".", label=f"proxy, {label}")
    left.plot(curve.ratios, inspection.estimated, "k-", label="KL, estimated")
    left.plot([m.cr for m in inspection.measured], [m.kl for m in inspection.measured], "ko", label="KL, measured")
    left.axhline(TOLERATED_KL, color="gray", linewidth=1)
    left.set(xlabel="realised compression ratio", ylabel="nats per token", title="Before training", yscale="log")
    left.grid(alpha=0.3)
    left.legend()
    _draw_heads(right, curve.kept[index], f"Kept fraction\nrealised CR {curve.ratios[index]:g}")
    _write(figure, path)


def _heads_size(kept: np.ndarray) -> tuple[float, float]:
    """Return the size in inches of a picture of the heads [L K]."""
    layers, heads = kept.shape
    return max(4.5, 1.5 + 0.4 * heads), max(3.0, 1.2 + 0.2 * layers)


def _draw_heads(axes, kept: np.ndarray, title: str) -> None:
    image = axes.imshow(kept, vmin=0, vmax=1, aspect="auto", cmap="viridis")
    axes.set(xlabel="KV head", ylabel="layer", xticks=range(kept.shape[1]), title=title)
    axes.figure.colorbar(image)


def _write(figure: Figure, path: Path) -> None:
    with replacing(path) as file:
        figure.savefig(file, format="png", dpi=120)
