"""What sways a judge besides the answers: their places, their lengths, and whether it wrote one of them itself.

place    how often the two orders of a pair give opposite winners, and how often the answer in first place wins
         (arXiv:2305.17926, arXiv:2306.05685)
length   how often the longer answer wins, and b of P(first wins) = s(a + b log2(l_1 / l_2)), by Newton's method
itself   how much oftener its own answer wins than by the labels, and its accuracy there and elsewhere
         (arXiv:2404.13076)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from fastpost.judging.agreement import Number, accuracy, share
from fastpost.judging.verdicts import Preference, Winner, winner

STEPS = 50  # Newton's method needs fewer than ten where there is a maximum


@dataclass(frozen=True)
class Place:
    """Of the pairs that were judged in both orders."""

    flips: Number | None
    first_place_wins: Number | None  # of the verdicts that were no tie


@dataclass(frozen=True)
class Length:
    """Of the pairs whose answers differ in length."""

    longer_wins: Number | None  # a tie is half a win
    longer_wins_by_label: Number | None
    slope: Number | None  # log-odds a doubling; None: no finite slope fits best


@dataclass(frozen=True)
class Itself:
    """Of the pairs in which one answer, and only one, is the judge's own."""

    wins: Number | None
    wins_by_label: Number | None
    accuracy: Number | None
    accuracy_elsewhere: Number | None


def place(found: Sequence[Preference]) -> Place:
    """By the orders of each pair."""
    both = [(a, b) for one in found for a, b in [one.orders] if a is not None and b is not None]
    flips = [float({winner(a), winner(b)} == {"first", "second"}) for a, b in both]
    wins = [w == "first" for a, _ in both if (w := winner(a)) != "tie"]
    wins += [w == "second" for _, b in both if (w := winner(b)) != "tie"]
    return Place(share(flips), share([float(win) for win in wins]))


def length(found: Sequence[Preference], labels: Sequence[Winner | None], lengths: Sequence[tuple[int, int]]) -> Length:
    """By the lengths of the two answers, in any unit."""
    apart = [i for i, (a, b) in enumerate(lengths) if a != b and found[i].p is not None]
    judged = [_won(found[i].winner, lengths[i][0] > lengths[i][1]) for i in apart]
    labelled = [_won(labels[i], lengths[i][0] > lengths[i][1]) for i in apart if labels[i] is not None]
    decided = [(one.p, a, b) for one, (a, b) in zip(found, lengths, strict=True) if one.p is not None and a and b]
    return Length(
        share(judged), share(labelled), slope([math.log2(a / b) for _, a, b in decided], [p for p, _, _ in decided])
    )


def itself(
    found: Sequence[Preference], labels: Sequence[Winner | None], own: Sequence[tuple[bool, bool]]
) -> Itself | None:
    """By whether the first and the second answer are the judge's own; None where none is, or both are."""
    decided = [i for i, one in enumerate(found) if one.p is not None]
    mine = [i for i in decided if own[i][0] != own[i][1]]
    if not mine:
        return None
    known = [i for i in decided if labels[i] is not None]
    here, elsewhere = [i for i in known if i in set(mine)], [i for i in known if i not in set(mine)]
    return Itself(
        share([_won(found[i].winner, own[i][0]) for i in mine]),
        share([_won(labels[i], own[i][0]) for i in here]),
        accuracy([found[i].winner for i in here], [labels[i] for i in here]),
        accuracy([found[i].winner for i in elsewhere], [labels[i] for i in elsewhere]),
    )


def slope(x: Sequence[float], y: Sequence[float]) -> Number | None:
    """b of the likeliest s(a + b x) for y in [0, 1], and its standard error by the curvature there."""
    a = b = 0.0
    for _ in range(STEPS):
        p = [_sigmoid(a + b * each) for each in x]
        weight = [each * (1 - each) for each in p]
        ga, gb = (sum(u * (t - q) for u, t, q in zip(one, y, p, strict=True)) for one in ([1.0] * len(x), x))
        aa, ab = sum(weight), sum(w * u for w, u in zip(weight, x, strict=True))
        bb = sum(w * u * u for w, u in zip(weight, x, strict=True))
        determinant = aa * bb - ab * ab
        if not determinant > 1e-9 * aa * bb:
            return None  # one length ratio alone; or a line divides the winners, and the curvature goes to nothing
        step = (bb * ga - ab * gb) / determinant, (aa * gb - ab * ga) / determinant
        a, b = a + step[0], b + step[1]
        if max(map(abs, step)) < 1e-9:
            return Number(b, math.sqrt(aa / determinant), len(x))
    return None


def _sigmoid(x: float) -> float:
    return 0.5 * (1 + math.tanh(x / 2))


def _won(winner: Winner | None, first: bool) -> float:
    """Whether that answer won; a tie is half a win."""
    return 0.5 if winner == "tie" else float((winner == "first") == first)
