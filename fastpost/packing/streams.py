"""Packs of more rows than memory holds: a window of them at a time, from any iterable.

A window is filled with units until their tokens would fill `window` packs, planned like a whole data set, and its
fullest `window` packs go out, in an order of (seed, epoch, window). What is in the others waits for a later window: a
few rows do for several. No more is held than two windows, one that goes out and the next. The last goes out whole.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, islice, pairwise
from typing import Any, Generic, TypeVar

from fastpost.packing.limits import Limits
from fastpost.packing.plans import Pack, plan, steps

Row = TypeVar("Row")


@dataclass(frozen=True)
class Cursor:
    """Where a stream stands, in plain numbers: with the same source and settings it goes on from there."""

    row: int = 0  # of the source: how many were read before this window
    carried: tuple[int, ...] = ()  # of the units among them that wait, the first row
    window: int = 0
    step: int = 0  # of this window: how many went out

    def __post_init__(self):
        object.__setattr__(self, "carried", tuple(self.carried))  # JSON reads a list


@dataclass(frozen=True)
class Step(Generic[Row]):
    """The packs of an optimizer step."""

    rows: list[Row]
    packs: list[Pack]  # of indices into `rows`
    then: Cursor  # what is to be kept of a run that stops after this step


@dataclass(frozen=True)
class _Unit(Generic[Row]):
    first: int  # row of the source
    rows: list[Row]
    lengths: list[int]


@dataclass(frozen=True)
class _Window(Generic[Row]):
    rows: list[Row]
    packs: list[Pack]  # of indices into `rows`
    at: Cursor
    then: Cursor


def _units(source: Iterable[Row], length: Callable[[Row], int], unit: int, first: int) -> Iterator[_Unit[Row]]:
    """The units of the source from row `first` on."""
    skip: Any = getattr(source, "skip", None)  # of a streamed data set, which need not read what it skips
    rows = iter(skip(first)) if skip else islice(source, first, None)
    while some := list(islice(rows, unit)):
        if len(some) < unit:
            raise ValueError(f"unit must divide the number of rows, got unit {unit} and {first + len(some)} rows")
        yield _Unit(first, some, [length(row) for row in some])
        first += unit


def _faultless(units: Iterable[_Unit[Row]], limits: Limits, drop: bool) -> Iterator[_Unit[Row]]:
    """The units that can be packed. One that cannot is a ValueError, or is left out; warnings name it, and count."""
    faults, example = 0, ""
    for unit in units:
        fault = limits.fault(unit.lengths, unit.first)
        if fault is None:
            yield unit
            continue
        if not drop:
            raise ValueError(fault)
        if not faults:
            example = fault
            warnings.warn(f"dropped, and more like it will be: {fault}", stacklevel=2)
        faults += 1
    if faults:
        warnings.warn(limits.dropped(faults, example), stacklevel=2)


def _filled(held: Sequence[_Unit[Row]], units: Iterator[_Unit[Row]], tokens: int) -> tuple[list[_Unit[Row]], bool]:
    """What is held and what comes next, until there are so many tokens; and whether the source ended before."""
    found, total = list(held), sum(sum(unit.lengths) for unit in held)
    while total < tokens:
        unit = next(units, None)
        if unit is None:
            return found, True
        found.append(unit)
        total += sum(unit.lengths)
    return found, False


def _fullest(packs: Sequence[Pack], lengths: Sequence[int], count: int) -> list[Pack]:
    """So many of the packs, in their order; the earlier of those that are equally full."""
    tokens = [sum(lengths[row] for row in pack) for pack in packs]
    return [packs[i] for i in sorted(sorted(range(len(packs)), key=lambda i: -tokens[i])[:count])]


def _windows(
    source: Iterable[Row], length: Callable[[Row], int], limits: Limits, count: int, drop: bool, at: Cursor
) -> Iterator[_Window[Row]]:
    """Windows of `count` packs each; the last one may have more, or fewer."""
    waiting, unit = set(at.carried), limits.unit
    earliest = min(waiting, default=at.row)
    units = _units(source, length, unit, earliest)
    held = [u for u in islice(units, (at.row - earliest) // unit) if u.first in waiting]
    units, ended = _faultless(units, limits, drop), False
    while not ended:
        held, ended = _filled(held, units, count * limits.max_tokens)
        lengths = [n for u in held for n in u.lengths]
        packs = plan(lengths, limits.max_tokens, unit)
        out = packs if ended else _fullest(packs, lengths, count)
        gone = {row // unit for pack in out for row in pack}
        row = max([at.row, *(u.first + unit for u in held[-1:])])
        rows = [row for u in held for row in u.rows]
        held = [u for i, u in enumerate(held) if i not in gone]
        then = Cursor(row, tuple(u.first for u in held), at.window + 1)
        yield _Window(rows, out, at, then)
        at = then


def _steps(windows: Iterable[_Window[Row]], packs_per_step: int, seed: int, epoch: int) -> Iterator[Step[Row]]:
    for window in windows:
        order = steps(window.packs, packs_per_step, seed, epoch, window.at.window)
        for done, packs in list(enumerate(order, 1))[window.at.step :]:
            then = replace(window.at, step=done) if done < len(order) else window.then
            starts = [0, *accumulate(map(len, packs))]
            places = [list(range(start, stop)) for start, stop in pairwise(starts)]
            yield Step([window.rows[i] for pack in packs for i in pack], places, then)


def stream(
    source: Iterable[Row],
    length: Callable[[Row], int],
    max_tokens: int,
    packs_per_step: int,
    unit: int = 1,
    *,
    window: int = 1024,  # packs
    seed: int = 0,
    epoch: int = 0,
    max_length: int | None = None,
    drop: bool = False,
    start: Cursor = Cursor(),
) -> Iterator[Step[Row]]:
    """The steps of an epoch over `source`, which begins with its first row whatever the `start`.

    Other arguments are those of `plan` and `steps`. The last step may have fewer packs. A source with a `skip` of its
    own, as streamed data sets have, is resumed by it; any other is read up to where the stream stood.
    """
    limits = Limits(max_tokens, unit, max_length)
    if packs_per_step < 1 or window < 1 or window % packs_per_step:
        raise ValueError(f"window must be a multiple of packs_per_step, got {window} packs and {packs_per_step} a step")
    return _steps(_windows(source, length, limits, window, drop, start), packs_per_step, seed, epoch)
