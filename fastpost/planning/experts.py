"""The product of a mixture of experts as far as memory goes: rows sorted by expert, each times its expert's matrix.

  (S, D) (E, D, I) -> (S, I)       in the forward pass, and for the gradient of the rows
  (D, S) (S, I) -> (E, D, I)       for that of the experts

On fake tensors torch has it in bfloat16 alone; this has it in any dtype.
"""

from __future__ import annotations

import torch
from torch import Tensor

GROUPED = torch.ops.aten._grouped_mm.default


def grouped(
    first: Tensor,
    second: Tensor,
    offs: Tensor | None = None,  # (E,) where each expert's rows end
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    experts = offs.shape if offs is not None and first.ndim == second.ndim == 2 else ()
    return first.new_empty(*experts, *first.shape[:-1], second.shape[-1], dtype=out_dtype or first.dtype)
