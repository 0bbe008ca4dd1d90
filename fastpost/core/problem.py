"""What the schedules are given: operands of the products, which rows are kept, and what is wanted of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fastpost.core.quantised import Weight
from fastpost.types import NEEDS_REFERENCE, Shard, TopK


class Operands(NamedTuple):
    """What is multiplied: raw logits = hidden @ weight.T + bias + low @ b.T. The last two are a LoRA on the head."""

    hidden: Tensor  # (T, D), of which the kept rows are taken
    weight: Weight  # (V, D)
    bias: Tensor | None  # (V,)
    low: Tensor | None  # (N, r), of the kept rows alone, in the dtype of the logits
    b: Tensor | None  # (V, r)

    @property
    def width(self) -> int:
        return self.hidden.shape[1] + (0 if self.low is None else self.low.shape[1])


@dataclass(frozen=True)
class Reference:
    """The other distribution of a KL, computed beside the first from its own hidden states and head; a constant."""

    operands: Operands
    scale: float
    softcap: float | None


@dataclass(frozen=True)
class Problem:
    """All of a call that carries no gradient. N rows are kept of the T."""

    target: Tensor  # (N,) in [0, V); with a shard, counted from its first row
    index: Tensor | None  # (N,) where the kept rows are in hidden; None: they are all of it
    wants: frozenset[str]  # statistics, by the names of `token_stats`
    scale: float
    softcap: float | None
    inverse_temperature: Tensor | None  # (N,)
    reference: Reference | TopK | None  # a TopK has N rows already
    jsd_beta: float
    dtype: torch.dtype  # of the operands of the products
    shard: Shard | None = None  # which rows of the vocabulary the operands have; None: all

    def __len__(self) -> int:
        return len(self.target)

    @property
    def names(self) -> tuple[str, ...]:
        """The statistics, in the order in which an autograd function returns them."""
        return tuple(sorted(self.wants | {"logp"}))

    @property
    def dense(self) -> Reference | None:
        return self.reference if isinstance(self.reference, Reference) else None

    @property
    def teacher(self) -> TopK | None:
        return self.reference if isinstance(self.reference, TopK) else None

    @property
    def row_wants(self) -> frozenset[str]:
        """What the row kernels must find; a stored teacher's divergences are found from its columns."""
        return self.wants if self.teacher is None else self.wants - NEEDS_REFERENCE


def cut(x: Tensor, index: Tensor | None, rows: slice) -> Tensor:
    """Kept rows `rows` of a tensor that has all T."""
    return x[rows] if index is None else x.index_select(0, index[rows])


def put(x: Tensor, index: Tensor | None, rows: slice, values: Tensor) -> None:
    """The kept rows `rows` of a tensor that has all T become `values`."""
    if index is None:
        x[rows] = values.to(x.dtype)
    else:
        x.index_copy_(0, index[rows], values.to(x.dtype))
