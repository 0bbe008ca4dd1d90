"""The head's share: the workspace that `fastpost.core.sweep` plans for these shapes, and when its gradients are made.

The head itself is acted out: its schedule is chosen as `fastpost.head` chooses it, its gradients appear when that makes
them, and the workspace is the one that a `Sweep` of the same operands allows itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from fastpost.core.eager import eager_sweep
from fastpost.core.sweep import Operands, Problem, Sweep
from fastpost.models.heads import head_of
from fastpost.planning.outline import Outline
from fastpost.planning.timeline import Recorder

Schedule = Literal["statistics", "frozen", "eager", "lazy"]


@dataclass(frozen=True)
class Way:
    """How the head goes through its rows."""

    schedule: Schedule
    workspace: int  # bytes


def way(made: Outline, rows: int, unit: int, *, trains: bool) -> Way:
    """Of a loss of logp that must see `unit` rows together; or of statistics alone."""
    with made.mode:
        problem, operands = _question(made, rows)
        if not trains or not operands.weight.requires_grad:
            streamed = Sweep(problem, operands, held=False)
            return Way("frozen" if trains else "statistics", streamed.workspace)
        sweep = eager_sweep(problem, operands, kept=True)
        if unit <= sweep.rows_each:
            return Way("eager", sweep.workspace + _accumulator(sweep))
        sweep = Sweep(problem, operands, held=False)
        return Way("lazy", sweep.workspace + _accumulator(sweep))


def _question(made: Outline, rows: int) -> tuple[Problem, Operands]:
    """What the head is asked, on fake tensors of the kind of device that the run is for."""
    head = head_of(made.model)
    (V, D), stored, device = head.weight.shape, head.weight.dtype, made.kind
    assert stored is not None
    weight = torch.empty(V, D, dtype=stored, device=device, requires_grad=head.weight.requires_grad)
    dtype = torch.bfloat16 if made.bf16 else stored
    hidden = torch.empty(rows, D, dtype=dtype, device=device)
    target, wants = torch.empty(rows, dtype=torch.int64, device=device), frozenset({"logp", "entropy"})
    problem = Problem(target, None, wants, head.scale, head.softcap, None, None, 0.5, dtype)
    return problem, Operands(hidden, weight, None, None, None)


def _accumulator(sweep: Sweep) -> int:
    """What sums of several chunks take beyond a gradient in the weight's own dtype."""
    weight = sweep.operands.weight
    if not isinstance(weight, Tensor) or len(sweep.p) <= sweep.rows_each:
        return 0
    return weight.numel() * (sweep.wide.itemsize - weight.itemsize)


class ActedHead(torch.autograd.Function):
    """hidden (1, T, D) and a trained weight, if any -> a loss, as far as memory goes."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor | None, recorder: Recorder, schedule: Schedule) -> Tensor:
        ctx.save_for_backward(hidden, weight)
        ctx.recorder = recorder
        ctx.made = None if schedule == "lazy" else _gradients(hidden, weight)  # frozen: dlogp/dhidden
        loss = hidden.new_empty(())
        recorder.head_at_work()
        return loss

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight = ctx.saved_tensors
        made, ctx.made = ctx.made, None
        if made is None:
            made = _gradients(hidden, weight)
            ctx.recorder.head_at_work()
        elif weight is None:
            made = torch.empty_like(hidden), None
        return *made, None, None


def _gradients(hidden: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor | None]:
    return torch.empty_like(hidden), None if weight is None else torch.empty_like(weight)
