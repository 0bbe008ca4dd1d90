"""A block of the vocabulary in one step of the C++ extension: see csrc/blocks.h.

The same numbers as a product, the row kernels and more products, but for the order of summation. `Sweep.fused` says
where it reaches: bf16 or fp32 operands, no stored teacher, no LoRA on the head.
"""

from __future__ import annotations

from collections.abc import Set as AbstractSet

from torch import Tensor

from fastpost.core.gemm import Packed
from fastpost.core.sweep import Chunk, Columns, Sweep
from fastpost.types import NEEDS_REFERENCE

Side = tuple[Packed, Tensor, Tensor | None]  # the packed hidden states, the block's weight, where its tile is held


def _sides(chunk: Chunk, block: Columns) -> tuple[Side, Side | None]:
    """Policy and reference."""
    assert chunk.packed is not None
    held, held_q = (None if x is None else x[:, block.span] for x in (chunk.logits, chunk.logits_q))
    q = None if chunk.packed_q is None or block.weight_q is None else (chunk.packed_q, block.weight_q, held_q)
    return (chunk.packed, block.weight, held), q


def fold(
    s: Sweep,
    chunk: Chunk,
    block: Columns,
    state: Tensor,
    wants: AbstractSet[str],
    total: Tensor | None,  # (R, D)
    kept: Tensor | None,  # (R, B)
) -> None:
    """`fold` of the row kernels; total, if any, shrinks to the new maxima and gains sum_v e^(z_v - max) W_v, and kept
    is given those factors."""
    assert s.fused is not None
    p, q = _sides(chunk, block)
    inverse, at_1 = chunk.inverse_temperature, "logp@1" in wants
    s.fused.fold_block(
        s.room, state, chunk.target, block.span.start, block.shape, inverse, at_1, p, q, block.shape_q, total, kept
    )


def grads(
    s: Sweep,
    chunk: Chunk,
    block: Columns,
    c: Tensor,  # (COEFFICIENT_ROWS, R)
    wants: AbstractSet[str],
    dhidden: Tensor | None,  # (R, D), added to
) -> Tensor:  # (R, B)
    """`grads` of the row kernels, and dhidden += dL/dtile weight; dL/dtile is returned."""
    assert s.fused is not None
    p, q = _sides(chunk, block)
    q, shape_q = (q, block.shape_q) if wants & NEEDS_REFERENCE else (None, None)
    dlogits, inverse, at_1 = s.dlogits(chunk, block), chunk.inverse_temperature, "logp@1" in wants
    beta = s.p.jsd_beta if "jsd" in wants else None
    s.fused.grads_block(
        s.room, chunk.target, block.span.start, block.shape, inverse, c, at_1, p, q, shape_q, beta, s.held,
        dlogits, dhidden,
    )  # fmt: skip
    return dlogits


def add_weight(
    s: Sweep,
    left: Tensor,  # (R, B) dL/dtile, which may lie where the result will
    across: Packed,  # the hidden states, from `Sweep.packed_across`
    dweight: Tensor,  # (B, D)
    *,
    fresh: bool,
) -> None:
    """dweight += left^T hidden, or it is written where it is `fresh`, and then rounded to the dtype of the operands if
    that is its own."""
    assert s.gemm.native is not None
    s.gemm.native.weight_block(left, across, dweight, fresh)
