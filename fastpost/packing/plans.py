"""Which rows share a pack, and which packs an optimizer step: for data whose lengths are all known."""

from __future__ import annotations

import operator
import random
import warnings
from collections import defaultdict
from collections.abc import Iterable, Sequence

from fastpost.packing.fit import best_fit
from fastpost.packing.limits import Limits

Pack = list[int]  # row numbers, ascending


def steps(packs: Sequence[Pack], packs_per_step: int, *seeds: int) -> list[list[Pack]]:
    """So many packs a step, in an order that the seeds decide (a run's and the epoch); the last has what is left."""
    if packs_per_step < 1:
        raise ValueError(f"packs_per_step must be at least 1, got {packs_per_step}")
    # By a string: it is spread over the generator's state by a hash, the same everywhere, so near seeds are unrelated.
    order = random.Random(" ".join(map(str, seeds))).sample(packs, len(packs))
    return [order[i : i + packs_per_step] for i in range(0, len(order), packs_per_step)]


def plan(
    lengths: Sequence[int],
    max_tokens: int,
    unit: int = 1,
    *,
    max_length: int | None = None,
    drop: bool = False,
) -> list[Pack]:
    """Packs of at most max_tokens tokens each, by best fit, in the order of their first rows.

    `unit` adjacent rows (2: a pair, G: a group) are never split. A unit with a row of no tokens or of more than
    max_length, or too long for a pack as a whole, is a ValueError; with `drop` it is in no pack, and a warning counts.
    """
    limits, rows = Limits(max_tokens, unit, max_length), _whole_numbers(lengths)
    unit = limits.unit
    if len(rows) % unit:
        raise ValueError(f"unit must divide the number of rows, got unit {unit} and {len(rows)} rows")
    sizes = rows if unit == 1 else [sum(rows[i : i + unit]) for i in range(0, len(rows), unit)]
    kept: Sequence[int] = range(len(sizes))
    if not limits.keep(rows, sizes):
        kept = _faultless(rows, limits, drop)
        sizes = [sizes[u] for u in kept]
    packs: defaultdict[int, Pack] = defaultdict(list)
    for u, found in zip(kept, best_fit(sizes, limits.max_tokens), strict=True):
        packs[found].append(u)
    if unit == 1:
        return list(packs.values())
    return [[row for u in units for row in range(u * unit, u * unit + unit)] for units in packs.values()]


def _whole_numbers(lengths: Iterable[int]) -> list[int]:
    try:
        return list(map(operator.index, lengths))
    except TypeError as error:
        raise ValueError(f"lengths must be whole numbers, numbers of tokens: {error}") from None


def _faultless(lengths: list[int], limits: Limits, drop: bool) -> list[int]:
    """The units that can be packed. A unit that cannot is a ValueError, or is left out with a warning."""
    unit = limits.unit
    faults = [limits.fault(lengths[i : i + unit], i) for i in range(0, len(lengths), unit)]
    found = [fault for fault in faults if fault]
    if not drop:
        raise ValueError(found[0])
    warnings.warn(limits.dropped(len(found), found[0]), stacklevel=3)
    return [u for u, fault in enumerate(faults) if not fault]
