"""Sequences -> packs: which rows share a pack (`plan`), and how they are laid end to end (`pack`).

A pack is one flat row of T tokens: no padding, positions restart at 0 in every sequence, and `target[t]` is the token after t where
that token is to be predicted, else -100. Everything is found here, on the host, so that a step on an accelerator never waits for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from fastpost.types import PER_TOKEN, Batch


@dataclass(frozen=True)
class Example:
    """A tokenised sequence; loss_mask[i]: token i is to be predicted (so the first never is)."""

    input_ids: list[int]
    loss_mask: list[bool]


@dataclass(frozen=True)
class Packed:
    """S sequences laid end to end: what the trunk reads, and what the loss reads."""

    input_ids: Tensor  # (1, T) int64
    position_ids: Tensor  # (1, T) int64, restarting at 0 in every sequence
    batch: Batch

    def to(self, device: torch.device | str) -> Packed:
        raise NotImplementedError


def plan(lengths: list[int], max_tokens: int, unit: int = 1) -> list[list[int]]:
    """Bins of row indices, each of at most max_tokens tokens, in which `unit` adjacent rows are never split."""
    raise NotImplementedError


def pack(examples: Sequence[Example], **extra: Tensor | Sequence[Sequence[float]]) -> Packed:
    """The examples laid end to end, with further fields of `Batch`."""
    raise NotImplementedError
