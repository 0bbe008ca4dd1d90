"""The eager schedule: statistics, a loss and all its gradients, by chunks of whole units, before backward is called.

  held   a chunk's logits stay while the loss is made of its statistics, and become gradients: any statistic
  kept   where logp alone carries a gradient: U as in the frozen schedule, and dW from what U was made of, which stays
         instead (`core.kept`), if one chunk is all where dW will be. Half the room, and the weight is read once

3 G, or 2 G with the weight frozen. The first backward hands the gradients over, so that no second (V, D) tensor is made
beside them; another one, of a graph that was retained, makes them anew.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fastpost.core.chunk import Totals, fold_chunk, grad_chunk, keep_chunk
from fastpost.core.gemm import exact_products
from fastpost.core.kept import Kept
from fastpost.core.once import differentiable_once
from fastpost.core.problem import Operands, Problem, put
from fastpost.core.quantised import Quantised, Weight
from fastpost.core.schedules import dlogp_rows, join_parts, scaled, totals_of, zeros
from fastpost.core.shard import target_rows
from fastpost.core.sweep import Sweep
from fastpost.equation import Loss
from fastpost.types import OUTPUTS, Batch, Stats


@dataclass(frozen=True)
class Part:
    """Whole units of a batch whose rows fit in one held chunk."""

    rows: slice  # of the kept
    units: slice
    batch: Batch  # of these rows alone


@dataclass(frozen=True)
class Plan:
    """A loss over the kept rows of a batch: what each chunk computes, and where units may be cut."""

    problem: Problem
    loss: Loss  # bound
    batch: Batch  # kept rows only
    weight: Tensor  # (U,), of the kept rows' units
    mask: Tensor | None  # (N,) bool, as Door.kept: rows that are here but count for nothing
    names: dict[str, str]  # a statistic, as the loss reads it -> its name in the sweep

    @property
    def carrying(self) -> set[str]:
        """The statistics through which a gradient flows, by their names in the sweep."""
        return {self.names[name] for name in self.loss.differentiates}

    @property
    def of_logp_alone(self) -> bool:
        p = self.problem
        return self.carrying <= {"logp"} and p.teacher is None and "jsd" not in p.row_wants

    def weighted(self, stats: Mapping[str, Tensor], batch: Batch, units: slice) -> Tensor:
        """sum of weight * loss over the units that have a token."""
        weight, kept = self.weight[units], batch.kept_units(self.loss.unit)
        kept = kept if self.mask is None else kept & self.mask[units]
        seen = {name: stats[self.names[name]] for name in self.loss.reads}
        seen |= {name: x.detach() for name, x in seen.items() if name not in self.loss.differentiates}
        loss = self.loss.on_kept(Stats(**{OUTPUTS[name]: x for name, x in seen.items()}), batch)
        return (torch.where(kept, weight, 0.0) * torch.where(kept, loss, 0.0)).sum()

    def loss_and_grads(self, stats: Mapping[str, Tensor], part: Part) -> tuple[Tensor, dict[str, Tensor]]:
        """The chunk's share of the loss and dL/dstatistics: all of it on (R,) numbers, so plain autograd is free."""
        carrying = self.carrying
        with torch.enable_grad():
            leaves = {n: x.detach().requires_grad_(n in carrying) for n, x in stats.items()}
            value = self.weighted(leaves, part.batch, part.units)
        if not value.requires_grad:
            return value, {}
        names = sorted(carrying)
        grads = torch.autograd.grad(value, [leaves[n] for n in names], allow_unused=True)
        return value.detach(), {n: g for n, g in zip(names, grads, strict=True) if g is not None}

    @functools.cached_property
    def ends(self) -> list[tuple[int, int]] | None:
        """(sequences, rows) after which each unit ends; None where a unit is a token and any row may be the last."""
        if self.loss.unit == "token":
            return None
        each = {"sequence": 1, "pair": 2, "batch": max(1, self.batch.lengths.numel())}[self.loss.unit]
        ends = torch.cumsum(self.batch.lengths, 0).tolist()
        return [(i + 1, ends[i]) for i in range(each - 1, len(ends), each)]

    def longest_unit(self) -> int:
        ends = self.ends
        return 1 if ends is None else max(b - a for (_, a), (_, b) in zip([(0, 0), *ends], ends, strict=False))

    def parts(self, s: Sweep) -> list[Part]:
        """As many whole units to a part as fit in a chunk."""
        ends, most_rows = self.ends, s.rows_each
        if ends is None:
            return [Part(rows, rows, self.batch.tokens(rows)) for rows in s.chunks()]
        parts, first, (sequences, row) = [], 0, (0, 0)
        for unit, (_, end) in enumerate(ends):
            last = unit + 1 == len(ends)
            if last or ends[unit + 1][1] - row > most_rows:
                rows = slice(row, end)
                if end > row:
                    batch = self.batch.slice(sequences, ends[unit][0], row, end)
                    parts.append(Part(rows, slice(first, unit + 1), batch))
                first, (sequences, row) = unit + 1, ends[unit]
        return parts


class Made(NamedTuple):
    """What a call made."""

    total: Tensor  # () the loss
    values: dict[str, Tensor]  # (N,) statistics
    dhidden: Tensor | None  # (T, D)
    totals: Totals


def eager_sweep(p: Problem, operands: Operands, *, kept: bool) -> Sweep:
    """A trained weight's gradient will be returned beside its fp32 accumulator: until then that much may be filled, and
    each chunk more of rows saves a pass over the accumulator."""
    weight, spare = operands.weight, 0
    if isinstance(weight, Tensor) and weight.requires_grad:
        rows = len(weight) if p.shard is None else max(p.shard.sizes)  # all ranks must cut the same chunks
        spare = rows * weight.shape[1] * weight.itemsize
    if not kept:
        return Sweep(p, operands, held=True, spare=spare)
    plain = Sweep(p, operands, held=False)
    return plain if _in_place(plain) else Sweep(p, operands, held=False, keeps=True, spare=spare)


