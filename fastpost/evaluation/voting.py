"""maj@k, the probability that the most frequent answer of k samples is right (self-consistency, arXiv:2203.11171).

Over all subsets of k of the n samples, exactly: answer a, given c_a times, has j votes in C(c_a, j) ways, so with

  f_j(x, t) = product over the other answers b of sum_{i <= j} C(c_b, i) x^i t^[i = j]

the subsets in which a wins with j votes, tied with m others, are C(c_a, j) [x^(k - j) t^m] f_j, and one of them counts
1 / (1 + m), since ties are broken by lot. A sample without an answer has no vote; nobody wins where none has one.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Hashable, Mapping, Sequence
from fractions import Fraction
from math import comb

Ways = Mapping[tuple[int, int], int]  # (votes of the others, how many of them tie) -> in how many subsets


def _others(counts: Sequence[int], most: int, room: int, silent: int) -> Ways:
    """f_most, up to x^room; of the silent any number may be among them."""
    ways: dict[tuple[int, int], int] = {(i, 0): comb(silent, i) for i in range(min(silent, room) + 1)}
    for count in counts:
        longer: defaultdict[tuple[int, int], int] = defaultdict(int)
        for (taken, ties), number in ways.items():
            for i in range(min(count, most, room - taken) + 1):
                longer[taken + i, ties + (i == most)] += number * comb(count, i)
        ways = longer
    return ways


def wins(counts: Sequence[int], silent: int, k: int) -> list[Fraction]:
    """The probability of each answer to win among k of the samples."""
    n, found = sum(counts) + silent, {}
    assert 1 <= k <= n
    for count in set(counts):  # answers that were given as often have one chance
        rest, won = list(counts), Fraction(0)
        rest.remove(count)
        for votes in range(1, min(count, k) + 1):
            for (taken, ties), number in _others(rest, votes, k - votes, silent).items():
                if taken == k - votes:
                    won += Fraction(comb(count, votes) * number, 1 + ties)
        found[count] = won / comb(n, k)
    return [found[count] for count in counts]


def vote(answers: Sequence[Hashable | None]) -> tuple[Counter[Hashable], int]:
    """How often each answer was given; None is none."""
    given = Counter(answer for answer in answers if answer is not None)
    return given, len(answers) - given.total()


def maj_at_k(
    answers: Sequence[Hashable | None],  # of n samples; None: it has none
    right: Sequence[float],  # of each
    k: int,
) -> float:
    """An answer is as right as its samples are on average, should a verifier see more than the answer."""
    given, silent = vote(answers)
    score: defaultdict[Hashable, float] = defaultdict(float)
    for answer, value in zip(answers, right, strict=True):
        if answer is not None:
            score[answer] += value / given[answer]
    odds = wins(list(given.values()), silent, k)
    return sum(float(p) * score[answer] for answer, p in zip(given, odds, strict=True))


def share(answers: Sequence[Hashable | None]) -> float:
    """What part of all samples gave the most frequent answer: how confident the vote is."""
    given, _ = vote(answers)
    return max(given.values(), default=0) / len(answers)
