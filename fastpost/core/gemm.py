"""Matrix products with fp32 results, from operands of any dtype: the only place that knows what a device multiplies.

A product rounded to bf16 costs 2e-2 in a log-probability; the same operands accumulated and kept in fp32, 1e-5 or less.
  CPU   the C++ extension. torch has no bf16 x bf16 -> fp32 product there, so without it operands are widened, a block
        at a time, into a buffer that is reused
  CUDA  torch.mm(..., out_dtype=torch.float32): tensor cores on bf16 operands, the fp32 accumulator written out
fp32 operands are multiplied in IEEE fp32 (no TF32, no bf16 splitting), whatever the process has set; float64 in
float64.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import ModuleType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from fastpost.core.native import Panels as Packed
else:
    Packed = object  # (it comes from an extension that may be missing)


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of logits and statistics for operands of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@contextlib.contextmanager
def exact_products(device: torch.device) -> Iterator[None]:
    """No autocast and no reduced-precision fp32 products inside; the process's own setting is put back after."""
    cpu = torch.backends.mkldnn.matmul  # pyright: ignore[reportAttributeAccessIssue]  (made at run time)
    backend = torch.backends.cuda.matmul if device.type == "cuda" else cpu
    precision = backend.fp32_precision
    if precision != "ieee":
        backend.fp32_precision = "ieee"
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        if precision != "ieee":
            backend.fp32_precision = precision


def native_products(dtype: torch.dtype, device: torch.device) -> ModuleType | None:
    """The C++ extension, where it multiplies operands of this dtype."""
    if device.type != "cpu":
        return None
    try:
        from fastpost.core import native
    except ImportError:
        return None
    return native if native.isa(dtype) else None


class Gemm:
    """Products of operands rounded to `dtype`. Holds the buffers in which a CPU widens them."""

    def __init__(self, dtype: torch.dtype, device: torch.device):
        self.dtype, self.wide = dtype, wide(dtype)
        self.native = native_products(dtype, device)
        self._widens = device.type != "cuda" and dtype != self.wide and self.native is None
        # What the left operand of `add_product` must be written in.
        self.tile_dtype = self.wide if self._widens else dtype
        # Of an operand, as it is multiplied.
        self.panel_bytes = dtype.itemsize if self.native is None else self.native.unit_bytes(dtype)
        self._buffers: dict[str, Tensor] = {}

    def operand(self, x: Tensor, buffer: str) -> Tensor:
        """x as it is multiplied. What an earlier call with the same `buffer` returned is overwritten."""
        if self.native is not None:
            return x.to(self.dtype).contiguous()
        if not self._widens:
            return x.to(self.dtype)
        held = self._buffers.get(buffer)
        if held is None or held.numel() < x.numel():
            held = self._buffers[buffer] = torch.empty(x.numel(), dtype=self.wide, device=x.device)
        return held[: x.numel()].view(x.shape).copy_(x.to(self.dtype))

    def product(self, a: Tensor, b: Tensor, out: Tensor) -> Tensor:  # (M, K), (N, K) -> (M, N)
        """out = a @ b.T"""
        if self.native is not None and 1 in a.stride() and 1 in b.stride():
            self.native.product(a, b.T, out, False, True)  # (of fp32, too: the bits are those of a fused step)
            return out
        if a.dtype == out.dtype:
            return torch.mm(a, b.T, out=out)
        return torch.mm(a, b.T, out_dtype=out.dtype, out=out)

    def add_product(self, total: Tensor, a: Tensor, b: Tensor, *, fresh: bool = False) -> None:
        """total (M, N) += a (M, K) @ b (K, N), accumulated in total's own precision; b is rounded to a's dtype.

        A `fresh` total is written, and what it held not read.
        """
        b = b.to(a.dtype)
        if a.dtype == total.dtype:
            torch.addmm(total, a, b, beta=0 if fresh else 1, out=total)
        elif self.native is not None:
            self.native.product(a, b, total, not fresh, False)
        else:
            torch.addmm(total, a, b, beta=0 if fresh else 1, out_dtype=total.dtype, out=total)
