"""Sequences of a pack, laid end to end: what the trunk reads, and the Batch that a loss reads.

A pack is one flat row of T tokens without padding. Positions restart at 0 in every sequence, and target[t] is the
token after t where that token is to be predicted, else -100. Kept rows and ranges are found here, on the host, so that
a step on an accelerator never has to wait for them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import accumulate, chain

import torch
from torch import Tensor

from fastpost.types import PER_TOKEN, Batch, nearest


@dataclass(frozen=True)
class Example:
    """A tokenised sequence; loss_mask[i]: token i is to be predicted. The first has nothing before it and never is."""

    input_ids: list[int]
    loss_mask: list[bool]

    def __post_init__(self):
        if not self.input_ids or len(self.input_ids) != len(self.loss_mask):
            raise ValueError(
                "an Example needs at least one token and a loss_mask as long as its input_ids, "
                f"got {len(self.input_ids)} input_ids and {len(self.loss_mask)} in loss_mask"
            )

    @property
    def predicted(self) -> list[int]:
        """Indices of the tokens to be predicted."""
        return [i for i, kept in enumerate(self.loss_mask) if kept and i]


@dataclass(frozen=True)
class Packed:
    """S sequences laid end to end: what the trunk reads, and what the loss reads."""

    input_ids: Tensor  # (1, T) int64
    position_ids: Tensor  # (1, T) int64
    batch: Batch
    longest: int  # positions of the longest sequence

    @property
    def num_tokens(self) -> int:
        """Of all sequences."""
        return self.input_ids.numel()

    def to(self, device: torch.device | str) -> Packed:
        """The same pack on the device, but for its lengths, which are read on the host."""
        return Packed(self.input_ids.to(device), self.position_ids.to(device), self.batch.to(device), self.longest)


def placeholder(unit: int = 1) -> list[Example]:
    """A unit of which nothing is to be predicted: what a rank without rows packs, to keep in step with the others.

    Its loss and every gradient are 0, of the losses of pairs as well. Token 0 is in every vocabulary.
    """
    return [Example([0], [False])] * unit


def _field(
    name: str, value: Tensor | Sequence[Sequence[float]], examples: Sequence[Example], rows: Tensor, T: int
) -> Tensor:
    """One field of Batch, laid out over the pack."""
    names = [field.name for field in fields(Batch) if field.name not in ("target", "lengths", "kept", "kept_lengths")]
    if name not in names:
        raise ValueError(f"pack takes the fields of Batch, got {name!r}{nearest(name, names)}")
    if isinstance(value, Tensor):
        return value
    if name not in PER_TOKEN:
        raise ValueError(f"{name} must be a tensor; lists are for the fields of one number a token: {PER_TOKEN}")
    if len(value) != len(examples):
        raise ValueError(f"{name} must hold a list an example, got {len(value)} lists for {len(examples)} examples")
    for i, (numbers, example) in enumerate(zip(value, examples, strict=True)):
        if len(numbers) != len(example.predicted):
            raise ValueError(
                f"{name}[{i}] must hold a number for each of the {len(example.predicted)} predicted tokens "
                f"of example {i}, got {len(numbers)}"
            )
    flat = torch.tensor(list(chain.from_iterable(value)), dtype=torch.float32)
    return flat.new_zeros(T).index_copy(0, rows, flat)


def pack(examples: Sequence[Example], **extra: Tensor | Sequence[Sequence[float]]) -> Packed:
    """The examples laid end to end; `extra` are further fields of `Batch`.

    A tensor is taken as it is. A list holds, for each example, one number a predicted token, and each is laid at the
    position that predicts its token; elsewhere the field is 0.
    """
    if not examples:
        raise ValueError("examples must hold at least one sequence, got none")
    lengths = [len(example.input_ids) for example in examples]
    starts = [0, *accumulate(lengths)]
    input_ids = torch.tensor(list(chain.from_iterable(example.input_ids for example in examples)))
    kept = [s + i - 1 for s, example in zip(starts, examples, strict=False) for i in example.predicted]
    rows = torch.tensor(kept, dtype=torch.int64)
    target = torch.full_like(input_ids, -100)
    target[rows] = input_ids[rows + 1]
    laid = {name: _field(name, value, examples, rows, starts[-1]) for name, value in extra.items()}
    positions = torch.cat([torch.arange(n) for n in lengths])
    counts = torch.tensor([len(example.predicted) for example in examples])
    batch = Batch(target, torch.tensor(lengths), kept=rows, kept_lengths=counts, **laid)
    return Packed(input_ids[None], positions[None], batch, max(lengths))
