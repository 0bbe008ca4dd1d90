"""A head whose vocabulary is spread over ranks (tensor parallel, arXiv:1909.08053): the only place where they meet.

Hidden states and targets are the same on all ranks of a group, and each folds the columns that it has. With m the
running maximum of a rank's row, M the largest of them, and s = m - M, a sum of e^(z - m) f(z - m) becomes one at M:

  sum e^x  ->  e^s (.)      sum e^x x  ->  e^s (. + s sum e^x)      sum e^2x  ->  e^2s (.)

So two all-reduces of a chunk's state, (14, R) numbers, make it that of the whole vocabulary: the maxima, then the
sums, among which the target's logit is that of the one rank that has it. The gradient of the hidden states is the sum
of what each rank's columns give, (R, D); that of weight, bias and B stays where the rows are.

An all-reduce hands every rank the same bits, so losses, and schedules that depend on sizes alone, agree without asking.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from fastpost.core.quantised import Weight
from fastpost.core.rows import APART_P, APART_Q, MAX, MAX_1, MAX_Q, SUM, SUM_1, SUM_Q, SUM_SQ, SUM_Z, TARGET
from fastpost.types import Shard

MAXIMA = (MAX, MAX_Q, MAX_1)


def add_up(x: Tensor | None, shard: Shard | None) -> None:
    """x, in place, becomes its sum over the ranks."""
    if x is not None and shard is not None:
        dist.all_reduce(x, group=shard.group)


def _move(state: Tensor, maxima: Tensor) -> Tensor:  # (STATE_ROWS, R), (3, R) -> (R,)
    """The sums, relative to these maxima; returns e^s of the first."""
    shift, shift_q, shift_1 = (state[slot] - maximum for slot, maximum in zip(MAXIMA, maxima, strict=True))
    decay, decay_q = shift.exp(), shift_q.exp()
    state[APART_P] = (state[APART_P] + (shift - shift_q) * state[SUM]) * decay
    state[APART_Q] = (state[APART_Q] + (shift_q - shift) * state[SUM_Q]) * decay_q
    state[SUM_Z] = (state[SUM_Z] + shift * state[SUM]) * decay
    state[SUM_SQ] *= decay.square()
    state[SUM] *= decay
    state[SUM_Q] *= decay_q
    state[SUM_1] *= shift_1.exp()
    return decay


def join(state: Tensor, target: Tensor, shard: Shard) -> Tensor:  # (STATE_ROWS, R), (R,) -> (R,)
    """The state of this rank's columns becomes that of the whole vocabulary; returns e^(own maximum - that of all)."""
    maxima = torch.stack([state[slot] for slot in MAXIMA])
    dist.all_reduce(maxima, dist.ReduceOp.MAX, group=shard.group)
    decay = _move(state, maxima)
    column = target + shard.start
    elsewhere = ((target < 0) | (target >= shard.rows)) & (column >= 0) & (column < shard.vocabulary)
    state[TARGET].masked_fill_(elsewhere, 0.0)  # a target outside the vocabulary stays NaN
    add_up(state, shard)
    for slot, maximum in zip(MAXIMA, maxima, strict=True):
        state[slot] = maximum
    return decay


def target_rows(x: Weight, target: Tensor, shard: Shard | None) -> Tensor:  # (V, D), (R,) -> (R, D)
    """x[target], and zeros for targets that another rank has."""
    if shard is None:
        return x[target]
    here = (target >= 0) & (target < shard.rows)
    return torch.where(here[:, None], x[target.clamp(0, shard.rows - 1)], 0.0)
