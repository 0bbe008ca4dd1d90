"""The schedules of the head: in which order tiles are visited, and what is kept for the backward pass.

  statistics  no gradient is wanted: fold every tile                              G
  frozen      the head needs none and only logp carries one: the same pass        2 G, any loss of any unit
              sums U = dlogp/dhidden = W_y - sum_v p_v W_v, rescaled as the
              running maximum moves (as flash attention does); backward is
              dlogp[:, None] * U
  eager       whole units fit in the workspace: statistics, the loss and its      3 G (2 G with the weight frozen)
              gradient, and both products, one chunk at a time: eager.py
  lazy        otherwise, and for `token_stats`: backward computes the tiles       4 G (3 G with the weight frozen)
              again and needs only what the statistics left, (T,) numbers

Same kernels, same loss, same numbers in each. A LoRA on the head (low, b) adds its own products to each, of order
T r V, and trains beside a frozen weight: dlow and db are summed where dW would be, which then is not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fastpost.core.chunk import Totals, fold_chunk, grad_chunk
from fastpost.core.gemm import exact_products
from fastpost.core.once import differentiable_once
from fastpost.core.problem import Operands, Problem, put
from fastpost.core.quantised import Quantised, Weight
from fastpost.core.shard import add_up, target_rows
from fastpost.core.sweep import Chunk, Sweep, spans
from fastpost.types import NEEDS_REFERENCE

PASS = {"cpu": 1 << 18, "cuda": 1 << 24}  # numbers that are rescaled or converted together: on a CPU, in cache


def totals_of(s: Sweep, needs: Sequence[bool], *, visited: bool) -> Totals:
    """The accumulators: of dW one in fp32 and no other (V, D) tensor, or if one chunk is all one in the weight's own
    dtype. The first chunk writes it, if any is `visited`."""
    _, weight, *others = (x if need else None for x, need in zip(s.operands, needs, strict=True))
    dweight = None
    if isinstance(weight, Tensor):
        dtype = weight.dtype if len(s.p) <= s.rows_each else s.wide
        dweight = torch.empty(weight.shape, dtype=dtype, device=s.device)
        if not visited:
            dweight.zero_()
    return Totals(dweight, *(None if x is None else zeros(s, *x.shape) for x in others))


def zeros(s: Sweep, *shape: int) -> Tensor:
    return torch.zeros(shape, dtype=s.wide, device=s.device)


def scaled(x: Tensor, g: Tensor | None, dtype: torch.dtype) -> Tensor:
    """g * x in this dtype, without a second tensor of x's size and precision: in x, if it is its own."""
    if x.dtype == dtype:
        if g is None or (g.device.type == "cpu" and g.item() == 1.0):  # (to ask a GPU is to wait for it)
            return x
        return x.mul_(g)
    out = torch.empty_like(x, dtype=dtype)
    for part, result in zip(x.split(_at_once(x)), out.split(_at_once(x)), strict=True):
        result.copy_(part if g is None else part * g)
    return out


def _at_once(x: Tensor) -> int:
    """How many rows, so that what fp32 needs meanwhile is bounded."""
    return max(1, PASS["cpu" if x.device.type == "cpu" else "cuda"] // max(1, x[:1].numel()))


def _of_dtype(total: Tensor | None, like: Weight | None) -> Tensor | None:
    return scaled(total, None, like.dtype) if total is not None and isinstance(like, Tensor) else None


def _cut(values: Mapping[str, Tensor], rows: slice) -> dict[str, Tensor]:
    return {name: value[rows] for name, value in values.items()}


def join_parts(parts: list[dict[str, Tensor]], s: Sweep) -> dict[str, Tensor]:
    """The chunks' statistics end to end; with no row kept, empty ones."""
    if parts:
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    empty = torch.empty(0, dtype=s.wide, device=s.device)
    return {name: empty.bool() if name == "top1" else empty.clone() for name in (*s.p.names, "lse")}


def statistics(p: Problem, operands: Operands) -> dict[str, Tensor]:
    """Every statistic that is wanted, and what their gradients will need. G."""
    with exact_products(operands.hidden.device), torch.no_grad():
        s = Sweep(p, operands, held="jsd" in p.row_wants)
        return join_parts([fold_chunk(s, s.open(rows)) for rows in s.chunks()], s)


def dlogp_rows(
    s: Sweep, chunk: Chunk, stats: Mapping[str, Tensor], of_target: Tensor, mean: Tensor
) -> Tensor:  # (R, K)
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
                mean = zeros(s, len(chunk.target), s.D)
                mean_low = None if chunk.low is None else torch.zeros_like(chunk.low)
                stats = fold_chunk(s, chunk, mean, mean_low)
                of_target = target_rows(weight, chunk.target, p.shard).to(p.dtype)
                U[rows] = dlogp_rows(s, chunk, stats, of_target, mean)
                if U_low is not None and mean_low is not None and b is not None:
                    of_target = target_rows(b, chunk.target, p.shard)
                    U_low[rows] = dlogp_rows(s, chunk, stats, of_target, mean_low)
                parts.append(stats)
        values = join_parts(parts, s)
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
        for rows in spans(len(U), _at_once(U)):
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
            totals = totals_of(s, ctx.needs_input_grad[:5], visited=bool(d) and len(p) > 0)
            dhidden = None
            if ctx.needs_input_grad[0]:
                dhidden = torch.zeros_like(operands.hidden, memory_format=torch.contiguous_format)
            for rows in s.chunks() if d else ():
                total = None if dhidden is None else zeros(s, rows.stop - rows.start, s.D)
                stats, slopes = _cut(values, rows), {n: g.to(s.wide) for n, g in _cut(d, rows).items()}
                grad_chunk(s, s.open(rows), stats, slopes, total, totals)
                if dhidden is not None and total is not None:
                    put(dhidden, p.index, rows, total)
        return dhidden, *(_of_dtype(total, x) for total, x in zip(totals, operands[1:], strict=True)), None
