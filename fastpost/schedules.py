"""The schedules of the head: in which order tiles are visited, and what is kept for the backward pass.

  statistics  no gradient is wanted: fold every tile                              G
  frozen      the weight needs none and only logp carries one: the same pass      2 G, any loss of any unit
              sums U = dlogp/dhidden = W_y - sum_v p_v W_v, rescaled as the
              running maximum moves (as flash attention does); backward is
              dlogp[:, None] * U
  eager       whole units fit in the workspace: statistics, the loss and its      3 G (2 G with the weight frozen)
              gradient, and both products, while a chunk's logits are held
  lazy        otherwise, and for `token_stats`: backward computes the tiles       4 G (3 G with the weight frozen)
              again and needs only what the statistics left, (T,) numbers

Same kernels, same loss, same numbers in each.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastpost.chunk import Totals, fold_chunk, grad_chunk
from fastpost.equation import Loss
from fastpost.gemm import exact_products
from fastpost.sweep import Problem, Sweep
from fastpost.types import NEEDS_REFERENCE, OUTPUTS, Batch, Stats

ROWS = 4096  # of a (T, D) or (V, D) tensor that are rescaled together: what fp32 needs meanwhile is bounded


def _totals(s: Sweep, weight: bool, bias: bool) -> Totals:
    """The accumulators: one for dW in fp32 whatever the weight's dtype, and no other (V, D) tensor."""
    return Totals(_zeros(s, s.V, s.D) if weight else None, _zeros(s, s.V) if bias else None)


def _zeros(s: Sweep, *shape: int) -> Tensor:
    return torch.zeros(shape, dtype=s.wide, device=s.device)


def _put(dhidden: Tensor, p: Problem, rows: slice, values: Tensor) -> None:
    """The gradient of kept rows, in their places."""
    if p.index is None:
        dhidden[rows] = values.to(dhidden.dtype)
    else:
        dhidden.index_copy_(0, p.index[rows], values.to(dhidden.dtype))


def _scaled(x: Tensor, g: Tensor, dtype: torch.dtype) -> Tensor:
    """g * x in another dtype, without a second tensor of x's size and precision."""
    out = torch.empty_like(x, dtype=dtype)
    for part, result in zip(x.split(ROWS), out.split(ROWS), strict=True):
        result.copy_(part * g)
    return out


def _cut(values: Mapping[str, Tensor], rows: slice) -> dict[str, Tensor]:
    return {name: value[rows] for name, value in values.items()}


def _join(parts: list[dict[str, Tensor]], s: Sweep) -> dict[str, Tensor]:
    """The chunks' statistics end to end; with no row kept, empty ones."""
    if parts:
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    empty = torch.empty(0, dtype=s.wide, device=s.device)
    return {name: empty.bool() if name == "top1" else empty.clone() for name in (*s.p.names, "lse")}


