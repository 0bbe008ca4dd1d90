"""How the cost grows with T and with V: a straight line through the seconds of a sweep.

y = intercept + slope x by least squares; R^2 is the share of the variance of y that it explains, and `worst` the
largest distance of a measurement from the line, relative to the line. Nothing in the head is superlinear, so the line
must be straight; and memory must be flat, but for what has the size of a result.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from measurement import Measurement

Axis = Literal["tokens", "vocab"]
AXES: tuple[Axis, ...] = ("tokens", "vocab")
FEWEST = 3  # points that can show a bend


@dataclass(frozen=True)
class Line:
    slope: float
    intercept: float
    r_squared: float
    worst: float

    def at(self, x: float) -> float:
        return self.intercept + self.slope * x


def fit(xs: Sequence[float], ys: Sequence[float]) -> Line:
    slope, intercept = statistics.linear_regression(xs, ys)
    fitted, mean = [intercept + slope * x for x in xs], statistics.fmean(ys)
    left = [y - f for y, f in zip(ys, fitted, strict=True)]
    spread = sum((y - mean) ** 2 for y in ys)
    worst = max(abs(e) / abs(f) if f else 0.0 for e, f in zip(left, fitted, strict=True))
    return Line(slope, intercept, 1 - sum(e * e for e in left) / spread if spread else 1.0, worst)


@dataclass(frozen=True)
class Growth:
    """What a provider takes for a case, along one axis through the middle of the sweep."""

    case: str
    provider: str
    axis: Axis
    measurements: tuple[Measurement, ...]  # timed, ascending along the axis

    @property
    def sizes(self) -> list[float]:
        return [getattr(m.setup, self.axis) for m in self.measurements]

    @property
    def seconds(self) -> list[float]:
        return [m.seconds for m in self.measurements if m.seconds is not None]

    @property
    def line(self) -> Line:
        return fit(self.sizes, self.seconds)


def growths(measurements: Sequence[Measurement]) -> list[Growth]:
    """One for each case, provider and axis that has enough points."""
    found = []
    for axis in AXES:
        along = [m for m in _through_the_middle(measurements, axis) if m.seconds]
        for key in dict.fromkeys((m.case, m.provider) for m in along):
            of = [m for m in along if (m.case, m.provider) == key]
            if len(of) >= FEWEST:
                found.append(Growth(*key, axis, tuple(sorted(of, key=lambda m: getattr(m.setup, axis)))))
    return found


def _through_the_middle(measurements: Sequence[Measurement], axis: Axis) -> list[Measurement]:
    """Those in which all but the axis is as in most of them."""
    others = {"tokens", "hidden", "vocab", "dtype"} - {axis}
    middle = {name: statistics.mode(getattr(m.setup, name) for m in measurements) for name in others}
    return [m for m in measurements if all(getattr(m.setup, name) == value for name, value in middle.items())]
