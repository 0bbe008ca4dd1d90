"""Rewards of sequences -> advantages of sequences: each is compared with the other samples of its prompt.

The S samples of a batch lie prompt by prompt, `group_size` of each. A NaN reward means "not applicable": it leaves the
means alone and gets advantage 0. So does a group without variance, to the bit and not to rounding: such a group must
reach no optimizer. An infinite reward is a ValueError naming its index.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from fastpost.advantages.checks import finite_or_nan

Scale = Literal["group", "batch", "none"]


def group_centred(
    rewards: Tensor,  # (S,), the samples of a prompt adjacent
    group_size: int,
    scale: Scale = "group",
    eps: float = 1e-4,
) -> Tensor:  # (S,)
    """(R - mean of its group) / (std + eps): GRPO (arXiv:2402.03300), the std taken over the group (n - 1), the batch,
    or left out: TRL's scale_rewards.

    "none" is Dr. GRPO (arXiv:2503.20783): dividing by the group's std up-weights questions that are nearly solved or
    nearly hopeless.
    """
    if scale not in ("group", "batch", "none"):
        raise ValueError(f"scale must be 'group', 'batch' or 'none', got {scale!r}")
    centred, count = _centred(rewards, group_size)
    if scale == "group":
        centred = centred / ((centred.square().sum(1, keepdim=True) / (count - 1).clamp(min=1)).sqrt() + eps)
    elif scale == "batch":
        kept = rewards[~rewards.isnan()]
        centred = centred / ((kept.std() if kept.numel() > 1 else rewards.new_zeros(())) + eps)
    return centred.reshape(-1)


def leave_one_out(rewards: Tensor, group_size: int) -> Tensor:  # (S,), the samples of a prompt adjacent -> (S,)
    """R_i - mean of the group's other rewards: RLOO (arXiv:2402.14740). Nothing divides by a std.

    That is n / (n - 1) (R_i - mean of all n). A sample alone in its group has nothing to be compared with: 0.
    """
    centred, count = _centred(rewards, group_size)
    return (centred * count / (count - 1).clamp(min=1)).reshape(-1)


def reinforce_plus_plus_baseline(
    rewards: Tensor,  # (S,), the samples of a prompt adjacent
    group_size: int,
    eps: float = 1e-4,
) -> Tensor:  # (S,)
    """(R - mean of its group) / (std over the batch of these differences + eps): REINFORCE++-baseline
    (arXiv:2501.03262).

    `group_centred(scale="batch")`, which is TRL's, divides by the std of the rewards themselves. The batch's mean of
    the differences, which the paper subtracts, is zero: taken away it would only unsettle groups without variance.
    """
    centred, count = _centred(rewards, group_size)
    return (centred / (_std_about_zero(centred, count.sum()) + eps)).reshape(-1)


def sum_then_normalize(
    rewards: Tensor,  # (S, F), a column a reward function
    weights: Sequence[float] | Tensor,  # (F,)
    group_size: int,
    scale: Scale = "group",
    eps: float = 1e-4,
) -> Tensor:  # (S,)
    """group_centred of sum_f w_f R_f over the functions that apply: TRL's multi_objective_aggregation by default."""
    weights = _weights(rewards, weights)
    total = (rewards * weights).nansum(1).masked_fill(rewards.isnan().all(1), torch.nan)
    return group_centred(total, group_size, scale, eps)


def normalize_then_sum(
    rewards: Tensor,  # (S, F), a column a reward function
    weights: Sequence[float] | Tensor,  # (F,)
    group_size: int,
    eps: float = 1e-4,
) -> Tensor:  # (S,)
    """sum_f w_f group_centred(R_f), over its std in the batch + eps: GDPO (arXiv:2601.05242).

    After a plain sum, different mixtures of rewards can have one total and so one advantage. The batch's mean, which
    the paper subtracts, is zero already.
    """
    weights = _weights(rewards, weights)
    each = [group_centred(column, group_size, eps=eps) for column in rewards.unbind(1)]
    total = (torch.stack(each, 1) * weights).sum(1)
    return total / (_std_about_zero(total, (~rewards.isnan().all(1)).sum()) + eps)


def _centred(rewards: Tensor, group_size: int) -> tuple[Tensor, Tensor]:  # -> (S / G, G), (S / G, 1)
    """Rewards less the mean of their group, 0 where a reward is missing or all are equal; how many there are."""
    if rewards.ndim != 1 or group_size < 1 or rewards.numel() % group_size:
        raise ValueError(
            f"rewards must be (S,) with S a multiple of group_size {group_size}, got {tuple(rewards.shape)}"
        )
    finite_or_nan("rewards", rewards)
    groups = rewards.view(-1, group_size)
    missing = groups.isnan()
    flat = groups.masked_fill(missing, torch.inf).amin(1) >= groups.masked_fill(missing, -torch.inf).amax(1)
    centred = (groups - groups.nanmean(1, keepdim=True)).masked_fill(flat[:, None] | missing, 0.0)
    return centred, (~missing).sum(1, keepdim=True)


def _std_about_zero(x: Tensor, count: Tensor) -> Tensor:
    """The std (n - 1) of `count` numbers whose mean is zero; those missing are 0 in x."""
    return (x.square().sum() / (count - 1).clamp(min=1)).sqrt()


def _weights(rewards: Tensor, weights: Sequence[float] | Tensor) -> Tensor:
    if rewards.ndim != 2 or len(weights) != rewards.shape[1]:
        raise ValueError(
            f"rewards must be (S, F) and weights (F,), one for each reward function, "
            f"got {tuple(rewards.shape)} and {len(weights)} weights"
        )
    finite_or_nan("rewards", rewards)
    return torch.as_tensor(weights, dtype=rewards.dtype, device=rewards.device)