def fits(plan: Plan, operands: Operands) -> bool:
    """Whether the schedule can be used: every unit within a chunk, and no gradient in fp16, which cannot hold one
    before the caller's loss scale has multiplied it."""
    narrow = any(isinstance(x, Tensor) and x.dtype == torch.float16 for x in operands)
    if narrow or plan.problem.dtype == torch.float16:
        return False
    return plan.longest_unit() <= eager_sweep(plan.problem, operands, kept=plan.of_logp_alone).rows_each


def _in_place(s: Sweep) -> bool:
    """Whether what is kept goes where dW, in the weight's own dtype, will be."""
    weight = s.operands.weight
    if not isinstance(weight, Tensor) or not weight.requires_grad:
        return False
    return fits_in_gradient(len(s.p), s.rows_each, s.gemm.tile_dtype.itemsize, s.D * weight.itemsize)


def fits_in_gradient(rows: int, rows_each: int, logit_bytes: int, row_bytes: int) -> bool:
    """Whether one chunk is all, and a row of dW has the room for what is kept of a column of logits."""
    return 0 < rows <= rows_each and rows * logit_bytes <= row_bytes and row_bytes % logit_bytes == 0


def _room(s: Sweep, needs: Sequence[bool]) -> tuple[Tensor | None, Totals]:
    """Where gradients go."""
    x = s.operands.hidden
    dhidden = torch.zeros(x.shape, dtype=x.dtype, device=x.device) if needs[0] else None
    return dhidden, totals_of(s, needs, visited=len(s.p) > 0)


def _held(s: Sweep, plan: Plan, needs: Sequence[bool]) -> Made:
    (dhidden, totals), total, parts = _room(s, needs), zeros(s), []
    for part in plan.parts(s):
        chunk = s.open(part.rows)
        stats = fold_chunk(s, chunk)
        value, d = plan.loss_and_grads(stats, part)
        total += value
        rows = None if dhidden is None else zeros(s, len(chunk.target), s.D)
        grad_chunk(s, chunk, stats, d, rows, totals)
        if dhidden is not None and rows is not None:
            put(dhidden, s.p.index, part.rows, rows)
        parts.append(stats)
    return Made(total, join_parts(parts, s), dhidden, totals)


def _kept(s: Sweep, plan: Plan, needs: Sequence[bool]) -> Made:
    (dhidden, totals), total, parts, p, x = _room(s, needs), zeros(s), [], s.p, s.operands
    there = totals.weight.view(s.gemm.tile_dtype) if totals.weight is not None and _in_place(s) else None
    for part in plan.parts(s):
        chunk = s.open(part.rows)
        kept = Kept(s.kept_room(chunk) if there is None else there)
        U = None if dhidden is None else zeros(s, len(chunk.target), s.D)
        U_low = None if chunk.low is None or totals.low is None else torch.zeros_like(chunk.low)
        stats = fold_chunk(s, chunk, U, U_low, kept)
        value, d = plan.loss_and_grads(stats, part)
        total += value
        dlogp = d.get("logp", torch.zeros_like(stats["logp"]))
        keep_chunk(s, chunk, kept, stats, dlogp, totals)
        if dhidden is not None and U is not None:
            of_target = target_rows(x.weight, chunk.target, p.shard).to(p.dtype)
            put(dhidden, p.index, part.rows, dlogp_rows(s, chunk, stats, of_target, U) * dlogp[:, None])
        if totals.low is not None and U_low is not None and x.b is not None:
            of_target = target_rows(x.b, chunk.target, p.shard)
            totals.low[part.rows] = dlogp_rows(s, chunk, stats, of_target, U_low) * dlogp[:, None]
        parts.append(stats)
    return Made(total, join_parts(parts, s), dhidden, totals)


def _make(plan: Plan, operands: Operands, needs: Sequence[bool]) -> Made:
    with exact_products(operands.hidden.device), torch.no_grad():
        kept = plan.of_logp_alone
        return (_kept if kept else _held)(eager_sweep(plan.problem, operands, kept=kept), plan, needs)


class EagerLoss(torch.autograd.Function):
    """The loss, and its statistics."""

    @staticmethod
    def forward(
        ctx, hidden: Tensor, weight: Weight, bias: Tensor | None, low: Tensor | None, b: Tensor | None, plan: Plan
    ) -> tuple[Tensor, ...]:
        made = _make(plan, Operands(hidden, weight, bias, low, b), ctx.needs_input_grad[:5])
        ctx.plan, ctx.gradients = plan, (made.dhidden, *made.totals)
        ctx.dtypes = hidden.dtype, *(None if x is None else x.dtype for x in (weight, bias, low, b))
        ctx.quantised = weight if isinstance(weight, Quantised) else None
        ctx.save_for_backward(hidden, None if isinstance(weight, Quantised) else weight, bias, low, b)
        out = tuple(made.values[name] for name in plan.problem.names)
        ctx.mark_non_differentiable(*out)
        return made.total, *out

    @staticmethod
    @differentiable_once
    def backward(ctx, g: Tensor, *_: Tensor):
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:  # given away before
            hidden, weight, *rest = ctx.saved_tensors
            operands = Operands(hidden, weight if ctx.quantised is None else ctx.quantised, *rest)
            made = _make(ctx.plan, operands, ctx.needs_input_grad[:5])
            gradients = (made.dhidden, *made.totals)
        found = zip(gradients, ctx.dtypes, strict=True)
        return (*(None if x is None else scaled(x, g, dtype) for x, dtype in found), None)
