"""The best of n samples, as numbers: what it costs in KL, and what it scores.

  KL(best of n || policy) <= log n - (n-1)/n  nats
  KL(best of n || policy)  = sum over rewards r:  Q(r) log(Q(r) / P(r)),   Q(r) = F(r)^n - F(r-)^n
  E max of n               = sum over k:  C(k-1, n-1) / C(N, n) r_(k),     r_(1) <= ... <= r_(N) of N >= n samples

The first is of arXiv:2009.01325, and arXiv:2401.01879 has that it is a bound; it is reached where answers are many and
no two have the same reward. The second is exact, since among answers of one reward the
best of n is distributed as the policy is; P and F are here the shares among the samples, so that it is an estimate, and
from below where a reward occurs once. The third is the mean over all subsets of n: it has no bias.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import accumulate, pairwise
from math import comb, fsum, log


def kl_bound(n: int) -> float:
    """Nats, of the best of n, whatever policy and reward are."""
    return log(n) - (n - 1) / n


def kl_of_shares(rewards: Sequence[float], n: int) -> float:
    """Nats, where each reward is as frequent as among these."""
    counts = [count for _, count in sorted(Counter(rewards).items())]
    reached = [below / len(rewards) for below in accumulate(counts, initial=0)]
    best = [up**n - down**n for down, up in pairwise(reached)]
    return fsum(q * log(q * len(rewards) / count) for q, count in zip(best, counts, strict=True) if q > 0)


def expected_best(rewards: Sequence[float], n: int) -> float:
    """The mean reward of the best of n, estimated from at least n samples."""
    assert 1 <= n <= len(rewards), (n, len(rewards))
    subsets = comb(len(rewards), n)
    return fsum(comb(k, n - 1) / subsets * reward for k, reward in enumerate(sorted(rewards)))
