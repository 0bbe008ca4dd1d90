"""Lines of metrics.jsonl as curves, and what is asked of a curve: its level, its trend, whether another follows it.

A line lacks what was not measured in its steps, and has null where a mean came out as no number. Only finite numbers
are points of a curve.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, variance
from typing import Any, TypeAlias, TypeGuard

Line: TypeAlias = Mapping[str, Any]
Points: TypeAlias = list[tuple[float, float]]  # (step, value), steps rising
Found: TypeAlias = tuple[float, str] | None  # of a check: since which step, and a sentence


def is_number(value: object) -> TypeGuard[float]:
    """Whether it can be drawn: finite, and not a bool."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def curve(lines: Sequence[Line], *names: str) -> Points:
    """The first of these metrics that a run has."""
    for name in names:
        points = [(line["step"], float(line[name])) for line in lines if is_number(line.get(name))]
        if points:
            return points
    return []


@dataclass(frozen=True)
class Run:
    """What a check is given."""

    lines: Sequence[Line]
    verb: str = ""
    target_kl: float | None = None  # nats a completion

    def __call__(self, *names: str) -> Points:
        return curve(self.lines, *names)


def joined(x: Points, y: Points) -> list[tuple[float, float, float]]:
    """(step, value of x, value of y) where both have one."""
    at = dict(x)
    return [(step, at[step], value) for step, value in y if step in at]


def recent(points: Points, span: int) -> float:
    """The mean of the last `span` values."""
    return fmean(value for _, value in points[-span:])


def sustained(points: Points, test: Callable[[float], bool], span: int) -> tuple[float, float] | None:
    """(step, mean) of the first `span` neighbours whose mean passes the test; a single outlier is no finding."""
    values = [value for _, value in points]
    for end in range(span, len(points) + 1):
        mean = sum(values[end - span : end]) / span
        if test(mean):
            return points[end - 1][0], mean
    return None


@dataclass(frozen=True)
class Trend:
    """From the first quarter of a curve to the last one."""

    first: float
    last: float
    errors: float  # last - first, in standard errors of it


def trend(points: Points, least: int = 12) -> Trend | None:
    """None where there are too few points to tell it from noise."""
    if len(points) < least:
        return None
    values = [value for _, value in points]
    size = len(values) // 4
    head, tail = values[:size], values[-size:]
    error = math.sqrt((variance(head) + variance(tail)) / size)
    rise = fmean(tail) - fmean(head)
    return Trend(fmean(head), fmean(tail), rise / error if error else math.copysign(math.inf, rise) if rise else 0.0)


def correlation(x: Sequence[float], y: Sequence[float]) -> float:
    """Pearson's; 0 where one of them is constant."""
    mean_x, mean_y = fmean(x), fmean(y)
    xx = sum((a - mean_x) ** 2 for a in x)
    yy = sum((b - mean_y) ** 2 for b in y)
    xy = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return xy / math.sqrt(xx * yy) if xx > 0 and yy > 0 else 0.0


def smoothed(points: Points, share: float = 0.04) -> Points:
    """An exponential mean whose memory is a share of the curve, taken from both ends so that it does not lag; a short
    curve is left alone."""
    keep = 1 - 1 / max(1.0, share * len(points))
    values = [value for _, value in points]
    there, back = _remembered(values, keep), _remembered(values[::-1], keep)[::-1]
    return [(step, (a + b) / 2) for (step, _), a, b in zip(points, there, back, strict=True)]


def _remembered(values: Sequence[float], keep: float) -> list[float]:
    """At each place, the mean of what came so far; the weight of a value shrinks by `keep` a place."""
    total, weight, means = 0.0, 0.0, []
    for value in values:
        total, weight = keep * total + value, keep * weight + 1
        means.append(total / weight)
    return means
