"""Drawing leaves a notebook as it was: no figure chooses a backend of matplotlib for the process."""

import re
import sys
from pathlib import Path

import matplotlib
import numpy as np
from synthetic_results import records, write

import dms_jax
from dms_jax.reporting.report_page import build
from dms_jax.training.inspection_report import Curve, Inspection, Measured
from dms_jax.training.plots import plot_inspection, plot_kept_fraction, plot_training

STEP = ("loss/distill", "loss/compression", "cache/target_cr", "cache/nominal_cr", "cache/realised_cr")


def test_backend_is_the_same_after_every_plot(tmp_path, monkeypatch):
    monkeypatch.setitem(matplotlib.rcParams, "backend", "svg")  # as inline is in a notebook: not what files need
    monkeypatch.delitem(sys.modules, "matplotlib.pyplot", raising=False)
    plot_training([{"step": step, **dict.fromkeys(STEP, 1.0 + step)} for step in range(3)], tmp_path / "training.png")
    plot_kept_fraction(np.full((2, 3), 20.0), 64, tmp_path / "kept.png")
    one = (1.0, 2.0)
    curve = Curve((2.0, 4.0), *[list(one)] * 4, np.ones((2, 2, 3)))
    points = [Measured(cr, cr, cr * 1e-3, 0.1, 0.01, 1e-3) for cr in (2.0, 4.0)]
    plot_inspection(Inspection("m", 1024, 128, 0, 8, 4, 4096, 2, curve, points), tmp_path / "inspection.png")
    lines = records(length=64, rows=2, repeats=2, layers=2, heads=2, policies=("dms", "tova"))
    report = build([str(write(tmp_path / "r.jsonl", lines))], "A report")
    pictures = [path.read_bytes() for path in tmp_path.glob("*.png")]
    pictures += [content for name, content in report.items() if name.endswith(".png")]
    assert len(pictures) >= 9 and all(picture.startswith(b"\x89PNG") for picture in pictures)
    assert matplotlib.get_backend() == "svg" and "matplotlib.pyplot" not in sys.modules


def test_library_never_loads_pyplot_nor_chooses_a_backend():
    code = re.compile(r"^[^#\n]*(\bpyplot\b|matplotlib\.use\()", re.MULTILINE)
    assert not [path for path in Path(dms_jax.__file__).parent.rglob("*.py") if code.search(path.read_text())]
