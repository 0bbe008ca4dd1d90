"""Packs of a step -> packs of each rank: equally many for all, and nearly equal work.

The work of a pack of sequences of n_i tokens, in tokens through the layers' matrices:

    cost = sum n_i + sum n_i^2 / (12 D)

A layer of width D has 12 D^2 weights, 24 D^2 flop a token; a causal token attends to n / 2 others on average, at 4 D
flop each (arXiv:2001.08361, section 2.1, counts them likewise). The backward pass doubles both.

Ranks wait for one another in every pack where weights are sharded, and at the end of a step elsewhere. So packs are
dealt from the costliest down in rounds, one a rank: those of a round are alike, and the rank that has had the least so
far gets the costliest of them.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Sequence
from itertools import chain

from fastpost.packing.plans import Pack


def cost(lengths: Iterable[int], width: int) -> float:
    """The work of a pack of sequences of these lengths, in tokens of a model of this width."""
    return sum(n + n * n / (12 * width) for n in lengths)


def deal(
    packs: Sequence[Pack], lengths: Sequence[int], ranks: int, width: int, unit: int = 1
) -> list[list[Pack]]:  # [rank][turn]
    """The packs of a step for each rank, as many for all of them; `width` is the model's hidden size.

    Where there are too few, the costliest are split between units. Where there is nothing left to split, ranks get
    empty packs: they go through the motions with a `placeholder`.
    """
    for name, value in (("ranks", ranks), ("width", width), ("unit", unit)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    for pack in packs:
        _check(pack, len(lengths), unit)
    dealt = sorted(_even(packs, lengths, ranks, width, unit), reverse=True)
    shares: list[list[Pack]] = [[] for _ in range(ranks)]
    load = [0.0] * ranks
    for i in range(0, len(dealt), ranks):
        lightest_first = sorted(range(ranks), key=load.__getitem__)
        for rank, (work, pack) in zip(lightest_first, dealt[i : i + ranks], strict=True):
            shares[rank].append(pack)
            load[rank] += work
    return shares


def _check(pack: Pack, rows: int, unit: int) -> None:
    if pack and not 0 <= min(pack) <= max(pack) < rows:
        raise ValueError(f"packs must hold row numbers from 0 to {rows - 1}, as there are lengths, got {pack}")
    if pack != [row for first in pack[::unit] for row in range(first, first + unit)]:
        raise ValueError(f"packs must hold whole units, of {unit} adjacent rows each, got {pack}")


def _even(packs: Sequence[Pack], lengths: Sequence[int], ranks: int, width: int, unit: int) -> list[tuple[float, Pack]]:
    """The packs with their costs, and splits of them, until the ranks divide their number."""

    def work(pack: Pack) -> float:
        return cost((lengths[row] for row in pack), width)

    whole: list[Pack] = []  # of one unit
    costliest: list[tuple[float, Pack]] = []  # a heap of the others

    def add(pack: Pack) -> None:
        if len(pack) == unit:
            whole.append(pack)
        else:
            heapq.heappush(costliest, (-work(pack), pack))

    for pack in packs:
        add(pack)
    while costliest and (len(whole) + len(costliest)) % ranks:
        _, pack = heapq.heappop(costliest)
        for half in _halves([pack[i : i + unit] for i in range(0, len(pack), unit)], work):
            add(half)
    found = whole + [pack for _, pack in costliest]
    return [(work(pack), pack) for pack in found] + [(0.0, [])] * (-len(found) % ranks)


def _halves(units: list[Pack], work: Callable[[Pack], float]) -> tuple[Pack, Pack]:
    """Two packs of nearly equal work."""
    halves: tuple[list[Pack], list[Pack]] = ([], [])
    load = [0.0, 0.0]
    for unit in sorted(units, key=work, reverse=True):
        lighter = load.index(min(load))
        halves[lighter].append(unit)
        load[lighter] += work(unit)
    first, second = (sorted(chain.from_iterable(half)) for half in halves)
    return first, second
