"""Which positions reach the head: the ignored and the idle are left out before the first product.

On an accelerator this is the call's one host sync: how many rows are kept, whether a target is outside the vocabulary,
what is left of each sequence, in one transfer. There is none where the caller knows the kept rows (`fastpost.packing`
finds them on the host), and under graph capture, where nothing may depend on a count.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastpost.core.checks import check_range


class Rows(NamedTuple):
    """Which positions are multiplied, and which are not."""

    index: Tensor | None  # (N,) ascending; None: all
    idle: Tensor | None = None  # (M,) kept ones that are left out, their coefficient being zero; None: none
    mask: Tensor | None = None  # (T,) bool, where ignored rows could not be left out (graph capture) and are zeroed
    lengths: Tensor | None = None  # (S,) on the host, how many of each sequence are multiplied, if that was counted


def _between(mask: Tensor, ends: Tensor) -> Tensor:  # (T,) bool, (S,) -> (S,)
    """How many positions of each sequence are true."""
    before = torch.nn.functional.pad(mask.cumsum(0), (1, 0))
    return before.index_select(0, ends.clamp(0, len(mask))).diff(prepend=before[:1])


def _where(mask: Tensor, count: int) -> Tensor:  # (T,) bool -> (count,)
    """The positions at which it is true, without asking how many they are."""
    return torch.argsort(mask.to(torch.uint8), descending=True, stable=True)[:count]


def find_rows(
    target: Tensor,  # (T,)
    ignore_index: int,
    vocabulary: int,
    known: Tensor | None,  # (N,) positions of kept rows, where the caller knows them
    lengths: Tensor | None,  # (S,) which must sum to T
    live: Tensor | None,  # (T,) bool, those of the kept rows that are not idle; None: all
) -> Rows:
    if known is not None and live is None:
        if target.device.type == "cpu":
            check_range(target.index_select(0, known), vocabulary)
        return Rows(None if len(known) == len(target) else known)
    mask = target != ignore_index
    if target.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return Rows(None, mask=mask)  # ignored rows go through, with coefficient 0
    live = mask if live is None else live
    outside = mask & ((target < 0) | (target >= vocabulary))
    # Lengths on the host were looked at by the Batch; others are looked at here, in the same transfer.
    ends = target.new_zeros(0) if lengths is None else lengths.to(mask.device, non_blocking=True).cumsum(0)
    total = ends[-1:] if len(ends) else torch.full((1,), len(target), device=mask.device)
    seen = torch.stack([mask.sum(), live.sum(), outside.sum()])
    kept, alive, bad, total, *each = torch.cat([seen, total, _between(live, ends)]).tolist()
    if bad:
        check_range(target[mask], vocabulary)
    if total != len(target):
        raise ValueError(f"batch.lengths must sum to the {len(target)} positions of batch.target, got a sum of {total}")
    index = None if alive == len(target) else _where(live, alive)
    idle = None if alive == kept else _where(mask & ~live, kept - alive)
    return Rows(index, idle, lengths=None if lengths is None else torch.tensor(each, dtype=torch.int64))
