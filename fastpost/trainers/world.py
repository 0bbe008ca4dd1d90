"""The processes of a run. Every one of them plans the whole step alike; what it is dealt of it, it computes.

Rows, their order and their packs are functions of the seed, so nobody has to be told of them. What only one process
knows, completions and their scores, is gathered whole. So one process is a world of its own, in which nothing happens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """Which process this is, and of how many."""

    rank: int = 0
    size: int = 1

    @property
    def device(self) -> torch.device:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")

    @property
    def first(self) -> bool:
        """Whether this is the process that writes files and speaks."""
        return self.rank == 0

    def through(self, work: Callable[[], T]) -> T:
        """What a pass of the model gives; an engine that shards or averages must see it."""
        return work()

    def share(self, packs: Sequence[list[int]]) -> list[list[int]]:
        """This process' packs, of those of the step."""
        return list(packs)

    def gathered(self, own: Sequence[T]) -> list[T]:
        """What all processes have, in the order of their ranks."""
        return list(own)


ALONE = World()
