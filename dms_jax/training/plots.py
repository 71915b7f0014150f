"""The two plots of a run: losses and compression over steps, and the kept fraction by layer and head."""

from pathlib import Path

import numpy as np

from dms_jax.files import replacing


def plot_training(steps: list[dict], path: Path) -> None:
    """Plot losses (left) and target, nominal and realised compression ratio (right) over optimizer steps."""
    plt = _pyplot()
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
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
    plt = _pyplot()
    layers, heads = live_per_head.shape
    figure, axes = plt.subplots(
        figsize=(max(4.5, 1.5 + 0.4 * heads), max(3.0, 1.2 + 0.2 * layers)), layout="constrained"
    )
    image = axes.imshow(live_per_head / length, vmin=0, vmax=1, aspect="auto", cmap="viridis")
    axes.set(
        xlabel="KV head",
        ylabel="layer",
        xticks=range(heads),
        title=f"Kept fraction of {length} tokens\nrealised CR {length / live_per_head.mean():.2f}",
    )
    figure.colorbar(image)
    _write(figure, path)


def _write(figure, path: Path) -> None:
    with replacing(path) as file:
        figure.savefig(file, format="png", dpi=120)
    _pyplot().close(figure)


def _pyplot():
    import matplotlib

    matplotlib.use("Agg")  # works without a screen
    import matplotlib.pyplot as plt

    return plt
