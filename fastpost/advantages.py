"""Advantages: from rewards to the number that multiplies each token's policy gradient."""

from typing import Literal

import torch
from torch import Tensor


def group_centred(
    rewards: Tensor,  # (S,), the samples of a prompt adjacent
    group_size: int,
    scale: Literal["group", "batch", "none"] = "group",
    eps: float = 1e-4,
) -> Tensor:  # (S,)
    """(R - mean of its group) / (std + eps): GRPO (arXiv:2402.03300), the std taken over the group (n - 1), the batch,
    or left out.

    "none" is Dr. GRPO (arXiv:2503.20783): dividing by the group's std up-weights questions that are nearly solved or
    nearly hopeless. A NaN reward means "not applicable": it leaves the means alone and gets advantage 0, as does a
    group without variance (to the bit, not to rounding: such groups must reach no optimizer).
    """
    if rewards.ndim != 1 or group_size < 1 or rewards.numel() % group_size:
        raise ValueError(
            f"rewards must be (S,) with S a multiple of group_size {group_size}, got {tuple(rewards.shape)}"
        )
    if scale not in ("group", "batch", "none"):
        raise ValueError(f"scale must be 'group', 'batch' or 'none', got {scale!r}")
    if not rewards.is_floating_point():
        raise ValueError(f"rewards must be floating, got {rewards.dtype}")
    infinite = rewards.isinf().nonzero()
    if len(infinite):
        raise ValueError(
            f"rewards must be finite or NaN, got {rewards[infinite[0, 0]].item()} at index {infinite[0, 0].item()}"
        )
    groups = rewards.view(-1, group_size)  # (groups, G)
    missing = groups.isnan()
    flat = groups.masked_fill(missing, torch.inf).amin(1) >= groups.masked_fill(missing, -torch.inf).amax(1)
    centred = (groups - groups.nanmean(1, keepdim=True)).masked_fill(flat[:, None] | missing, 0.0)
    if scale == "group":
        count = (~missing).sum(1, keepdim=True)
        centred = centred / ((centred.square().sum(1, keepdim=True) / (count - 1).clamp(min=1)).sqrt() + eps)
    elif scale == "batch":
        kept = groups[~missing]
        centred = centred / ((kept.std() if kept.numel() > 1 else rewards.new_zeros(())) + eps)
    return centred.reshape(-1)
