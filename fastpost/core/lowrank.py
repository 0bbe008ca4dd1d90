"""A LoRA on the head (arXiv:2106.09685): raw logits = hidden W^T + low B^T, low = s dropout(hidden) A^T.

Here is low, (N, r), of the kept rows; the sweep adds low B^T to its tiles, at a cost of order T r (D + V) beside the
G's. A merged W + s B A would be a (V, D) tensor a step, and has no room for dropout.

Operands are those of F.linear: under autocast hidden, A and B are rounded to its dtype, else nothing is rounded. PEFT
keeps A and B in fp32 over a bf16 model and rounds the sum of logits to bf16; here low and the logits stay in fp32.
Adapters that are active together lie side by side along r.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from fastpost.core.gemm import exact_products, wide
from fastpost.core.once import differentiable_once
from fastpost.core.problem import cut, put
from fastpost.types import LowRank

ROWS = 1024  # of the hidden states that are widened together


@dataclass(frozen=True)
class _Rows:
    """Which hidden states are multiplied, and in which dtypes."""

    index: Tensor | None  # (N,) the kept of them; None: all
    rounded: torch.dtype  # of the operands
    wide: torch.dtype  # of the product

    def operand(self, x: Tensor) -> Tensor:
        return x.to(self.rounded).to(self.wide)

    def blocks(self, hidden: Tensor) -> Iterator[tuple[slice, Tensor]]:
        N = len(hidden) if self.index is None else len(self.index)
        for start in range(0, N, ROWS):
            rows = slice(start, min(start + ROWS, N))
            yield rows, self.operand(cut(hidden, self.index, rows))


class _Low(torch.autograd.Function):
    """hidden A^T in fp32, without an fp32 copy of the hidden states."""

    @staticmethod
    def forward(ctx, hidden: Tensor, a: Tensor, which: _Rows) -> Tensor:  # (T, D), (r, D) -> (N, r)
        ctx.save_for_backward(hidden, a)
        ctx.which = which
        N, wide_a = len(hidden) if which.index is None else len(which.index), which.operand(a)
        low = hidden.new_empty(N, len(a), dtype=which.wide)
        with exact_products(hidden.device):
            for rows, x in which.blocks(hidden):
                torch.mm(x, wide_a.T, out=low[rows])
        return low

    @staticmethod
    @differentiable_once
    def backward(ctx, *upstream: Tensor):
        (hidden, a), (dlow,), which = ctx.saved_tensors, upstream, ctx.which
        need_hidden, need_a = ctx.needs_input_grad[:2]
        dhidden = torch.zeros_like(hidden, memory_format=torch.contiguous_format) if need_hidden else None
        da, wide_a = torch.zeros_like(a, dtype=which.wide), which.operand(a)
        with exact_products(hidden.device):
            for rows, x in which.blocks(hidden):
                if dhidden is not None:
                    put(dhidden, which.index, rows, dlow[rows] @ wide_a)
                if need_a:
                    torch.addmm(da, dlow[rows].T, x, out=da)
        return dhidden, da.to(a.dtype) if need_a else None, None


def _low(hidden: Tensor, adapter: LowRank, which: _Rows) -> Tensor:  # (T, D) -> (N, r)
    if adapter.dropout:
        kept = hidden if which.index is None else hidden.index_select(0, which.index)
        hidden, which = F.dropout(kept.to(which.wide), adapter.dropout), replace(which, index=None)
    return adapter.scaling * _Low.apply(hidden, adapter.a, which)


def low_rank(
    hidden: Tensor,  # (T, D)
    lora: Sequence[LowRank],
    index: Tensor | None,  # (N,) the kept rows; None: all
    dtype: torch.dtype,  # of the operands of the head's products
) -> tuple[Tensor | None, Tensor | None]:  # (N, r), (V, r)
    """low and B of all the adapters, differentiable in hidden, A and B; None without any."""
    if not lora:
        return None, None
    autocast = torch.is_autocast_enabled(hidden.device.type)
    which = _Rows(index, dtype if autocast else wide(dtype), wide(dtype))
    low = [_low(hidden, adapter, which) for adapter in lora]
    b = [adapter.b.to(dtype) if autocast else adapter.b for adapter in lora]
    return (low[0], b[0]) if len(lora) == 1 else (torch.cat(low, 1), torch.cat(b, 1))
