"""Whether answers given with confidence c are right with probability c.

ECE = sum over bins of share x |accuracy - mean confidence|     (arXiv:1706.04599; bins of equal width)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Bin:
    """The answers whose confidence is within it."""

    low: float
    high: float
    count: int
    confidence: float  # mean; of an empty one the middle
    accuracy: float | None  # None: it is empty


@dataclass(frozen=True)
class Calibration:
    ece: float
    bins: list[Bin]


def calibration(confidences: Sequence[float], right: Sequence[float], bins: int) -> Calibration:
    """Bins are (low, high], the first with its lower end."""
    held: list[list[tuple[float, float]]] = [[] for _ in range(bins)]
    edges = [i / bins for i in range(bins + 1)]
    for confidence, value in zip(confidences, right, strict=True):
        assert 0 <= confidence <= 1
        held[next(i for i in range(bins) if confidence <= edges[i + 1])].append((confidence, value))
    made = [_bin(edges[i], edges[i + 1], each) for i, each in enumerate(held)]
    gaps = [b.count * abs(b.accuracy - b.confidence) for b in made if b.accuracy is not None]
    return Calibration(sum(gaps) / len(confidences), made)


def _bin(low: float, high: float, held: list[tuple[float, float]]) -> Bin:
    if not held:
        return Bin(low, high, 0, (low + high) / 2, None)
    confidences, right = zip(*held, strict=True)
    return Bin(low, high, len(held), sum(confidences) / len(held), sum(right) / len(held))
