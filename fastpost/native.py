"""The head on a CPU with the C++ extension (csrc/), and torch's kernels where it does not reach.

NativeRows    the row kernels for fp32 tiles: one pass over a row in place of one for each operation. float64 is left to
              `TorchRows`.
product       bf16 operands, fp32 results, where the CPU multiplies pairs of bf16 (AVX512-BF16)
fold_block, grads_block, weight_block
              there, products and row kernels of a block of the vocabulary in one go: a tile of logits never leaves
              the second-level cache
"""

from __future__ import annotations

import warnings
from collections.abc import Set as AbstractSet

import torch
from torch import Tensor

from fastpost import _native
from fastpost.rows import LAYOUT, Shape, TorchRows
from fastpost.types import NEEDS_REFERENCE

if getattr(_native, "LAYOUT", None) != LAYOUT:
    warnings.warn("fastpost's native extension is older than its sources and is not used: install again", stacklevel=2)
    raise ImportError("fastpost._native was compiled for another layout")

product = _native.product
multiplies_bf16 = _native.multiplies_bf16
fold_block = _native.fold_block
grads_block = _native.grads_block
weight_block = _native.weight_block
pack = _native.pack
pack_across = _native.pack_across
rescale = _native.rescale  # of bf16 tiles


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
