"""The passes of one model, of any size; each is acted out once, and few of them where they are on a line over

tokens   on a GPU, where a pack holds what its tokens take, in however many sequences
length   else: of a sequence, in so many rows
rows     or, of the length that was first asked for
tiles    of an MLP that takes some tokens at a time
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from fastpost.planning.growth import Growth
from fastpost.planning.head import Schedule
from fastpost.planning.outline import Outline
from fastpost.planning.passes import (
    cache_bytes,
    decoding_pass,
    forward_pass,
    grown,
    prompt_pass,
    token_cache,
    training_pass,
)
from fastpost.planning.timeline import Timeline

LEAST, FAR = 64, 1 << 24  # tokens; more are not asked for
MANY_ROWS = 1 << 14
FEW_TILES = (3, 4, 5)
Act = Callable[[int, int], Timeline]  # (rows, tokens of each)


@dataclass(frozen=True, eq=False)
class Acted:
    made: Outline
    growths: dict[tuple[str, object], Growth] = field(default_factory=dict)
    lengths: dict[str, int] = field(default_factory=dict)  # of a kind of pass, the one that was first asked for

    def training(self, rows: int, length: int, schedule: Schedule, *, scalar: bool) -> Timeline:
        def act(rows: int, length: int) -> Timeline:
            return training_pass(self.made, rows, length, schedule=schedule, scalar=scalar)

        return self._packed(f"training, {schedule}", rows, length, act)

    def forward(self, rows: int, length: int) -> Timeline:
        return self._packed("forward", rows, length, functools.partial(forward_pass, self.made))

    def prompts(self, completions: int, length: int) -> Timeline:
        return self._packed("prompts", completions, length, functools.partial(prompt_pass, self.made))

    def decoding(self, completions: int, length: int) -> Timeline:
        """The last of so many tokens."""

        def act(completions: int, length: int) -> Timeline:
            return decoding_pass(self.made, grown(self.made, self._token, completions, length - 1))

        return self._batch("decoding", completions, length, act, few=1)

    def cached(self, completions: int, length: int) -> int:
        """Bytes of the keys and values of so many tokens each."""
        return cache_bytes(grown(self.made, self._token, completions, length))

    @functools.cached_property
    def _token(self) -> Any:
        return token_cache(self.made)

    def _packed(self, kind: str, rows: int, length: int, act: Act) -> Timeline:
        if self.made.kind != "cuda":
            return self._batch(kind, rows, length, act, few=3)  # one row alone attends in a way of its own
        tokens, tile = rows * length, self.made.config.tiled_mlp
        if tile and tokens >= FEW_TILES[0] * tile:
            tiles = self._growth(kind, "tiles", lambda n: act(1, n * tile), FEW_TILES, coarse=True)
            return tiles.at(-(-tokens // tile))
        return self._growth(kind, "tokens", lambda n: act(1, n), _points(LEAST, tokens, FAR)).at(tokens)

    def _batch(self, kind: str, rows: int, length: int, act: Act, few: int) -> Timeline:
        first = self.lengths.setdefault(kind, length)
        over_rows = self._growth(kind, "rows", lambda n: act(n, first), _points(few, rows, MANY_ROWS))
        if length == first:
            return over_rows.at(rows)
        over_length = self._growth(kind, rows, lambda n: act(rows, n), _points(LEAST, first, FAR))
        if rows in over_rows.seen:
            over_length.seen[first] = over_rows.seen[rows]
        return over_length.at(length)

    def _growth(
        self,
        kind: str,
        over: object,
        trace: Callable[[int], Timeline],
        points: tuple[int, int, int],
        coarse: bool = False,
    ) -> Growth:
        return self.growths.setdefault((kind, over), Growth(trace, points, coarse))


def _points(least: int, own: int, far: int) -> tuple[int, int, int]:
    return least, own if least < own < far else 2 * least, far
