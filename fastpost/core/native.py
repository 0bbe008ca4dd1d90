"""The head on a CPU with the C++ extension (csrc/), and torch's kernels where it does not reach.

NativeRows    the row kernels for fp32 tiles: one pass over a row in place of one for each operation. float64 is left to
              `TorchRows`.
product       bf16 or fp32 operands, fp32 results: pairs of bf16 where the CPU multiplies those (AVX512-BF16), else
              fp32 by AVX-512, AVX2 or NEON, bf16 being widened as it is packed
fold_block, grads_block, weight_block
              products and row kernels of a block of the vocabulary in one go: a tile of logits never leaves the
              second-level cache
"""

from __future__ import annotations

import warnings
from collections.abc import Set as AbstractSet

import torch
from torch import Tensor

from fastpost import _native
from fastpost.core.rows import LAYOUT, Shape, TorchRows
from fastpost.types import NEEDS_REFERENCE

if getattr(_native, "LAYOUT", None) != LAYOUT:
    warnings.warn("fastpost's native extension is older than its sources and is not used: install again", stacklevel=2)
    raise ImportError("fastpost._native was compiled for another layout")

PAIRS = "avx512_bf16"  # takes pairs of bf16; the others fp32
ISAS: list[str] = _native.ISAS
Panels = _native.Panels
Room = _native.Room
fold_block = _native.fold_block
grads_block = _native.grads_block
weight_block = _native.weight_block
rescale = _native.rescale


def isa(dtype: torch.dtype) -> str | None:
    """With which instructions operands of this dtype are multiplied; None: they are not."""
    if dtype not in (torch.bfloat16, torch.float32):
        return None
    return next((name for name in ISAS if name != PAIRS or dtype == torch.bfloat16), None)


def unit_bytes(dtype: torch.dtype) -> int:
    """What a number of this dtype takes as it is multiplied."""
    return 2 if isa(dtype) == PAIRS else 4


def pack(hidden: Tensor) -> Panels:  # (R, D)
    """The left operand of `fold_block` and `grads_block`."""
    return _native.pack(hidden, isa(hidden.dtype) or "")


def pack_across(hidden: Tensor) -> Panels:  # (R, D)
    """The right operand of `weight_block`."""
    return _native.pack_across(hidden, isa(hidden.dtype) or "")


def product(left: Tensor, right: Tensor, out: Tensor, accumulate: bool, logits: bool) -> None:  # (M, K), (K, N)
    """out (M, N) fp32 = left @ right, or out += it; whether its sums are to be exact to fp32, or are a gradient's."""
    _native.product(left, right, out, accumulate, logits, isa(left.dtype) or "")


class NativeRows:
    """The methods of `TorchRows`, in one pass over each row."""

    def __init__(self):
        self._torch = TorchRows()

    def fold(
        self,
        state: Tensor,  # (STATE_ROWS, R), updated
        tile: Tensor,  # (R, B) raw products, kept
        target: Tensor,  # (R,)
        start: int,
        shape: Shape,
        inverse_temperature: Tensor | None,  # (R,)
        wants: AbstractSet[str],
        tile_q: Tensor | None = None,  # (R, B)
        shape_q: Shape | None = None,
        out: Tensor | None = None,  # (R, B)
    ) -> None:
        if not _reaches(tile, out):
            return self._torch.fold(state, tile, target, start, shape, inverse_temperature, wants, tile_q, shape_q, out)
        _native.fold(state, tile, target, start, shape, inverse_temperature, "logp@1" in wants, tile_q, shape_q, out)

    def mixture(
        self,
        state: Tensor,  # (STATE_ROWS, R): P_M and Q_M are updated
        tile: Tensor,  # (R, B)
        shape: Shape,
        inverse_temperature: Tensor | None,  # (R,)
        tile_q: Tensor,  # (R, B)
        shape_q: Shape,
        beta: float,
    ) -> None:
        mixture = _native.mixture if _reaches(tile) else self._torch.mixture
        mixture(state, tile, shape, inverse_temperature, tile_q, shape_q, beta)

    def grads(
        self,
        tile: Tensor,  # (R, B) raw products
        target: Tensor,  # (R,)
        start: int,
        shape: Shape,
        inverse_temperature: Tensor | None,  # (R,)
        c: Tensor,  # (COEFFICIENT_ROWS, R)
        wants: AbstractSet[str],
        out: Tensor,  # (R, B), may be the tile
        tile_q: Tensor | None = None,  # (R, B)
        shape_q: Shape | None = None,
        beta: float = 0.5,
    ) -> None:
        if not _reaches(tile, out):
            return self._torch.grads(
                tile, target, start, shape, inverse_temperature, c, wants, out, tile_q, shape_q, beta
            )
        crossed, mixed = tile_q if wants & NEEDS_REFERENCE else None, beta if "jsd" in wants else None
        at_1 = "logp@1" in wants
        _native.grads(tile, target, start, shape, inverse_temperature, c, at_1, out, crossed, shape_q, mixed)


def _reaches(tile: Tensor, out: Tensor | None = None) -> bool:
    return tile.dtype == torch.float32 and (out is None or out.dtype in (torch.float32, torch.bfloat16))
