"""The schedules of the head: in which order tiles are visited, and what is kept for the backward pass.

  statistics  no gradient is wanted: fold every tile                              G
  frozen      the head needs none and only logp carries one: the same pass        2 G, any loss of any unit
              sums U = dlogp/dhidden = W_y - sum_v p_v W_v, rescaled as the
              running maximum moves (as flash attention does); backward is
              dlogp[:, None] * U
  eager       whole units fit in the workspace: statistics, the loss and its      3 G (2 G with the weight frozen)
              gradient, and both products, while a chunk's logits are held; of
              logp alone, what the frozen schedule sums is kept in their place
  lazy        otherwise, and for `token_stats`: backward computes the tiles       4 G (3 G with the weight frozen)
              again and needs only what the statistics left, (T,) numbers

Same kernels, same loss, same numbers in each. A LoRA on the head (low, b) adds its own products to each, of order
T r V, and trains beside a frozen weight: dlow and db are summed where dW would be, which then is not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastpost.chunk import Totals, fold_chunk, grad_chunk, keep_chunk
from fastpost.equation import Loss
from fastpost.gemm import exact_products
from fastpost.kept import Kept
from fastpost.once import differentiable_once
from fastpost.quantised import Quantised, Weight
from fastpost.shard import add_up, target_rows
from fastpost.sweep import Chunk, Operands, Problem, Sweep, put
from fastpost.types import NEEDS_REFERENCE, OUTPUTS, Batch, Stats

ROWS = 4096  # of a (T, D) tensor that are rescaled together: what fp32 needs meanwhile is bounded
PASS = {"cpu": 1 << 18, "cuda": 1 << 24}  # numbers of a gradient that are converted together: on a CPU, in cache


def _totals(s: Sweep, needs: Sequence[bool], *, visited: bool, final: bool = True) -> Totals:
    """The accumulators: of dW one in fp32 and no other (V, D) tensor, or if one chunk is all, and it is to be `final`,
    one in the weight's own dtype. The first chunk writes it, if any is `visited`."""
    _, weight, *others = (x if need else None for x, need in zip(s.operands, needs, strict=True))
    dweight = None
    if isinstance(weight, Tensor):
        dtype = weight.dtype if final and len(s.p) <= s.rows_each else s.wide
        dweight = torch.empty(weight.shape, dtype=dtype, device=s.device)
        if not visited:
            dweight.zero_()
    return Totals(dweight, *(None if x is None else _zeros(s, *x.shape) for x in others))


def _zeros(s: Sweep, *shape: int) -> Tensor:
    return torch.zeros(shape, dtype=s.wide, device=s.device)