def statistics(p: Problem, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> dict[str, Tensor]:
    """Every statistic that is wanted, and what their gradients will need. G."""
    with exact_products(hidden.device), torch.no_grad():
        s = Sweep(p, weight, bias, held="jsd" in p.row_wants)
        return _join([fold_chunk(s, s.open(hidden, rows)) for rows in s.chunks()], s)


class _Once(torch.autograd.Function):
    """A gradient that cannot be differentiated again."""

    @staticmethod
    def forward(ctx, gradient: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx, *upstream: Tensor):
        raise RuntimeError("a gradient of the head has none of its own: the head is differentiable once")


def differentiable_once(backward: Callable) -> Callable:
    """A second derivative is refused. torch's once_differentiable takes it for zero where the upstream is constant."""

    @functools.wraps(backward)
    def checked(ctx, *upstream):
        with torch.no_grad():
            gradients = backward(ctx, *upstream)
        if not torch.is_grad_enabled():
            return gradients
        return tuple(None if x is None else _Once.apply(x.requires_grad_()) for x in gradients)

    return checked


class FrozenLogp(torch.autograd.Function):
    """Statistics of which logp alone carries a gradient, already made: U = dlogp/dhidden (N, D). 2 G."""

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, bias: Tensor | None, p: Problem) -> tuple[Tensor, ...]:
        with exact_products(hidden.device):
            s = Sweep(p, weight, bias, held="jsd" in p.row_wants)
            U = torch.empty(len(p), s.D, dtype=hidden.dtype, device=hidden.device)
            parts = []
            for rows in s.chunks():
                chunk = s.open(hidden, rows)
                mean = _zeros(s, rows.stop - rows.start, s.D)
                stats = fold_chunk(s, chunk, mean)
                picked = weight.index_select(0, chunk.target).to(p.dtype).to(s.wide)
                if p.softcap is not None:  # z_y's own slope; the other columns had theirs in the sum
                    picked *= (1 - (stats["logit"] / p.softcap).square())[:, None]
                slope = p.scale if chunk.inverse_temperature is None else (p.scale * chunk.inverse_temperature)[:, None]
                U[rows] = picked.sub_(mean).mul_(slope)
                parts.append(stats)
        values = _join(parts, s)
        ctx.save_for_backward(U)
        ctx.p, ctx.like = p, (hidden.shape, hidden.dtype)
        ctx.mark_non_differentiable(*(values[name] for name in p.names if name != "logp"))
        return tuple(values[name] for name in p.names)

    @staticmethod
    @differentiable_once
    def backward(ctx, *upstream: Tensor):
        (U,), dlogp = ctx.saved_tensors, upstream[ctx.p.names.index("logp")]
        shape, dtype = ctx.like
        dhidden = torch.zeros(shape, dtype=dtype, device=U.device)
        for start in range(0, len(U), ROWS):
            rows = slice(start, min(start + ROWS, len(U)))
            _put(dhidden, ctx.p, rows, U[rows] * dlogp[rows, None])
        return dhidden, None, None, None


class LazyStats(torch.autograd.Function):
    """Statistics as autograd tensors: backward visits the tiles a second time. 4 G, or 3 G with a frozen weight."""

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, bias: Tensor | None, p: Problem) -> tuple[Tensor, ...]:
        values = statistics(p, hidden, weight, bias)
        out = tuple(values[name] for name in p.names)
        ctx.save_for_backward(hidden, weight, bias, *out)
        ctx.p = p
        ctx.unseen = {name: x for name, x in values.items() if name not in p.names}
        ctx.mark_non_differentiable(*(x for x in out if not x.is_floating_point()))
        ctx.set_materialize_grads(False)
        return out

    @staticmethod
    @differentiable_once
    def backward(ctx, *upstream: Tensor | None):
        hidden, weight, bias, *out = ctx.saved_tensors
        p, values = ctx.p, ctx.unseen | dict(zip(ctx.p.names, out, strict=True))
        d = {n: g for n, g in zip(ctx.p.names, upstream, strict=True) if g is not None and n != "top1"}
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        if not NEEDS_REFERENCE & d.keys():
            p = replace(p, reference=None)  # its tiles were for the values
        with exact_products(hidden.device):
            s = Sweep(p, weight, bias, held=False)
            totals = _totals(s, need_weight, need_bias)
            dhidden = torch.zeros_like(hidden, memory_format=torch.contiguous_format) if need_hidden else None
            for rows in s.chunks() if d else ():
                total = _zeros(s, rows.stop - rows.start, s.D) if need_hidden else None
                stats, slopes = _cut(values, rows), {n: g.to(s.wide) for n, g in _cut(d, rows).items()}
                grad_chunk(s, s.open(hidden, rows), stats, slopes, total, totals)
                if dhidden is not None and total is not None:
                    _put(dhidden, p, rows, total)
        return (
            dhidden,
            None if totals.weight is None else totals.weight.to(weight.dtype),
            None if totals.bias is None or bias is None else totals.bias.to(bias.dtype),
            None,
        )


