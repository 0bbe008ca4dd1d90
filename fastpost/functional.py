"""torch.nn.functional.linear_cross_entropy with its own names, order and results, on the fused head."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from fastpost.core.gemm import wide
from fastpost.head import fused_loss, token_stats
from fastpost.losses.sft import sft
from fastpost.types import IGNORE, Batch, Head

TORCH = "torch.nn.functional.linear_cross_entropy"


def linear_cross_entropy(
    input: Tensor,  # (D,) or (N, D)
    linear_weight: Tensor,  # (V, D)
    target: Tensor,  # () or (N,) int64
    *,
    linear_bias: Tensor | None = None,  # (V,)
    weight: None = None,
    reduction: Literal["mean", "sum", "none"] = "mean",
    ignore_index: int | None = -100,
    label_smoothing: float = 0.0,
    options: None = None,
) -> Tensor:
    """cross_entropy(linear(input, linear_weight, linear_bias), target), without the logits.

    -(1 - e) log p[target] - e mean_v log p_v with e = label_smoothing (arXiv:1512.00567); "mean" is over targets that
    are not ignored, and NaN if all are, as in torch. ignore_index None means -100, as in torch.

    Also taken: input (..., D) with target (...). Not taken, with a ValueError naming torch's function: class weights
    (`weight`), `options`, probability targets, K-dimensional classes. Scalar reductions run the eager schedule (3 G),
    "none" the lazy one (4 G).
    """
    _check(input, linear_weight, target, reduction, label_smoothing, {"weight": weight, "options": options})
    ignored = IGNORE if ignore_index is None else ignore_index
    head = Head(linear_weight, linear_bias)
    if reduction == "none":
        outputs = ("logp", "mean_logp") if label_smoothing else ("logp",)
        stats = token_stats(input, head, target, outputs=outputs, ignore_index=ignored)
        if not label_smoothing:
            return -stats.logp.to(input.dtype)
        return -((1 - label_smoothing) * stats.logp + label_smoothing * stats.mean_logp).to(input.dtype)
    flat = target.reshape(-1)
    kept = (flat != ignored).sum()
    each = torch.ones(flat.shape, device=flat.device, dtype=wide(input.dtype))
    batch = Batch(flat, torch.tensor([flat.numel()]), weight=each / kept if reduction == "mean" else each)
    knobs = {"label_smoothing": label_smoothing} if label_smoothing else {}
    hidden = input.reshape(-1, input.shape[-1])
    total = fused_loss(sft, hidden, head, batch, ignore_index=ignored, **knobs)
    assert isinstance(total, Tensor)
    if reduction == "mean":
        total = total + torch.where(kept == 0, torch.nan, 0.0)
    return total.to(input.dtype)


def _check(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    reduction: str,
    label_smoothing: float,
    refused: dict[str, object],
) -> None:
    for name, value in refused.items():
        if value is not None:
            raise ValueError(f"{name} is not taken here; use {TORCH}")
    if linear_weight.ndim != 2:
        raise ValueError(
            f"linear_weight must be (V, D), got {tuple(linear_weight.shape)}; for K-dimensional classes use {TORCH}"
        )
    if target.is_floating_point():
        raise ValueError(
            f"target must hold class indices (int64), got {target.dtype}; for class probabilities use {TORCH}"
        )
    if target.dtype != torch.int64:
        raise ValueError(f"target must be int64, got {target.dtype}")
    if input.shape[-1] != linear_weight.shape[1] or input.shape[:-1] != target.shape:
        raise ValueError(
            f"input {tuple(input.shape)} must be (..., D), with D as in linear_weight {tuple(linear_weight.shape)} and "
            f"the rest as in target {tuple(target.shape)}"
        )
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction must be 'mean', 'sum' or 'none', got {reduction!r}")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing must be in [0, 1], got {label_smoothing}")
