"""Passes over any number of tokens, from few that are acted out.

What a model holds after the i-th allocation is, as a rule, on a line over the tokens:

  live_i(n) = a_i + b_i n

It is taken to be where three passes, the smallest and the largest that may be asked for among them, are on one at
every allocation, to the byte. Else (a window is filled, scores are held for all pairs of tokens) each pass that is
asked for is acted out. So what is told of a pass is what it would tell of itself.

An MLP in tiles allocates more often the more tiles there are. Its passes are compared by their greediest moments
before, at, and after the head, over few tiles.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field

from fastpost.planning.timeline import Timeline


@dataclass(frozen=True)
class Line:
    """Timelines of the same instants."""

    start: int
    live: list[int]  # bytes at the start
    slopes: list[int]  # bytes of one more
    gradients: list[int]
    head: list[int]

    def at(self, n: int) -> Timeline:
        live = [bytes_ + slope * (n - self.start) for bytes_, slope in zip(self.live, self.slopes, strict=True)]
        return Timeline(live, self.gradients, self.head)


@dataclass(frozen=True, eq=False)
class Growth:
    """A kind of pass over n of something: tokens, rows, or tiles."""

    trace: Callable[[int], Timeline]
    points: tuple[int, int, int]  # ascending: passes that tell of all above the first, if they are on a line
    coarse: bool = False
    seen: dict[int, Timeline] = field(default_factory=dict)

    def at(self, n: int) -> Timeline:
        if n in self.seen or n in self.points or n < self.points[0] or self._line is None:
            return self._traced(n)
        return self._line.at(n)

    def _traced(self, n: int) -> Timeline:
        if n not in self.seen:
            found = self.trace(n)
            self.seen[n] = found.coarse() if self.coarse else found
        return self.seen[n]

    @functools.cached_property
    def _line(self) -> Line | None:
        """None where there is no line."""
        (a, b, c), (first, second, third) = self.points, (self._traced(n) for n in self.points)
        if len(first.live) != len(third.live):
            return None
        slopes = [(high - low) // (c - a) for low, high in zip(first.live, third.live, strict=True)]
        line = Line(a, list(first.live), slopes, list(first.gradients), list(first.head))
        return line if line.at(b) == second and line.at(c) == third else None
