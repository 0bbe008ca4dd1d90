"""Rewards of steps, each given at the token with which its step ends: N of them, of a batch of T positions.

  at[n]   the position whose target is the last token of step n

As with any reward, the position is that of the action: the token that is rewarded is target[at[n]].
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastpost.advantages.checks import finite_or_nan
from fastpost.advantages.gae import reward_to_go
from fastpost.advantages.group import Scale, group_centred
from fastpost.types import Batch


@torch.no_grad()
def on_tokens(rewards: Tensor, at: Tensor, batch: Batch) -> Tensor:  # (N,), (N,) -> (T,)
    """Each reward at its position, 0 elsewhere; those of steps that end with one and the same token add up.

    Added to the rewards of `kl_in_reward` they are dense rewards for `gae`.
    """
    _check(rewards, at, batch)
    return rewards.new_zeros(batch.target.numel()).index_add(0, at, rewards)


@torch.no_grad()
def process_supervision(
    rewards: Tensor,  # (N,)
    at: Tensor,  # (N,)
    batch: Batch,  # of S sequences, the samples of a prompt adjacent
    group_size: int,
    scale: Scale = "group",
    eps: float = 1e-4,
) -> Tensor:  # (T,)
    """A_t = sum of (r_n - mean) / (std + eps) over the steps n of its sequence that end at t or after it: GRPO with
    process supervision (arXiv:2402.03300, section 4.1.3).

    Mean and std are over all steps of all samples of the group; `scale` takes the std as `group_centred` does.
    """
    centred = steps_centred(rewards, at, batch, group_size, scale, eps)
    return reward_to_go(on_tokens(centred, at, batch), batch)


@torch.no_grad()
def steps_centred(
    rewards: Tensor, at: Tensor, batch: Batch, group_size: int, scale: Scale = "group", eps: float = 1e-4
) -> Tensor:  # (N,)
    """Rewards of steps less the mean of all steps of their group: `group_centred` of groups of any size."""
    _check(rewards, at, batch)
    S = batch.lengths.numel()
    if group_size < 1 or S % group_size:
        raise ValueError(f"group_size must divide the {S} sequences, got {group_size}")
    if not len(rewards):
        return rewards
    group, order = torch.sort(batch.sequence.index_select(0, at) // group_size, stable=True)
    sizes = torch.bincount(group, minlength=S // group_size)
    place = torch.arange(len(group), device=group.device) - (sizes.cumsum(0) - sizes).index_select(0, group)
    table = rewards.new_full((S // group_size, int(sizes.max())), torch.nan)  # NaN: there is no such step
    table[group, place] = rewards.index_select(0, order)
    centred = group_centred(table.flatten(), table.shape[1], scale, eps).view_as(table)
    return torch.empty_like(rewards).index_copy(0, order, centred[group, place])


def _check(rewards: Tensor, at: Tensor, batch: Batch) -> None:
    if rewards.ndim != 1 or at.shape != rewards.shape or at.dtype != torch.int64:
        raise ValueError(
            "rewards must be (N,) and at int64 of the same shape, the position of each, "
            f"got {tuple(rewards.shape)} and {at.dtype} {tuple(at.shape)}"
        )
    T = batch.target.numel()
    if at.device.type == "cpu" and len(at) and not 0 <= int(at.min()) <= int(at.max()) < T:
        raise ValueError(f"at must hold positions of the batch, 0 to {T - 1}, got {int(at.min())} to {int(at.max())}")
    finite_or_nan("rewards", rewards)
