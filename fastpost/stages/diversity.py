"""How much a policy's answers differ: what narrows, as it learns from its own.

distinct-n   different n-grams of words over all of them, arXiv:1510.03055
of a group   different answers over all of them
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain
from statistics import fmean


def distinct_n(texts: Iterable[str], n: int) -> float:
    """From near 0, always the same, to 1, none twice; 0 where there is no n-gram."""
    grams = list(chain.from_iterable(_grams(text.split(), n) for text in texts))
    return len(set(grams)) / len(grams) if grams else 0.0


def _grams(words: Sequence[str], n: int) -> list[tuple[str, ...]]:
    return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]


def distinct_answers(groups: Iterable[Sequence[str]]) -> float:
    """The mean over groups; one of N answers that are all the same has 1 / N."""
    return fmean(len(set(texts)) / len(texts) for texts in groups)
