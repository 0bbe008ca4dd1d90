"""Whether two models differ on the same prompts, and not by chance.

McNemar    right or wrong: of the b + c prompts on which they differ, each is right alone with probability 1/2, so
           p = min(1, 2 P[X <= min(b, c)]), X ~ Binomial(b + c, 1/2): exact, at any number of prompts
bootstrap  any number a prompt: how often the mean difference of resampled prompts is as far from the one that was
           found as that is from 0; (1 + so many) / (1 + resamples), since the sample itself is one. Few prompts that
           differ by much the same have resamples that hardly vary, so p is never below 2^(1 - m), the chance that m
           prompts which differ do so in one direction: a single one proves nothing
Holm       of m tests the i-th smallest p (from 0) counts (m - i) times: the chance of a single false alarm stays
           what it is for one test (Holm 1979)
"""

from __future__ import annotations

from collections.abc import Sequence
from math import comb

import torch

from fastpost.evaluation.intervals import Confidence, Estimate, resampled_means


def mcnemar(first: Sequence[bool], second: Sequence[bool]) -> float:
    """p of what two models have right."""
    b = sum(x and not y for x, y in zip(first, second, strict=True))
    c = sum(y and not x for x, y in zip(first, second, strict=True))
    tail = sum(comb(b + c, i) for i in range(min(b, c) + 1))
    return min(1.0, 2 * tail / 2 ** (b + c))


def paired_bootstrap(first: Sequence[float], second: Sequence[float], how: Confidence) -> tuple[Estimate, float]:
    """The mean of second - first, with its interval, and p."""
    apart = torch.tensor(second, dtype=torch.float64) - torch.tensor(first, dtype=torch.float64)
    found, means = float(apart.mean()), resampled_means(apart, how)
    as_far = int(((means - found).abs() >= abs(found)).sum())
    one_way = min(1.0, 2.0 ** (1 - int(apart.count_nonzero())))
    return Estimate(found, *how.within(means), len(apart)), max(one_way, (1 + as_far) / (1 + how.resamples))


def holm(p: Sequence[float]) -> list[float]:
    """Each p as it counts among all of them."""
    order, adjusted, highest = sorted(range(len(p)), key=lambda i: p[i]), [0.0] * len(p), 0.0
    for place, i in enumerate(order):
        highest = max(highest, min(1.0, (len(p) - place) * p[i]))
        adjusted[i] = highest
    return adjusted
