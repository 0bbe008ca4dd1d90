"""Best fit, largest first: which units of so many tokens share a pack.

Units are taken from the largest down, and each goes to the pack that it leaves the least room in, or to a new one. Of
equal units the earlier is taken first; of packs with equal room, the one that came to it last. That needs at most
11/9 of the fewest packs there can be, plus 4 (Johnson et al. 1974, doi:10.1137/0203025), and on the lengths of texts a
fraction of a percent more.

csrc/best_fit.cpp takes one unit at a time. Its twin here takes equal units together: packs with the least room r take
r // s units of size s each before any with more room takes one, so a step of the loop fills a slice of packs.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby, repeat


def best_fit_twin(sizes: Sequence[int], room: int) -> list[int]:
    """What csrc's best_fit returns."""
    packs, found = _Packs(room), [0] * len(sizes)
    largest_first = sorted(range(len(sizes)), key=sizes.__getitem__, reverse=True)  # stable: the earlier comes first
    for size, alike in groupby(largest_first, key=sizes.__getitem__):
        units = list(alike)
        for u, pack in zip(units, packs.fill(size, len(units)), strict=True):
            found[u] = pack
    return found


class _Packs:
    """Open packs by the room that is left in them."""

    def __init__(self, room: int):
        self._room, self._count = room, 0
        self._rooms: list[int] = []  # ascending, those of which there is a pack
        self._stacks: dict[int, list[int]] = {}  # room -> its packs

    def fill(self, size: int, units: int) -> Iterator[int]:
        """The pack of each of so many units of this size."""
        while units:
            packs, room = self._take(size, units)
            each = room // size
            whole = min(len(packs), units // each)
            self._put(packs[:whole], room - each * size)
            yield from packs[:whole] if each == 1 else (pack for pack in packs[:whole] for _ in range(each))
            units -= whole * each
            if whole < len(packs):  # the last pack takes what is left
                self._put(packs[whole:], room - units * size)
                yield from repeat(packs[whole], units)
                units = 0

    def _take(self, size: int, units: int) -> tuple[list[int], int]:
        """Packs with the least room that holds a unit, at most as many as the units need; and that room."""
        at = bisect_left(self._rooms, size)
        if at == len(self._rooms):
            count = -(-units // (self._room // size))
            self._count += count
            return list(range(self._count - count, self._count)), self._room
        room = self._rooms[at]
        count, stack = -(-units // (room // size)), self._stacks[room]
        packs = stack[: -count - 1 : -1]
        del stack[-count:]
        if not stack:
            del self._stacks[room], self._rooms[at]
        return packs, room

    def _put(self, packs: list[int], room: int) -> None:
        if packs and room not in self._stacks:
            self._stacks[room] = []
            insort(self._rooms, room)
        if packs:
            self._stacks[room] += packs


def native() -> Callable[[Sequence[int], int], list[int]] | None:
    """csrc's best_fit. None: it was not built, or from sources that had none yet."""
    try:
        import torch  # noqa: F401  (its libraries must be there before the extension is)

        from fastpost import _native
    except ImportError:
        return None
    return getattr(_native, "best_fit", None)


def best_fit(sizes: Sequence[int], room: int) -> list[int]:
    """The pack of each unit, numbered from 0. Sizes are 1 to `room`."""
    return (native() or best_fit_twin)(sizes, room)
