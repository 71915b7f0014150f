"""Colors and line styles of a report. A policy looks the same in every figure. No two policies differ by hue alone, so
that colorblind readers can tell them apart."""

import zlib
from typing import Any, NamedTuple

import numpy as np


class Look(NamedTuple):
    """How one policy is drawn."""

    color: str  # on the light page, and in PNGs
    dark: str  # on the dark page
    dash: Any  # matplotlib's line style
    marker: str
    first: bool = False  # emphasized: DMS

    @property
    def width(self) -> float:
        return 2.6 if self.first else 1.4


INK, MUTED, RULE, PAPER = "#1b1f24", "#5c6570", "#dfe3e8", "#fffffe"
DARK = {INK: "#e8eaed", MUTED: "#9aa4af", RULE: "#30363d", PAPER: "#14171a"}
LOOKS = {  # after Okabe and Ito (2008)
    "dms": Look("#d55e00", "#ff8a3d", "-", "o", first=True),
    "dms_budget": Look("#a8321a", "#ffb08a", (0, (10, 1.5)), "x"),
    "dense": Look("#1b1f25", "#e8eaec", ":", "D"),
    "streaming_llm": Look("#0072b2", "#4aa8e0", "--", "s"),
    "tova": Look("#009e73", "#2fc99c", "-", "^"),
    "h2o": Look("#b0528a", "#e39bc4", "-.", "v"),
    "snapkv": Look("#3f9fd8", "#86cdf7", (0, (8, 2)), "P"),
    "knorm": Look("#8f7d00", "#e0d04c", (0, (3, 1.2)), "X"),
    "keydiff": Look("#8a5a2c", "#cf9f70", (0, (6, 2, 2, 2)), "<"),
    "quest": Look("#5a40b0", "#a892f2", (0, (5, 1, 1, 1, 1, 1)), "p"),
    "observed_attention": Look("#c0395b", "#ff86a4", (0, (2, 1)), ">"),
    "random_all": Look("#8b929c", "#a3abb5", (0, (1, 1)), "d"),
    "random_attention": Look("#6d5f8a", "#b3a5d1", (0, (2, 2, 6, 2)), "1"),
    "vase": Look("#2f7d4f", "#6fc48f", (0, (7, 2, 1, 2)), "2"),
    "dropkv": Look("#a0452e", "#f08a70", (0, (3, 1, 3, 3)), "3"),
    "expected_attention": Look("#1f6391", "#62add9", (0, (9, 2, 2, 2)), "+"),
    "immediate_eviction": Look("#e09a00", "#f2bd42", (0, (4, 2)), "h"),
}
FORMER_NAMES = {"random": "random_all"}  # of policies, in files of results
FALLBACK_LOOKS = (  # for policies that are not in LOOKS
    Look("#117a8c", "#4fc0d4", (0, (6, 2)), "*"),
    Look("#556b2e", "#a9c46e", (0, (3, 1, 1, 1)), "8"),
    Look("#7a3b4e", "#cf8ea2", (0, (1, 2)), "H"),
)
# Color -> the CSS variable that replaces it in the SVGs of the page, so that they follow the light or dark theme.
VARIABLES = {INK: "ink", MUTED: "muted", RULE: "rule", PAPER: "paper"} | {
    look.color: f"p{index}" for index, look in enumerate([*LOOKS.values(), *FALLBACK_LOOKS])
}

LEVELS = 20  # shades for the fraction of heads that keep a token
# On the light and on the dark page; INK is readable on every shade between the two.
EVICTED, KEPT = ("#ffffff", "#15181b"), ("#f39a4a", "#a2530a")


def policy_look(policy: str) -> Look:
    """Return the look of a policy. A name that is not in LOOKS always gets the same fallback. With a prefix, as in
    "prompt:tova", "adakv:h2o" or both, a policy looks the same, but dotted."""
    plain = policy.rpartition(":")[2]
    name = FORMER_NAMES.get(plain, plain)
    look = LOOKS.get(name) or FALLBACK_LOOKS[zlib.crc32(name.encode()) % len(FALLBACK_LOOKS)]
    return look if plain == policy else look._replace(dash=(0, (1, 1.5)), first=False)


def css_variable(policy: str) -> str:
    return VARIABLES[policy_look(policy).color]


def kept_level(fraction: float) -> int:
    """Return the shade, from 0 to LEVELS, of a fraction of heads; nan counts as 0."""
    return round(LEVELS * min(max(float(np.nan_to_num(fraction)), 0.0), 1.0))


def kept_color(fraction: float, dark: bool = False) -> str:
    low, high = (np.array([int(color[dark][i : i + 2], 16) for i in (1, 3, 5)]) for color in (EVICTED, KEPT))
    mixed = low + kept_level(fraction) / LEVELS * (high - low)
    return "#" + "".join(f"{round(value):02x}" for value in mixed)


def css_values(dark: bool) -> dict[str, str]:
    """Return CSS variable -> color, for the light or for the dark page."""
    values = {VARIABLES[color]: DARK[color] if dark else color for color in DARK}
    values |= {VARIABLES[look.color]: look.dark if dark else look.color for look in (*LOOKS.values(), *FALLBACK_LOOKS)}
    return values | {f"k{level}": kept_color(level / LEVELS, dark) for level in range(LEVELS + 1)}
