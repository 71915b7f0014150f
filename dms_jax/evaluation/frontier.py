"""Pareto frontiers of accuracy over cost, and the distance between two of them.

The paper (arXiv:2506.05345) states no rule, so we use our own. The frontier of a policy is the set of its points whose
accuracy no cheaper point equals or exceeds. Between two points of a frontier, accuracy is linear in the logarithm of
the cost. The gap between two policies is the difference of their frontiers, averaged over the logarithm of the cost, in
the range of costs that both cover. If they cover no common range, there is no gap.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Point(NamedTuple):
    cost: float  # > 0
    accuracy: float
    name: str = ""


class Gap(NamedTuple):
    mean: float  # accuracy of the first policy minus that of the second
    low: float  # the common range of costs
    high: float


def frontier(points: Sequence[Point]) -> list[Point]:
    """Return the points whose accuracy no cheaper point equals or exceeds, by increasing cost."""
    kept: list[Point] = []
    for point in sorted(points, key=lambda p: (p.cost, -p.accuracy)):
        if not kept or point.accuracy > kept[-1].accuracy:
            kept.append(point)
    return kept


def gap(one: Sequence[Point], other: Sequence[Point]) -> Gap | None:
    """Return by how much the frontier of `one` is more accurate than that of `other`; None without a common cost.

    A single common cost counts as a range of width 0.
    """
    a, b = frontier(one), frontier(other)
    if not a or not b:
        return None
    # Cost beyond the last point of a frontier gains nothing, so the frontier stays level up to the most expensive
    # point.
    low, high = max(a[0].cost, b[0].cost), min(max(p.cost for p in one), max(p.cost for p in other))
    if low > high:
        return None
    if low == high:
        return Gap(float(_at(a, np.log(low)) - _at(b, np.log(low))), low, high)
    knots = np.log([low, high, *(p.cost for p in (*a, *b) if low < p.cost < high)])
    x = np.unique(knots)
    difference = _at(a, x) - _at(b, x)  # linear between knots, so the trapezoid is exact
    return Gap(float(np.trapezoid(difference, x) / (x[-1] - x[0])), low, high)


def _at(points: list[Point], log_cost):
    return np.interp(log_cost, np.log([p.cost for p in points]), [p.accuracy for p in points])
