"""An estimate over prompts with its confidence interval.

  proportion  k of n: the score interval (Wilson 1927), which holds at k = 0 and k = n, where p +- z s has no width
  mean        of a number a prompt: percentiles of its bootstrap over prompts (Efron 1979)

Samples of one prompt are no independent evidence: whatever is known of them is one number before it comes here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import torch
from torch import Tensor

BLOCK = 2**22  # counts held at a time


@dataclass(frozen=True)
class Estimate:
    """A number, the interval that holds it with the confidence asked for, and of how many prompts it is."""

    value: float
    low: float
    high: float
    n: int


@dataclass(frozen=True)
class Confidence:
    """How intervals are made."""

    level: float = 0.95
    resamples: int = 2000
    seed: int = 0

    def drawn(self, n: int) -> Iterator[Tensor]:  # (b, n) float64
        """How often each of n prompts is in each resample of n, a block of resamples at a time."""
        generator = torch.Generator().manual_seed(self.seed)
        size = max(1, BLOCK // n)
        for first in range(0, self.resamples, size):
            rows = min(size, self.resamples - first)
            places = torch.randint(n, (rows, n), generator=generator)
            yield torch.zeros(rows, n, dtype=torch.float64).scatter_add_(1, places, places.new_ones(rows, n).double())

    def within(self, resampled: Tensor) -> tuple[float, float]:  # (B,)
        """The percentiles that leave out as much below as above."""
        tail = (1 - self.level) / 2
        low, high = torch.quantile(resampled, torch.tensor([tail, 1 - tail], dtype=resampled.dtype)).tolist()
        return low, high


def resampled_means(values: Tensor, how: Confidence) -> Tensor:  # (n,) float64 -> (B,)
    """The mean of each resample of the prompts."""
    return torch.cat([counts @ values / len(values) for counts in how.drawn(len(values))])


def proportion(k: float, n: int, how: Confidence) -> Estimate:
    """k of n that are independent; a half counts as one half."""
    assert 0 <= k <= n and n > 0
    z, p = NormalDist().inv_cdf(0.5 + how.level / 2), k / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return Estimate(p, min(p, max(0.0, centre - half)), max(p, min(1.0, centre + half)), n)


def mean(values: Sequence[float], how: Confidence) -> Estimate:
    """Of a number a prompt."""
    found = torch.tensor(values, dtype=torch.float64)
    return Estimate(float(found.mean()), *how.within(resampled_means(found, how)), len(values))
