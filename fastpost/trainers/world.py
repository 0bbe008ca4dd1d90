"""The processes of a run. Every one of them plans the whole step alike; what it is dealt of it, it computes.

Rows, their order and their packs are functions of the seed, so nobody has to be told of them. What only one process
knows, completions and their scores, is gathered whole. So one process is a world of its own, in which nothing happens.
Losses are weighed for the mean over all of them (`Window.world_size`), since the engines average gradients.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastpost.models.trunk import causal_lm
from fastpost.packing.plans import Pack
from fastpost.packing.ranks import deal
from fastpost.trainers import engines
from fastpost.trainers.engines import Door
from fastpost.trainers.loop import the_device

T = TypeVar("T")


def launched() -> int:
    """How many processes torchrun, accelerate or the caller has started."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_world_size()
    return int(os.environ.get("WORLD_SIZE", "1"))


def check_alone(verb: str) -> None:
    """ValueError where there are several processes: each would write what one is to write."""
    count = launched()
    if count > 1:
        raise ValueError(f"{verb} runs as one process, and {count} were started: leave out torchrun, or accelerate")


@dataclass(frozen=True)
class World:
    """Which process this is, and of how many; and what their models are joined by."""

    rank: int = 0
    size: int = 1
    door: Callable[..., Any] | None = None  # what passes of the model go through
    width: int = 1  # of the model

    @staticmethod
    def here() -> World:
        """As the launcher has it: torchrun, accelerate, or none."""
        if launched() == 1:
            return World()
        if not dist.is_initialized():
            engines.join()
        return World(dist.get_rank(), dist.get_world_size())

    def around(self, *modules: nn.Module) -> World:
        """The world whose passes go through these modules, a causal LM and what is beside it. They are moved to the
        device; FSDP2 replaces their parameters, so what holds some of them must look them up again."""
        shards = self.size > 1 and engines.shards()
        for module in () if shards else modules:
            module.to(the_device())
        if self.size == 1:
            return self
        width = causal_lm(modules[0]).config.get_text_config().hidden_size
        return replace(self, door=engines.wrapped(Door(modules)), width=width)

    @property
    def first(self) -> bool:
        """Whether this is the process that writes files and speaks."""
        return self.rank == 0

    @property
    def shards(self) -> bool:
        """Whether a process has but a part of the model."""
        return engines.in_parts(self.door)

    # ---- a step ----

    def share(self, packs: Sequence[Pack], lengths: Sequence[int], unit: int = 1) -> list[Pack]:
        """This process' packs of those of the step, as many as any other's: some may be empty, for a placeholder.
        Units are not split, packs may be."""
        return list(packs) if self.size == 1 else deal(packs, lengths, self.size, self.width, unit)[self.rank]

    def turns(self, packs: Sequence[T]) -> Iterator[T]:
        """One after another; what their backward passes add up is averaged over the processes in the last."""
        for i, pack in enumerate(packs):
            with nullcontext() if i + 1 == len(packs) else engines.apart(self.door):
                yield pack

    def through(self, work: Callable[[], T]) -> T:
        """What a pass of the model gives, the loss that is to be differentiated included. A pass is once through and
        one backward pass."""
        return work() if self.door is None else engines.through(self.door, work)

    # ---- what all must know ----

    def slice(self, rows: Sequence[T]) -> Sequence[T]:
        """This process' rows of a list that each takes a part of, in the order of their ranks."""
        return rows[len(rows) * self.rank // self.size : len(rows) * (self.rank + 1) // self.size]

    def gathered(self, own: Sequence[T]) -> list[T]:
        """What all processes have, in the order of their ranks."""
        if self.size == 1:
            return list(own)
        found: list[Sequence[T]] = [()] * self.size
        dist.all_gather_object(found, own)
        return list(chain(*found))

    def summed(self, x: Tensor) -> Tensor:
        """Over the processes, each of which gives some of the numbers and zeros; on the host."""
        if self.size == 1:
            return x
        on = x.to("cuda" if dist.get_backend() == "nccl" else "cpu", copy=True)
        dist.all_reduce(on)
        return on.to(x.device)

    def any(self, said: bool) -> bool:
        """Whether one of them says so."""
        return bool(self.summed(torch.tensor(int(said))))

    def wait(self) -> None:
        """For all the others."""
        self.any(False)

    # ---- the whole model ----

    def whole(self) -> AbstractContextManager[None]:
        """Inside, this process can run the model alone, without gradients: what sampling needs. Where weights are
        sharded they are gathered for it."""
        return engines.gathered(self.door) if self.shards else nullcontext()

    def on_host(self) -> AbstractContextManager[None]:
        """Inside, the first process has whatever is to be written."""
        return engines.on_host(self.door, self.first) if self.shards else nullcontext()


ALONE = World()
