"""Where the seconds of a step go: parts by name, rollout, reward and reference; and update, which is all the rest."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch


class Clock:
    """Of one step after the other."""

    def __init__(self) -> None:
        self._began = time.perf_counter()
        self._spent: dict[str, float] = {}

    def start(self) -> None:
        """A step begins now: what was done since the last one, an evaluation say, is of none."""
        self._began, self._spent = time.perf_counter(), dict.fromkeys(self._spent, 0.0)

    def spend(self, seconds: Mapping[str, float]) -> None:
        """Parts of this step that were timed elsewhere."""
        for name, each in seconds.items():
            self._spent[name] = self._spent.get(name, 0.0) + each

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """What is done inside, or by a function that this decorates, is that part of the step."""
        _settle()
        began = time.perf_counter()
        yield
        _settle()
        self.spend({f"step_time/{name}": time.perf_counter() - began})

    def step(self) -> dict[str, float]:
        """The seconds of each part of the step that ends now, which add up to it; then the next one begins. A part that
        an earlier step had and this one had not is 0."""
        now, spent = time.perf_counter(), self._spent
        update = now - self._began - sum(spent.values())
        self._began, self._spent = now, dict.fromkeys(spent, 0.0)
        return {**spent, "step_time/update": update}


def _settle() -> None:
    """A GPU works on when its host has gone ahead."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
