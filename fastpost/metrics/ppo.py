"""Metrics of PPO by the names of TRL's PPOTrainer, which are those of arXiv:2403.17031.

Means are over tokens, or over sequences where that is said; TRL's were means of means over minibatches.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from fastpost.losses import kl
from fastpost.metrics.parts import Part, explained, joined, mean, total, variance
from fastpost.metrics.tokens import kept
from fastpost.types import Batch, Stats


def ppo_rollout(
    score: Tensor,  # (S,)
    batch: Batch,  # with old_logp and ref_logp
    finished: Tensor,  # (S,) bool: it ended by itself
    *,
    kl_coef: float = 0.05,
    kl_estimator: Literal["k1", "k2", "k3"] = "k1",
) -> dict[str, Part]:
    """Of what was sampled, over sequences: objective/kl, nats; objective/entropy, -sum log p of the sampled tokens;
    objective/non_score_reward, -kl_coef KL; objective/scores; objective/rlhf_reward, their sum; val/num_eos_tokens."""
    _needs(batch, "ppo_rollout", "old_logp", "ref_logp")
    at = kept(batch)
    estimate = kl.ESTIMATORS[kl_estimator](batch.old_logp, batch.ref_logp)
    spent = batch.per_sequence(torch.where(at, estimate, 0.0))
    return {
        "objective/kl": mean(spent),
        "objective/entropy": mean(batch.per_sequence(torch.where(at, -batch.old_logp, 0.0))),
        "objective/non_score_reward": mean(-kl_coef * spent),
        "objective/rlhf_reward": mean(score - kl_coef * spent),
        "objective/scores": mean(score),
        "val/num_eos_tokens": total(finished),
    }


def ppo_update(
    stats: Stats,
    batch: Batch,  # with old_logp, advantage, old_value and return_
    values: Tensor,  # (T,) what the critic says now
    *,
    cliprange: float = 0.2,
    cliprange_value: float = 0.2,
) -> dict[str, Part]:
    """Of an update, over tokens.

    policy/approxkl_avg       (log r)^2 / 2, how far from the policy that sampled
    policy/clipfrac_avg       where the clipped objective is the smaller one, and the gradient gone
    val/clipfrac_avg          where the clipped error of the critic is the larger one
    policy/entropy_avg        if it was computed
    loss/{policy,value}_avg   before vf_coef
    val/ratio, val/ratio_var  of r = exp(logp - old_logp)
    val/explained_variance    1 - Var(return - value) / Var(return): 0 is a critic as good as a constant
    """
    _needs(batch, "ppo_update", "old_logp", "advantage", "old_value", "return_")
    at = kept(batch)
    parts = _of_policy(stats, batch, at, cliprange)
    error = (values - batch.return_).square()
    near = batch.old_value + (values - batch.old_value).clamp(-cliprange_value, cliprange_value)
    clipped = (near - batch.return_).square()
    return joined(
        parts,
        {
            "val/clipfrac_avg": mean(clipped > error, at),
            "loss/value_avg": mean(torch.maximum(error, clipped) / 2, at),
            "val/explained_variance": explained(batch.return_, values, at),
        },
    )


def _of_policy(stats: Stats, batch: Batch, at: Tensor, cliprange: float) -> dict[str, Part]:
    log_ratio = torch.where(at, stats.logp - batch.old_logp, 0.0)
    ratio = log_ratio.exp()
    plain, clipped = -ratio * batch.advantage, -ratio.clamp(1 - cliprange, 1 + cliprange) * batch.advantage
    parts = {
        "policy/approxkl_avg": mean(log_ratio.square() / 2, at),
        "policy/clipfrac_avg": mean(clipped > plain, at),
        "loss/policy_avg": mean(torch.maximum(plain, clipped), at),
        "val/ratio": mean(ratio, at),
        "val/ratio_var": variance(ratio, at),
    }
    return parts if stats.entropy is None else parts | {"policy/entropy_avg": mean(stats.entropy, at)}


def _needs(batch: Batch, who: str, *names: str) -> None:
    for name in names:
        if getattr(batch, name) is None:
            raise ValueError(f"{who} needs batch.{name}, which is None")
