"""Colours of a report. A policy has one look in all figures; no two differ by hue alone, so none is lost to colour blindness."""

import zlib
from typing import Any, NamedTuple

import numpy as np


class Look(NamedTuple):
    color: str  # on white, the name of the variable in VARIABLES
    dark: str  # on the dark page
    dash: Any
    marker: str
    first: bool = False  # DMS

    @property
    def width(self) -> float:
        return 2.6 if self.first else 1.4


INK, MUTED, RULE, PAPER = "#1b1f24", "#5c6570", "#dfe3e8", "#fffffe"
DARK = {INK: "#e8eaed", MUTED: "#9aa4af", RULE: "#30363d", PAPER: "#14171a"}
LOOKS = {  # after Okabe and Ito (2008)
    "dms": Look("#d55e00", "#ff8a3d", "-", "o", first=True),
    "dense": Look("#1b1f25", "#e8eaec", ":", "D"),
    "streaming_llm": Look("#0072b2", "#4aa8e0", "--", "s"),
    "tova": Look("#009e73", "#2fc99c", "-", "^"),
    "h2o": Look("#b0528a", "#e39bc4", "-.", "v"),
    "snapkv": Look("#3f9fd8", "#86cdf7", (0, (8, 2)), "P"),
    "knorm": Look("#8f7d00", "#e0d04c", (0, (3, 1.2)), "X"),
    "keydiff": Look("#8a5a2c", "#cf9f70", (0, (6, 2, 2, 2)), "<"),
    "quest": Look("#5a40b0", "#a892f2", (0, (5, 1, 1, 1, 1, 1)), "p"),
    "observed_attention": Look("#c0395b", "#ff86a4", (0, (2, 1)), ">"),
    "random": Look("#8b929c", "#a3abb5", (0, (1, 1)), "d"),
    "immediate_eviction": Look("#e09a00", "#f2bd42", (0, (4, 2)), "h"),
}
SPARE = (
    Look("#117a8c", "#4fc0d4", (0, (6, 2)), "*"),
    Look("#556b2e", "#a9c46e", (0, (3, 1, 1, 1)), "8"),
    Look("#7a3b4e", "#cf8ea2", (0, (1, 2)), "H"),
)
VARIABLES = {INK: "ink", MUTED: "muted", RULE: "rule", PAPER: "paper"} | {
    look.color: f"p{index}" for index, look in enumerate([*LOOKS.values(), *SPARE])
}

LEVELS = 20  # steps of the kept fraction
FORGOTTEN, KEPT = (
    ("#ffffff", "#15181b"),
    ("#f39a4a", "#a2530a"),
)  # light, dark: INK is readable on all that lies between


def policy_look(policy: str) -> Look:
    """An unknown policy has a look of its own name, the same in each report. "prompt:tova" looks like "tova", dotted."""
    name = policy.removeprefix("prompt:")
    look = LOOKS.get(name) or SPARE[zlib.crc32(name.encode()) % len(SPARE)]
    return look if name == policy else look._replace(dash=(0, (1, 1.5)), first=False)


def kept_level(fraction: float) -> int:
    return int(round(LEVELS * min(max(float(fraction) if fraction == fraction else 0.0, 0.0), 1.0)))


def kept_color(fraction: float, dark: bool = False) -> str:
    """Even in OKLab (Ottosson 2020): equal steps of the fraction look equally large."""
    share = kept_level(fraction) / LEVELS
    low, high = _oklab(FORGOTTEN[dark]), _oklab(KEPT[dark])
    return _hex(low + share * (high - low))


def variables(dark: bool) -> str:
    """CSS custom properties of the page in light or dark."""
    values = {VARIABLES[color]: DARK[color] if dark else color for color in DARK}
    values |= {VARIABLES[look.color]: look.dark if dark else look.color for look in (*LOOKS.values(), *SPARE)}
    values |= {f"k{level}": kept_color(level / LEVELS, dark) for level in range(LEVELS + 1)}
    return " ".join(f"--{name}: {value};" for name, value in values.items())


_TO_CONES = np.array(
    [
        [0.4122214708, 0.5363325363, 0.0514459929],
        [0.2119034982, 0.6806995451, 0.1073969566],
        [0.0883024619, 0.2817188376, 0.6299787005],
    ]
)
_TO_LAB = np.array(
    [
        [0.2104542553, 0.7936177850, -0.0040720468],
        [1.9779984951, -2.4285922050, 0.4505937099],
        [0.0259040371, 0.7827717662, -0.8086757660],
    ]
)


def _oklab(color: str) -> np.ndarray:
    rgb = np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    return _TO_LAB @ np.cbrt(_TO_CONES @ linear)


def _hex(lab: np.ndarray) -> str:
    linear = np.clip(np.linalg.solve(_TO_CONES, np.linalg.solve(_TO_LAB, lab) ** 3), 0, 1)
    rgb = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    return "#" + "".join(f"{round(255 * value):02x}" for value in rgb)
