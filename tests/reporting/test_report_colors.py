"""Colors of the report: text is readable on all of them, and policies differ without them."""

import numpy as np
import pytest

from dms_jax.reporting.report_colors import (
    DARK,
    FALLBACK_LOOKS,
    INK,
    LEVELS,
    LOOKS,
    VARIABLES,
    kept_color,
    policy_look,
)


@pytest.mark.parametrize("dark", [False, True])
def test_text_is_readable_on_every_color(dark):
    def luminance(color):
        linear = [
            c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4
            for c in (int(color[i : i + 2], 16) / 255 for i in (1, 3, 5))
        ]
        return float(np.dot([0.2126, 0.7152, 0.0722], linear))

    def contrast(one, other):
        high, low = sorted((luminance(one), luminance(other)), reverse=True)
        return (high + 0.05) / (low + 0.05)

    ink = DARK[INK] if dark else INK
    shades = [kept_color(level / LEVELS, dark) for level in range(LEVELS + 1)]
    assert min(contrast(ink, shade) for shade in shades) > 4.5  # WCAG AA
    paper = "#14171a" if dark else "#fffffe"
    assert min(contrast(look.dark if dark else look.color, paper) for look in (*LOOKS.values(), *FALLBACK_LOOKS)) > 2.2
    steps = np.diff([luminance(shade) for shade in shades])
    assert (steps > 0).all() if dark else (steps < 0).all()


def test_looks_of_policies_differ_even_without_color():
    looks = [*LOOKS.values(), *FALLBACK_LOOKS]
    assert (
        len({look.color for look in looks}) == len({look.marker for look in looks}) == len(looks)
        and len(VARIABLES) == len(looks) + 4
    )
    assert len({repr((look.dash, look.width)) for look in looks}) == len(looks), (
        "policies must differ without color, with and without markers"
    )
    assert (
        policy_look("random") == policy_look("random_all")  # an older name
        and policy_look("unheard_of") == policy_look("unheard_of")
        and policy_look("prompt:tova").color == policy_look("tova").color
    )