@dataclass(frozen=True)
class Part:
    """Whole units of a batch whose rows fit in one held chunk."""

    rows: slice  # of the kept
    units: slice
    batch: Batch  # of these rows alone


class EagerLoss(torch.autograd.Function):
    """The loss, all its gradients and its statistics in one sweep of whole units. 3 G, or 2 G with a frozen weight."""

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, bias: Tensor | None, plan: Plan) -> tuple[Tensor, ...]:
        p = plan.problem
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        # fp16 cannot hold a gradient before the caller's loss scale has multiplied it.
        keep = torch.float32 if hidden.dtype == torch.float16 else hidden.dtype
        with exact_products(hidden.device):
            s = Sweep(p, weight, bias, held=True)
            totals = _totals(s, need_weight, need_bias)
            dhidden = torch.zeros(hidden.shape, dtype=keep, device=hidden.device) if need_hidden else None
            total = _zeros(s)
            parts = []
            for part in plan.parts(s.rows_each):
                chunk = s.open(hidden, part.rows)
                stats = fold_chunk(s, chunk)
                value, d = plan.loss_and_grads(stats, part)
                total += value
                rows = _zeros(s, len(chunk.target), s.D) if need_hidden else None
                grad_chunk(s, chunk, stats, d, rows, totals)
                if dhidden is not None and rows is not None:
                    _put(dhidden, p, part.rows, rows)
                parts.append(stats)
        values = _join(parts, s)
        ctx.save_for_backward(dhidden, totals.weight, totals.bias)
        ctx.dtypes = hidden.dtype, weight.dtype, None if bias is None else bias.dtype
        out = tuple(values[name] for name in p.names)
        ctx.mark_non_differentiable(*out)
        return total, *out

    @staticmethod
    @differentiable_once
    def backward(ctx, g: Tensor, *_: Tensor):
        scaled = (
            None if x is None else _scaled(x, g, dtype) for x, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        return (*scaled, None)


@dataclass(frozen=True)
class Plan:
    """A loss over the kept rows of a batch: what each chunk computes, and where units may be cut."""

    problem: Problem
    loss: Loss  # bound
    batch: Batch  # kept rows only
    weight: Tensor  # (U,), of the kept rows' units
    mask: Tensor | None  # (N,) bool, as Door.kept: rows that are here but count for nothing
    names: dict[str, str]  # a statistic, as the loss reads it -> its name in the sweep

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
        carrying = {self.names[name] for name in self.loss.differentiates}
        with torch.enable_grad():
            leaves = {n: x.detach().requires_grad_(n in carrying) for n, x in stats.items()}
            value = self.weighted(leaves, part.batch, part.units)
        if not value.requires_grad:
            return value, {}
        names = sorted(carrying)
        grads = torch.autograd.grad(value, [leaves[n] for n in names], allow_unused=True)
        return value.detach(), {n: g for n, g in zip(names, grads, strict=True) if g is not None}

    def ends(self) -> list[tuple[int, int]] | None:
        """(sequences, rows) after which each unit ends; None where a unit is a token and any row may be the last."""
        if self.loss.unit == "token":
            return None
        each = {"sequence": 1, "pair": 2, "batch": max(1, self.batch.lengths.numel())}[self.loss.unit]
        ends = torch.cumsum(self.batch.lengths, 0).tolist()
        return [(i + 1, ends[i]) for i in range(each - 1, len(ends), each)]

    def longest_unit(self) -> int:
        ends = self.ends()
        return 1 if ends is None else max(b - a for (_, a), (_, b) in zip([(0, 0), *ends], ends, strict=False))

    def parts(self, most_rows: int) -> list[Part]:
        """As many whole units to a part as fit in `most_rows`."""
        N, ends = len(self.batch.target), self.ends()
        if ends is None:
            spans = [slice(a, min(a + most_rows, N)) for a in range(0, N, most_rows)]
            return [Part(rows, rows, self.batch.tokens(rows)) for rows in spans]
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