def _scaled(x: Tensor, g: Tensor | None, dtype: torch.dtype) -> Tensor:
    """g * x in another dtype, without a second tensor of x's size and precision."""
    if g is None and x.dtype == dtype:
        return x
    out = torch.empty_like(x, dtype=dtype)
    rows = max(1, PASS["cpu" if x.device.type == "cpu" else "cuda"] // max(1, x[:1].numel()))
    for part, result in zip(x.split(rows), out.split(rows), strict=True):
        result.copy_(part if g is None else part * g)
    return out


def _of_dtype(total: Tensor | None, like: Weight | None) -> Tensor | None:
    return _scaled(total, None, like.dtype) if total is not None and isinstance(like, Tensor) else None


def _cut(values: Mapping[str, Tensor], rows: slice) -> dict[str, Tensor]:
    return {name: value[rows] for name, value in values.items()}


def _join(parts: list[dict[str, Tensor]], s: Sweep) -> dict[str, Tensor]:
    """The chunks' statistics end to end; with no row kept, empty ones."""
    if parts:
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    empty = torch.empty(0, dtype=s.wide, device=s.device)
    return {name: empty.bool() if name == "top1" else empty.clone() for name in (*s.p.names, "lse")}


def statistics(p: Problem, operands: Operands) -> dict[str, Tensor]:
    """Every statistic that is wanted, and what their gradients will need. G."""
    with exact_products(operands.hidden.device), torch.no_grad():
        s = Sweep(p, operands, held="jsd" in p.row_wants)
        return _join([fold_chunk(s, s.open(rows)) for rows in s.chunks()], s)


def _dlogp(s: Sweep, chunk: Chunk, stats: Mapping[str, Tensor], of_target: Tensor, mean: Tensor) -> Tensor:  # (R, K)
    """dlogp/dx = (1 - p_y) dz_y/dlogit_y Y_y - sum over v != y of p_v dz_v/dlogit_v Y_v, where x @ Y.T is in the
    logits."""
    slope, inverse = -torch.expm1(stats["logp"]), chunk.inverse_temperature
    if s.p.softcap is not None:  # z_y's own; the other columns had theirs in the sum
        slope *= 1 - (stats["logit"] / s.p.softcap).square()
    out = of_target.to(s.wide, copy=True).mul_(slope[:, None])
    out.sub_(mean).mul_(s.p.scale if inverse is None else (s.p.scale * inverse)[:, None])
    add_up(out, s.p.shard)
    return out


class FrozenLogp(torch.autograd.Function):
    """Statistics of which logp alone carries a gradient, already made: U = dlogp/dhidden (N, D). 2 G."""

    @staticmethod
    def forward(
        ctx, hidden: Tensor, weight: Weight, bias: Tensor | None, low: Tensor | None, b: Tensor | None, p: Problem
    ) -> tuple[Tensor, ...]:
        with exact_products(hidden.device):
            s = Sweep(p, Operands(hidden, weight, bias, low, b), held="jsd" in p.row_wants)
            U = torch.empty(len(p), s.D, dtype=hidden.dtype, device=hidden.device)
            U_low = None if low is None else torch.empty_like(low)
            parts = []
            for rows in s.chunks():
                chunk = s.open(rows)
                mean = _zeros(s, len(chunk.target), s.D)
                mean_low = None if chunk.low is None else torch.zeros_like(chunk.low)
                stats = fold_chunk(s, chunk, mean, mean_low)
                of_target = target_rows(weight, chunk.target, p.shard).to(p.dtype)
                U[rows] = _dlogp(s, chunk, stats, of_target, mean)
                if U_low is not None and mean_low is not None and b is not None:
                    of_target = target_rows(b, chunk.target, p.shard)
                    U_low[rows] = _dlogp(s, chunk, stats, of_target, mean_low)
                parts.append(stats)
        values = _join(parts, s)
        ctx.save_for_backward(U, U_low)
        ctx.p, ctx.like = p, (hidden.shape, hidden.dtype)
        ctx.mark_non_differentiable(*(values[name] for name in p.names if name != "logp"))
        return tuple(values[name] for name in p.names)

    @staticmethod
    @differentiable_once
    def backward(ctx, *upstream: Tensor):
        (U, U_low), dlogp = ctx.saved_tensors, upstream[ctx.p.names.index("logp")]
        shape, dtype = ctx.like
        dhidden = torch.zeros(shape, dtype=dtype, device=U.device)
        for start in range(0, len(U), ROWS):
            rows = slice(start, min(start + ROWS, len(U)))
            put(dhidden, ctx.p.index, rows, U[rows] * dlogp[rows, None])
        return dhidden, None, None, None if U_low is None else U_low * dlogp[:, None], None, None


class LazyStats(torch.autograd.Function):
    """Statistics as autograd tensors: backward visits the tiles a second time. 4 G, or 3 G with a frozen weight."""

    @staticmethod
    def forward(
        ctx, hidden: Tensor, weight: Weight, bias: Tensor | None, low: Tensor | None, b: Tensor | None, p: Problem
    ) -> tuple[Tensor, ...]:
        values = statistics(p, Operands(hidden, weight, bias, low, b))
        out = tuple(values[name] for name in p.names)
        ctx.quantised = weight if isinstance(weight, Quantised) else None
        ctx.save_for_backward(hidden, None if isinstance(weight, Quantised) else weight, bias, low, b, *out)
        ctx.p = p
        ctx.unseen = {name: x for name, x in values.items() if name not in p.names}
        ctx.mark_non_differentiable(*(x for x in out if not x.is_floating_point()))
        ctx.set_materialize_grads(False)
        return out

    @staticmethod
    @differentiable_once
    def backward(ctx, *upstream: Tensor | None):
        hidden, weight, bias, low, b, *out = ctx.saved_tensors
        operands = Operands(hidden, weight if ctx.quantised is None else ctx.quantised, bias, low, b)
        p, values = ctx.p, ctx.unseen | dict(zip(ctx.p.names, out, strict=True))
        d = {n: g for n, g in zip(ctx.p.names, upstream, strict=True) if g is not None and n != "top1"}
        if not NEEDS_REFERENCE & d.keys():
            p = replace(p, reference=None)  # its tiles were for the values
        with exact_products(operands.hidden.device):
            s = Sweep(p, operands, held=False)
            totals = _totals(s, ctx.needs_input_grad[:5], visited=bool(d) and len(p) > 0)
            dhidden = None
            if ctx.needs_input_grad[0]:
                dhidden = torch.zeros_like(operands.hidden, memory_format=torch.contiguous_format)
            for rows in s.chunks() if d else ():
                total = None if dhidden is None else _zeros(s, rows.stop - rows.start, s.D)
                stats, slopes = _cut(values, rows), {n: g.to(s.wide) for n, g in _cut(d, rows).items()}
                grad_chunk(s, s.open(rows), stats, slopes, total, totals)
                if dhidden is not None and total is not None:
                    put(dhidden, p.index, rows, total)
        return dhidden, *(_of_dtype(total, x) for total, x in zip(totals, operands[1:], strict=True)), None


@dataclass(frozen=True)
class Part:
    """Whole units of a batch whose rows fit in one held chunk."""

    rows: slice  # of the kept
    units: slice
    batch: Batch  # of these rows alone


def _spare(weight: Weight) -> int:
    """Bytes. A trained weight's gradient will be returned beside its fp32 accumulator: until then that much may be
    filled, and each chunk more of rows saves a pass over the accumulator."""
    return weight.nbytes if isinstance(weight, Tensor) and weight.requires_grad else 0


def _holds(dtype: torch.dtype | None) -> bool:
    """fp16 cannot hold a gradient before the caller's loss scale has multiplied it."""
    return dtype != torch.float16


def _hidden_gradient(hidden: Tensor) -> Tensor:
    dtype = hidden.dtype if _holds(hidden.dtype) else torch.float32
    return torch.zeros(hidden.shape, dtype=dtype, device=hidden.device)


def _times_upstream(ctx, g: Tensor) -> tuple[Tensor | None, ...]:
    """The gradients that were saved, in the dtypes of what they are gradients of."""
    saved = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
    return (*(None if x is None else _scaled(x, g, dtype) for x, dtype in saved), None)


class EagerLoss(torch.autograd.Function):
    """The loss, all its gradients and its statistics in one sweep of whole units, whose logits are held. 3 G, or 2 G
    with a frozen weight."""

    @staticmethod
    def sweep(p: Problem, operands: Operands) -> Sweep:
        return Sweep(p, operands, held=True, spare=_spare(operands.weight))

    @staticmethod
    def forward(
        ctx, hidden: Tensor, weight: Weight, bias: Tensor | None, low: Tensor | None, b: Tensor | None, plan: Plan
    ) -> tuple[Tensor, ...]:
        p, operands = plan.problem, Operands(hidden, weight, bias, low, b)
        with exact_products(hidden.device):
            s = EagerLoss.sweep(p, operands)
            totals = _totals(s, ctx.needs_input_grad[:5], visited=len(p) > 0, final=_holds(weight.dtype))
            dhidden = _hidden_gradient(hidden) if ctx.needs_input_grad[0] else None
            total = _zeros(s)
            parts = []
            for part in plan.parts(s.rows_each):
                chunk = s.open(part.rows)
                stats = fold_chunk(s, chunk)
                value, d = plan.loss_and_grads(stats, part)
                total += value
                rows = None if dhidden is None else _zeros(s, len(chunk.target), s.D)
                grad_chunk(s, chunk, stats, d, rows, totals)
                if dhidden is not None and rows is not None:
                    put(dhidden, p.index, part.rows, rows)
                parts.append(stats)
        values = _join(parts, s)
        ctx.save_for_backward(dhidden, *totals)
        ctx.dtypes = tuple(None if x is None else x.dtype for x in operands)
        out = tuple(values[name] for name in p.names)
        ctx.mark_non_differentiable(*out)
        return total, *out

    @staticmethod
    @differentiable_once
    def backward(ctx, g: Tensor, *_: Tensor):
        return _times_upstream(ctx, g)


class EagerLogp(torch.autograd.Function):
    """EagerLoss where logp alone carries a gradient: U as in the frozen schedule, and dW from what U was made of, which
    is kept where dW will be if one chunk is all. 3 G, and the weight is read once."""

    @staticmethod
    def sweep(p: Problem, operands: Operands) -> Sweep:
        plain = Sweep(p, operands, held=False)
        if _kept_in_place(plain):
            return plain
        return Sweep(p, operands, held=False, keeps=True, spare=_spare(operands.weight))

    @staticmethod
    def forward(
        ctx, hidden: Tensor, weight: Weight, bias: Tensor | None, low: Tensor | None, b: Tensor | None, plan: Plan
    ) -> tuple[Tensor, ...]:
        p, operands = plan.problem, Operands(hidden, weight, bias, low, b)
        with exact_products(hidden.device):
            s = EagerLogp.sweep(p, operands)
            totals = _totals(s, ctx.needs_input_grad[:5], visited=len(p) > 0, final=_holds(weight.dtype))
            dhidden = _hidden_gradient(hidden) if ctx.needs_input_grad[0] else None
            in_place = _kept_in_place(s)
            total = _zeros(s)
            parts = []
            for part in plan.parts(s.rows_each):
                chunk = s.open(part.rows)
                there = totals.weight if in_place else None
                kept = Kept(s.kept_room(chunk) if there is None else there.view(s.gemm.tile_dtype), in_place)
                U = None if dhidden is None else _zeros(s, len(chunk.target), s.D)
                U_low = None if chunk.low is None or totals.low is None else torch.zeros_like(chunk.low)
                stats = fold_chunk(s, chunk, U, U_low, kept)
                value, d = plan.loss_and_grads(stats, part)
                total += value
                dlogp = d.get("logp", torch.zeros_like(stats["logp"]))
                keep_chunk(s, chunk, kept, stats, dlogp, totals)
                if dhidden is not None and U is not None:
                    of_target = target_rows(weight, chunk.target, p.shard).to(p.dtype)
                    put(dhidden, p.index, part.rows, _dlogp(s, chunk, stats, of_target, U) * dlogp[:, None])
                if totals.low is not None and U_low is not None and b is not None:
                    of_target = target_rows(b, chunk.target, p.shard)
                    totals.low[part.rows] = _dlogp(s, chunk, stats, of_target, U_low) * dlogp[:, None]
                parts.append(stats)
        values = _join(parts, s)
        ctx.save_for_backward(dhidden, *totals)
        ctx.dtypes = tuple(None if x is None else x.dtype for x in operands)
        out = tuple(values[name] for name in p.names)
        ctx.mark_non_differentiable(*out)
        return total, *out

    @staticmethod
    @differentiable_once
    def backward(ctx, g: Tensor, *_: Tensor):
        return _times_upstream(ctx, g)


def _kept_in_place(s: Sweep) -> bool:
    """Whether one chunk is all, and each block of dW, in the weight's own dtype, has the room for its tile."""
    weight, size = s.operands.weight, s.gemm.tile_dtype.itemsize
    if not isinstance(weight, Tensor) or not weight.requires_grad or not _holds(weight.dtype):
        return False
    row = s.D * weight.itemsize
    return 0 < len(s.p) <= s.rows_each and len(s.p) * size <= row and row % size == 0


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
