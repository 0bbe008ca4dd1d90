"""Axes: from numbers to places, with ticks at round numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from fastpost.watching.text import count

PAD = 0.05  # of the range, so that a curve does not touch the frame
SAME = 1e-5  # of its height, a range that may be fp32's rounding
NEAR_ZERO = 0.35  # where the lowest value is below this share of the highest, the axis starts at 0


@dataclass(frozen=True)
class Axis:
    low: float
    high: float
    start: float  # pixels
    end: float

    def __call__(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)


def axis(values: Sequence[float], start: float, end: float, *, tight: bool = False) -> Axis:
    """An axis that holds the values; `tight`: without room around them, as for steps."""
    low, high = min(values), max(values)
    if high - low <= SAME * max(abs(low), abs(high)):
        return Axis(min(0.0, 1.5 * low), max(0.0, 1.5 * high) if high or low else 1.0, start, end)
    if tight:
        return Axis(low, high, start, end)
    room = PAD * (high - low)
    floor = 0.0 if 0 <= low < NEAR_ZERO * high else low - room
    ceiling = 0.0 if 0 >= high > NEAR_ZERO * low else high + room
    return Axis(floor, ceiling, start, end)


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Two multiples, or up to `most`, of 1, 2 or 5 times a power of ten, within the range."""
    power = 10.0 ** math.floor(math.log10((high - low) / most))
    step = next(power * base for base in (1, 2, 5, 10, 20) if _number(low, high, power * base) <= most)
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 12 - math.floor(math.log10(step))) for i in range(first, first + _number(low, high, step))]


def labels(at: Sequence[float]) -> list[str]:
    """Two ticks or more in words, with the digits that tell them apart."""
    largest, finest = max(map(abs, at)), _power(at[1] - at[0])
    digits = _power(largest) - finest  # after the first one
    if largest >= 10_000 and digits <= 2:
        return [count(value) for value in at]
    if largest < 1e-3:
        return ["0" if value == 0 else _scientific(value, digits) for value in at]
    return [f"{value:,.{max(0, -finest)}f}" for value in at]


def _power(value: float) -> int:
    """Of ten, that it is at least."""
    return math.floor(math.log10(value) + 1e-9)


def _number(low: float, high: float, step: float) -> int:
    return math.floor(high / step + 1e-9) - math.ceil(low / step - 1e-9) + 1


def _scientific(value: float, digits: int) -> str:
    mantissa, exponent = f"{value:.{digits}e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"
