"""A weight that bitsandbytes has quantised. It is read as a (V, D) tensor is, `weight[rows]`, and only these rows are
dequantised: no copy of it in floating point is ever made.

  nf4, fp4  two weights to a byte (QLoRA, arXiv:2305.14314): w = code[4 bits] * absmax, an absmax to each `blocksize`
            weights of a row. With double quantisation that is code[8 bits] * absmax + offset in turn.
  int8      w = code * absmax / 127, an absmax to each row (LLM.int8(), arXiv:2208.07339). Outside training its layer
            rounds the hidden states to 8 bits too, but for outliers: an approximation of the product with this very w,
            which is taken here as it stands.

What comes out is bit for bit what the layer dequantises to. The weight itself is frozen by nature; hidden states, a
bias and a LoRA beside it train.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

KINDS = ("Params4bit", "Int8Params")  # what bitsandbytes calls its weights


@dataclass(frozen=True, eq=False)
class Nested:
    """Scales that are quantised themselves: code[codes] * absmax + offset, an absmax to each `blocksize` of them."""

    codes: Tensor  # (V, K) uint8
    code: Tensor  # (256,)
    absmax: Tensor  # (V K / blocksize,) in the order of codes
    offset: Tensor  # ()
    blocksize: int

    def __getitem__(self, rows: slice | Tensor) -> Tensor:  # (B, K)
        V, K = self.codes.shape
        index = torch.arange(*rows.indices(V), device=self.codes.device) if isinstance(rows, slice) else rows
        scale = index[:, None] * K + torch.arange(K, device=self.codes.device)
        return self.code[self.codes[rows].int()] * self.absmax[scale // self.blocksize] + self.offset

    def narrow(self, dim: int, start: int, length: int) -> Nested:
        assert dim == start == 0, "rows from the first on"
        return replace(self, codes=self.codes[:length])


@dataclass(frozen=True, eq=False)
class Quantised:
    """Codes and scales, rows of which become floating point when they are taken."""

    codes: Tensor  # (V, D) int8, or (V, D / 2) uint8
    absmax: Tensor | Nested  # (V, K), K blocks to a row
    kind: Literal["nf4", "fp4", "int8"]
    dtype: torch.dtype | None = None  # of the products; None: that of the hidden states
    requires_grad: ClassVar[bool] = False

    @property
    def shape(self) -> torch.Size:
        V, width = self.codes.shape
        return torch.Size((V, width if self.kind == "int8" else 2 * width))

    @property
    def device(self) -> torch.device:
        return self.codes.device

    def to(self, dtype: torch.dtype) -> Quantised:
        """The same weight for products in another dtype."""
        return self if dtype == self.dtype else replace(self, dtype=dtype)

    def narrow(self, dim: int, start: int, length: int) -> Quantised:
        """The first rows."""
        assert dim == start == 0, "rows from the first on"
        return replace(self, codes=self.codes[:length], absmax=self.absmax.narrow(dim, start, length))

    def __getitem__(self, rows: slice | Tensor) -> Tensor:  # (B, D)
        assert self.dtype is not None, "of which dtype?"
        codes, absmax = self.codes[rows], self.absmax[rows]
        if self.kind == "int8":
            return codes.to(torch.float32).mul_(absmax * (1 / 127)).to(self.dtype)
        return _four_bit(codes, absmax, self.kind, self.dtype)


def _four_bit(codes: Tensor, absmax: Tensor, kind: str, dtype: torch.dtype) -> Tensor:  # (B, D / 2), (B, K) -> (B, D)
    from bitsandbytes.functional import QuantState, dequantize_4bit

    B, D = len(codes), 2 * codes.shape[1]
    known = torch.float32 if dtype == torch.float64 else dtype  # to bitsandbytes
    state = QuantState(absmax.reshape(-1), (B, D), blocksize=D // absmax.shape[1], quant_type=kind, dtype=known)
    return dequantize_4bit(codes.reshape(-1, 1), state).to(dtype)


Weight = Tensor | Quantised  # of a head, (V, D)


def same(a: Weight, b: Weight) -> bool:
    """Whether they are one weight. `Head.of` wraps a quantised one anew at each call, so its codes are looked at."""
    if isinstance(a, Quantised) and isinstance(b, Quantised):
        return a.codes.data_ptr() == b.codes.data_ptr()
    return a is b


def weight_of(layer: nn.Linear) -> Quantised:
    """The weight of a bitsandbytes layer, Linear4bit or Linear8bitLt."""
    weight: Any = layer.weight
    return _read_int8(layer, weight) if type(weight).__name__ == "Int8Params" else _read_four_bit(layer, weight)


def _read_int8(layer: Any, weight: Any) -> Quantised:
    absmax = weight.SCB if weight.SCB is not None else layer.state.SCB  # its first forward moves it
    if weight.dtype != torch.int8 or absmax is None:
        raise ValueError(
            f"the head's weight is an Int8Params of {weight.dtype}, not of int8: it is quantised anew at each forward "
            "(has_fp16_weights=True), or not yet (move the layer to its device)"
        )
    return Quantised(weight.detach(), absmax[:, None], "int8")


def _read_four_bit(layer: Any, weight: Any) -> Quantised:
    state = weight.quant_state or layer.quant_state
    if state is None:
        raise ValueError("the head's weight is a Params4bit that is not quantised yet: move the layer to its device")
    if getattr(state, "packing_format_for_cpu", False):
        raise ValueError(
            "bitsandbytes has repacked the head's 4-bit weight for inference on a CPU, at a forward in eval mode: set "
            "support_avx512bf16_for_cpu = False on the layer before the first one"
        )
    V, D = state.shape
    if D % state.blocksize:
        raise ValueError(
            f"the head's 4-bit weight {(V, D)} has blocks of {state.blocksize} that run on from one row to the next, "
            f"which bitsandbytes itself misreads on a CPU: take a blocksize that divides {D}"
        )
    absmax = state.absmax.view(V, -1)
    if state.nested:
        absmax = Nested(absmax, state.state2.code, state.state2.absmax, state.offset, state.state2.blocksize)
    codes = weight.detach().view(-1).view(torch.uint8).view(V, D // 2)
    return Quantised(codes, absmax, state.quant_type, layer.compute_dtype)
