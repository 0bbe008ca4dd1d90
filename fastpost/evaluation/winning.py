"""How often one model's answers beat another's, and how often they would if both were as long.

Judges and learned rewards prefer long answers. AlpacaEval 2 (arXiv:2404.04475) regresses the preference on the length:

  P(second wins) = s(theta + phi tanh((l_2 - l_1) / std)),  and the length-controlled win rate is s(theta)

Its term for the difficulty of each instruction needs many models, and is none of two. phi has the prior N(0, 1), as its
length is standardised, and theta N(0, 10^2), so that both stay finite where one model wins always.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastpost.evaluation.intervals import Confidence, Estimate, mean
from fastpost.evaluation.logistic import fit

RIDGE = (0.01, 1.0)  # 1 / variance, of theta and phi


@dataclass(frozen=True)
class WinRate:
    """Of the second model over the first; a tie is half a win."""

    plain: Estimate
    length_controlled: Estimate
    longer_by: float  # tokens, second - first, on average


def preference(first: float, second: float) -> float:
    """1 where the second is better, 1/2 for a tie."""
    return 0.5 if first == second else float(second > first)


def win_rate(
    wins: Sequence[float],  # of each prompt: how far the second model is preferred, 0 to 1
    first_lengths: Sequence[int],
    second_lengths: Sequence[int],
    how: Confidence,
) -> WinRate:
    won, n = torch.tensor(wins, dtype=torch.float64), len(wins)
    longer = torch.tensor(second_lengths, dtype=torch.float64) - torch.tensor(first_lengths, dtype=torch.float64)
    x = torch.stack([torch.ones_like(won), _standardised(longer)], 1)
    ridge = torch.tensor(RIDGE, dtype=torch.float64)
    at_equal_length = torch.sigmoid(fit(x, won, torch.ones(1, n, dtype=torch.float64), ridge)[0, 0])
    resampled = torch.cat([torch.sigmoid(fit(x, won, counts, ridge)[:, 0]) for counts in how.drawn(n)])
    controlled = Estimate(float(at_equal_length), *how.within(resampled), n)
    return WinRate(mean(wins, how), controlled, float(longer.mean()))


def _standardised(longer: Tensor) -> Tensor:
    """In [-1, 1]. Where all differences are one, which leaves no way to tell length from quality, the limit of tanh."""
    spread = longer.std(correction=0)
    return torch.tanh(longer / spread) if spread > 0 else longer.sign()
