"""Metrics of completions: how long they are, whether length is what the reward pays for, and who sampled them."""

from __future__ import annotations

import torch
from torch import Tensor

from fastpost.metrics.parts import Part, correlation, largest, mean, smallest
from fastpost.metrics.tokens import kept
from fastpost.types import Batch


def completions(
    completion_length: Tensor,  # (S,) tokens, before any masking
    finished: Tensor,  # (S,) bool: it ended by itself
) -> dict[str, Part]:
    """completions/{mean,min,max}_length, the same of those that ended (_terminated_length), and the share of those that
    did not (clipped_ratio). Where none ended the former are NaN (0 in TRL, which a plot shows as a collapse)."""
    if finished.dtype != torch.bool or finished.shape != completion_length.shape:
        raise ValueError(
            f"finished must be bool of the shape of completion_length {tuple(completion_length.shape)}, "
            f"got {finished.dtype} of shape {tuple(finished.shape)}"
        )
    kinds = {"mean": mean, "min": smallest, "max": largest}
    parts = {f"completions/{name}_length": kind(completion_length) for name, kind in kinds.items()}
    parts |= {
        f"completions/{name}_terminated_length": kind(completion_length, finished) for name, kind in kinds.items()
    }
    return parts | {"completions/clipped_ratio": mean(~finished)}


def length_correlation(
    rewards: Tensor,  # (S,); NaN: not applicable
    completion_length: Tensor,  # (S,)
) -> dict[str, Part]:
    """reward_length_correlation, Pearson's over completions: much of what a learned reward pays for is length
    (arXiv:2310.03716). Near 1 while the reward rises, the policy learns to be long."""
    if rewards.shape != completion_length.shape:
        raise ValueError(
            f"rewards and completion_length must have one shape, got {tuple(rewards.shape)} and "
            f"{tuple(completion_length.shape)}"
        )
    return {"reward_length_correlation": correlation(rewards, completion_length, ~rewards.isnan())}


def sampler_difference(batch: Batch) -> dict[str, Part]:
    """sampling/sampling_logp_difference/{mean,max}: |old_logp - rollout_logp| of tokens whose rollout_logp is not NaN.
    It grows where a sampler no longer has the policy's weights."""
    for name in ("old_logp", "rollout_logp"):
        if getattr(batch, name) is None:
            raise ValueError(f"sampler_difference needs batch.{name}, which is None")
    apart = (batch.old_logp - batch.rollout_logp).abs()
    at = kept(batch) & ~apart.isnan()
    name = "sampling/sampling_logp_difference"
    return {f"{name}/mean": mean(apart, at), f"{name}/max": largest(apart, at)}


def importance_ratio(batch: Batch, weight: Tensor, *, of_sequences: bool = False) -> dict[str, Part]:
    """sampling/importance_sampling_ratio/{min,mean,max}: of `weight` (T,), from `advantages.rollout_correction`.

    of_sequences: one number a sequence, as in TRL, for the modes that weigh sequences. A mean far below 1 scales every
    gradient down, unseen by any other metric.
    """
    if weight.shape != batch.target.shape:
        raise ValueError(f"weight must have shape {tuple(batch.target.shape)}, got {tuple(weight.shape)}")
    at = kept(batch)
    if of_sequences:
        count = batch.per_sequence(at.to(weight.dtype))
        weight, counted = batch.per_sequence(torch.where(at, weight, 0.0)) / count.clamp(min=1), count > 0
    else:
        counted = at
    ratio = "sampling/importance_sampling_ratio"
    return {
        f"{ratio}/min": smallest(weight, counted),
        f"{ratio}/mean": mean(weight, counted),
        f"{ratio}/max": largest(weight, counted),
    }
