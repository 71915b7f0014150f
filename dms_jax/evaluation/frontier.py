"""Pareto frontiers of accuracy over cost, and the distance between two of them.

The paper (arXiv:2506.05345) states no rule, so this is ours. The frontier of a method is the set of its points that no
cheaper point of it equals or beats. Between two of them accuracy is linear in the logarithm of the cost. The gap
between two methods is the difference of their frontiers, averaged over the logarithm of the cost, where both exist.
Without a common range of costs there is no gap.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Point(NamedTuple):
    cost: float  # > 0
    accuracy: float
    name: str = ""


class Gap(NamedTuple):
    mean: float  # accuracy of the first method minus that of the second
    low: float  # the common range of costs
    high: float


def frontier(points: Sequence[Point]) -> list[Point]:
    """The points that nothing cheaper equals or beats, by increasing cost."""
    kept: list[Point] = []
    for point in sorted(points, key=lambda p: (p.cost, -p.accuracy)):
        if not kept or point.accuracy > kept[-1].accuracy:
            kept.append(point)
    return kept


def gap(one: Sequence[Point], other: Sequence[Point]) -> Gap | None:
    """How much more accurate the frontier of `one` is than that of `other`. A single common cost is a range of width
    0."""
    a, b = frontier(one), frontier(other)
    if not a or not b:
        return None
    # Beyond its last point more cost gains nothing, so a frontier continues, level, to the method's most expensive point.
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
