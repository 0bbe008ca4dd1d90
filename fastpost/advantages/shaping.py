"""What is added to the reward of a completion for its length, or for not coming to an end."""

from __future__ import annotations

import torch
from torch import Tensor


def missing_eos_penalty(
    rewards: Tensor,  # (S,)
    finished: Tensor,  # (S,) bool: the completion ended by itself
    penalty: float = 1.0,
) -> Tensor:  # (S,)
    """R, less the penalty where the completion was cut off: missing_eos_penalty of TRL's PPO (arXiv:2403.17031)."""
    if finished.dtype != torch.bool or finished.shape != rewards.shape:
        raise ValueError(
            f"finished must be bool of the shape of rewards {tuple(rewards.shape)}, "
            f"got {finished.dtype} of shape {tuple(finished.shape)}"
        )
    return torch.where(finished, rewards, rewards - penalty)


def soft_overlong_punishment(
    completion_length: Tensor,  # (S,) tokens, before any masking
    max_completion_len: int,
    soft_punish_cache: int,
) -> Tensor:  # (S,) fp32, in [-1, 0], to be added to the reward
    """0 up to L - c tokens, then falling in a line to -1 at L, and -1 beyond: DAPO (arXiv:2503.14476, equation 13).

    L is max_completion_len, c soft_punish_cache; c = 0 leaves the step at L.
    """
    if not 0 <= soft_punish_cache <= max_completion_len:
        raise ValueError(
            f"soft_punish_cache must be in [0, max_completion_len {max_completion_len}], got {soft_punish_cache}"
        )
    over = (completion_length - max_completion_len).float()
    if soft_punish_cache == 0:
        return -(over > 0).float()
    return (-(over + soft_punish_cache) / soft_punish_cache).clamp(-1, 0)
