"""The value function of PPO: what a scalar head says of each token, against the return."""

import torch
from torch import Tensor

from fastpost.equation import scalar_loss
from fastpost.knobs import Positive
from fastpost.types import IGNORE, Batch


@scalar_loss(unit="token")
def value(values: Tensor, batch: Batch, *, cliprange_value: Positive | None = 0.2) -> Tensor:  # (T,)
    """max((v - R)^2, (clip(v, v_old - c, v_old + c) - R)^2) / 2, c = cliprange_value, None: no clip. arXiv:1707.06347.

    R = batch.return_, v_old = batch.old_value. PPO's vf_coef goes on the scalar.
    """
    error = (values - batch.return_).square()
    if cliprange_value is not None:
        near = batch.old_value + (values - batch.old_value).clamp(-cliprange_value, cliprange_value)
        error = torch.maximum(error, (near - batch.return_).square())
    return error / 2


def explained_variance(values: Tensor, batch: Batch) -> Tensor:  # (T,) -> ()
    """1 - Var(R - v) / Var(R) over kept tokens: 1 is a perfect critic, 0 one as good as a constant, and what a return
    without variance gives."""
    if batch.return_ is None:
        raise ValueError("explained_variance needs batch.return_, which is None")
    if values.shape != batch.target.shape:
        raise ValueError(
            f"values must have shape {tuple(batch.target.shape)}, as batch.target, got {tuple(values.shape)}"
        )
    kept = batch.target != IGNORE
    returns, rest = batch.return_[kept], (batch.return_ - values.detach())[kept]
    spread = returns.var(correction=0) if returns.numel() else returns.sum()
    left = rest.var(correction=0) if returns.numel() else rest.sum()
    return torch.where(spread > 0, 1 - left / torch.where(spread > 0, spread, 1.0), 0.0)
