"""Shard: which rows of the vocabulary each rank holds, where a head is in pieces."""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist

from fastpost.core.quantised import Weight


@dataclass(frozen=True)
class Shard:
    """A vocabulary in pieces (tensor parallel): rank i of `group` holds the next sizes[i] rows of it.

    Each rank makes a Head of its own rows, and all make the same calls with the same hidden states, targets and batch;
    a target counts in the whole vocabulary. See fastpost.core.shard.
    """

    sizes: tuple[int, ...]
    group: dist.ProcessGroup | None = None  # None: all processes

    def __post_init__(self):
        if not isinstance(self.sizes, tuple) or not all(isinstance(size, int) and size > 0 for size in self.sizes):
            raise ValueError(
                f"Shard.sizes must be a tuple of positive row counts, one for each rank, got {self.sizes!r}"
            )
        if not dist.is_initialized():
            raise ValueError("Shard needs a process group: call torch.distributed.init_process_group first")
        if self.rank < 0 or len(self.sizes) != dist.get_world_size(self.group):
            raise ValueError(
                f"Shard.sizes must have one entry for each rank of its group, and this process must be in it: got "
                f"{self.sizes} for {dist.get_world_size(self.group)} ranks, here rank {self.rank}"
            )

    @staticmethod
    def of(weight: Weight, group: dist.ProcessGroup | None = None) -> Shard:  # (V of this rank, D)
        """The vocabulary that the weights of all ranks make up. It asks them: make it once, and keep it."""
        sizes = [0] * dist.get_world_size(group)
        dist.all_gather_object(sizes, weight.shape[0], group)
        return Shard(tuple(sizes), group)

    @property
    def ranks(self) -> list[int]:
        """The processes, in the order of their rows."""
        return dist.get_process_group_ranks(self.group)

    @property
    def rank(self) -> int:
        return dist.get_rank(self.group)

    @property
    def rows(self) -> int:
        """How many this rank holds."""
        return self.sizes[self.rank]

    @property
    def start(self) -> int:
        """The first row that this rank holds."""
        return sum(self.sizes[: self.rank])

    @property
    def vocabulary(self) -> int:
        return sum(self.sizes)
