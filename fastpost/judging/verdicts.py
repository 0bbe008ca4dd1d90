"""What comes of a judge's answers: a preference between two, or a score of one."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from fastpost.judging.asking import Reply
from fastpost.judging.wording import FIRST, TIE, Request, verdict_at

Winner = Literal["first", "tie", "second"]
UNDECIDED = "has no verdict"


@dataclass(frozen=True)
class Vote:
    """One answer of a judge."""

    options: Mapping[str, float] | None  # probability of each; None: it gave no verdict
    error: str | None = None  # why


@dataclass(frozen=True)
class Preference:
    """What a judge thinks of two answers."""

    p: float | None  # that the first is better, a tie counts half; None: not in every order that was asked a verdict
    votes: tuple[int, int, int] = (0, 0, 0)  # for the first, for neither, for the second
    orders: tuple[float | None, float | None] = (None, None)  # p where the first stood first, and where it stood last
    errors: tuple[str, ...] = ()  # of the votes that are missing

    @property
    def winner(self) -> Winner | None:
        return winner(self.p)

    @property
    def answered(self) -> bool:
        """Whether it need not be asked about again: an answer without a verdict is one."""
        return self.p is not None or all(error == UNDECIDED for error in self.errors)

    @staticmethod
    def of(row: Mapping[str, Any]) -> Preference:
        """From JSON, which has no tuples."""
        return Preference(row["p"], tuple(row["votes"]), tuple(row["orders"]), tuple(row["errors"]))


@dataclass(frozen=True)
class Score:
    """What a judge thinks of one answer."""

    value: float | None  # 0: the worst of the scale; 1: the best; None: no verdict
    errors: tuple[str, ...] = ()


def winner(p: float | None) -> Winner | None:
    """Of the probability that the first is better. Half is half, whatever rounding made of it."""
    if p is None:
        return None
    return "tie" if math.isclose(p, 0.5, abs_tol=1e-9) else "first" if p > 0.5 else "second"


def mean(values: Iterable[float | None]) -> float | None:
    """Of those that are there."""
    there = [value for value in values if value is not None]
    return sum(there) / len(there) if there else None


def vote_of(reply: Reply, request: Request, soft: bool) -> Vote:
    """The probability of each option; hard: of the one it said, or would have said, 1."""
    if reply.error is not None:
        return Vote(None, reply.error)
    said = verdict_at(reply.text, request)
    if reply.logp is None:
        return Vote(None, UNDECIDED) if said is None else Vote({said[1]: 1.0})
    if not soft:
        return Vote({said[1] if said else max(reply.logp, key=reply.logp.__getitem__): 1.0})
    largest = max(reply.logp.values())
    shares = {name: math.exp(logp - largest) for name, logp in reply.logp.items()}
    return Vote({name: share / sum(shares.values()) for name, share in shares.items()})


def first_is_better(vote: Vote) -> float | None:
    """P of the answer that stood first."""
    return None if vote.options is None else vote.options.get(FIRST, 0.0) + vote.options.get(TIE, 0.0) / 2


def preference(ahead: Sequence[Vote], behind: Sequence[Vote]) -> Preference:
    """From the votes that saw the first answer first, and those that saw it last (none: nobody was asked so).

    Each order counts the same, and where one of them has no verdict there is none at all: the other alone is worth its
    liking for a place.
    """
    a = [first_is_better(vote) for vote in ahead]
    b = [None if p is None else 1 - p for p in map(first_is_better, behind)]
    orders = mean(a), mean(b)
    complete = orders[0] is not None and (not behind or orders[1] is not None)
    counts = Counter(map(winner, a + b))
    return Preference(
        mean(orders) if complete else None,
        (counts["first"], counts["tie"], counts["second"]),
        orders,
        tuple(vote.error for vote in (*ahead, *behind) if vote.error is not None),
    )


def score(votes: Sequence[Vote], scale: Sequence[int]) -> Score:
    """The mean of the expected scores, on [0, 1]. arXiv:2303.16634 for the expectation."""
    worst, best = scale
    expected = [None if vote.options is None else sum(float(n) * p for n, p in vote.options.items()) for vote in votes]
    value = mean(expected)
    return Score(
        None if value is None else (value - worst) / (best - worst),
        tuple(vote.error for vote in votes if vote.error is not None),
    )
