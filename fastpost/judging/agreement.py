"""How far a judge agrees with labels: accuracy, and Cohen's kappa, which takes off what two would agree on by chance.

  kappa = (p_o - p_e) / (1 - p_e),  p_o = sum_i p_ii,  p_e = sum_i p_i. p_.i
  n var = (sum_i p_ii (1 - (p_i. + p_.i)(1 - kappa))^2 + (1 - kappa)^2 sum_{i!=j} p_ij (p_.i + p_j.)^2
           - (kappa - p_e (1 - kappa))^2) / (1 - p_e)^2

Cohen 1960, doi:10.1177/001316446002000104; the large-sample variance is that of Fleiss, Cohen and Everitt 1969,
doi:10.1037/h0028106. Which of two answers is named first is drawn by a coin where labels would else all be one.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Number:
    """An estimate of n pairs, and its standard error."""

    value: float
    se: float
    n: int


def share(hits: Sequence[float]) -> Number | None:
    """Of numbers in [0, 1]: their mean. None of none."""
    n = len(hits)
    if not n:
        return None
    value = sum(hits) / n
    return Number(value, math.sqrt(sum((hit - value) ** 2 for hit in hits) / n / n), n)


def accuracy(judged: Sequence[Hashable], labels: Sequence[Hashable]) -> Number | None:
    """How often the two are the same."""
    return share([float(one == other) for one, other in zip(judged, labels, strict=True)])


def kappa(judged: Sequence[Hashable], labels: Sequence[Hashable]) -> Number | None:
    """Cohen's; None where chance alone would have them agree always, or there are none."""
    n = len(judged)
    kinds = list(dict.fromkeys([*judged, *labels]))
    together = Counter(zip(judged, labels, strict=True))
    p = [[together[one, other] / n for other in kinds] for one in kinds]
    rows, columns = [sum(row) for row in p], [sum(column) for column in zip(*p, strict=True)]
    chance = sum(a * b for a, b in zip(rows, columns, strict=True))
    if len(kinds) < 2 or math.isclose(chance, 1.0):
        return None
    every = range(len(kinds))
    value = (sum(p[i][i] for i in every) - chance) / (1 - chance)
    same = sum(p[i][i] * (1 - (rows[i] + columns[i]) * (1 - value)) ** 2 for i in every)
    apart = sum(p[i][j] * (columns[i] + rows[j]) ** 2 for i in every for j in every if i != j)
    variance = same + (1 - value) ** 2 * apart - (value - chance * (1 - value)) ** 2
    return Number(value, math.sqrt(max(variance, 0.0) / n) / (1 - chance), n)
