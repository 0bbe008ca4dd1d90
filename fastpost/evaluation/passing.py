"""pass@k, the probability that one of k samples is right, of n of which c are. arXiv:2107.03374, equation 1.

  1 - C(n - c, k) / C(n, k)

the share of all subsets of k that hold a right one: unbiased, where 1 - (1 - c/n)^k is too low.
"""

from __future__ import annotations

from math import comb


def pass_at_k(n: int, c: int, k: int) -> float:
    assert 0 <= c <= n and 1 <= k <= n
    return 1 - comb(n - c, k) / comb(n, k)
