"""Metrics of tokens: of a language model, and of a policy against the one that sampled and against its reference."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from fastpost.losses import kl
from fastpost.metrics.parts import Part, covariance, largest, mean, smallest, total
from fastpost.types import IGNORE, Batch, Stats, nearest


def num_tokens(batch: Batch) -> dict[str, Part]:
    """num_tokens: all positions, prompts too: what the model read. It adds up over steps."""
    return {"num_tokens": total(torch.ones_like(batch.target))}


def sft(stats: Stats, batch: Batch) -> dict[str, Part]:
    """entropy, nats a token; mean_token_accuracy: the target is the likeliest token. Reads entropy, top1."""
    given = {"entropy": stats.entropy, "mean_token_accuracy": stats.top1}
    return {name: mean(x, kept(batch)) for name, x in given.items() if x is not None}


def policy(
    stats: Stats,
    batch: Batch,
    *,
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
    importance_sampling_level: Literal["token", "sequence"] = "token",
) -> dict[str, Part]:
    """entropy; clip_ratio/{low,high,region}_mean, shares of tokens; kl to the reference where ref_logp is given.

    low: r < 1 - epsilon where A < 0, so the gradient is gone; high: r > 1 + epsilon_high where A > 0. At the level of
    sequences a token has the ratio of its sequence, so a long one counts more than in TRL, whose mean is then over
    sequences. kl is k3 of the sampled tokens, or reverse_kl where it was computed.
    """
    low, high = _clipped(stats, batch, epsilon, epsilon_high, importance_sampling_level)
    at = kept(batch)
    parts = {} if stats.entropy is None else {"entropy": mean(stats.entropy, at)}
    shares = {"low": low, "high": high, "region": low | high}
    parts |= {f"clip_ratio/{name}_mean": mean(share, at) for name, share in shares.items()}
    if stats.reverse_kl is not None:
        parts["kl"] = mean(stats.reverse_kl, at)
    elif batch.ref_logp is not None:
        parts["kl"] = mean(kl.k3(stats.logp, batch.ref_logp), at)
    return parts


def unclipped(tokens: int, device: torch.device | str = "cpu") -> dict[str, Part]:
    """The clip ratios of tokens that never reached the model, having no gradient: where nothing was done nothing was
    clipped. To be joined with those of `policy`, on their device."""
    none = mean(torch.zeros(1, device=device).expand(tokens))
    return {f"clip_ratio/{name}_mean": none for name in ("low", "high", "region")}


def clip_extremes(
    stats: Stats,
    batch: Batch,
    *,
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
    importance_sampling_level: Literal["token", "sequence"] = "token",
) -> dict[str, Part]:
    """clip_ratio/low_min, clip_ratio/high_max: the least and the largest share that a sequence has clipped."""
    low, high = _clipped(stats, batch, epsilon, epsilon_high, importance_sampling_level)
    count = batch.per_sequence(kept(batch).double())
    share = [batch.per_sequence(x.double()) / count for x in (low, high)]
    return {"clip_ratio/low_min": smallest(share[0], count > 0), "clip_ratio/high_max": largest(share[1], count > 0)}


def kl_budget(stats: Stats, batch: Batch) -> dict[str, Part]:
    """kl_budget/token and kl_budget/sequence: KL(p || reference) in nats, a token and a whole completion.

    What a policy has spent of its distance to the reference: the score of a learned reward rises with the root of the
    nats a sequence, the true one falls again (arXiv:2210.10760). The unbiased k1 of the sampled tokens, which belong to
    this policy, or reverse_kl where it was computed.
    """
    at = kept(batch)
    spent = stats.reverse_kl if stats.reverse_kl is not None else kl.k1(stats.logp, _given(batch, "ref_logp"))
    count = batch.per_sequence(at.double())
    return {
        "kl_budget/token": mean(spent, at),
        "kl_budget/sequence": mean(batch.per_sequence(torch.where(at, spent, 0.0)), count > 0),
    }


def entropy_collapse(stats: Stats, batch: Batch, *, low: float = 0.1) -> dict[str, Part]:
    """entropy/low_fraction: the share of tokens below `low` nats, where nothing is explored any more; a mean hides it,
    as few tokens carry most of the entropy (arXiv:2506.01939). entropy/covariance: Cov(log p, A) over tokens; a step of
    policy gradient takes entropy away in proportion to it (arXiv:2505.22617)."""
    at = kept(batch)
    parts = {} if stats.entropy is None else {"entropy/low_fraction": mean(stats.entropy < low, at)}
    if batch.advantage is not None:
        parts["entropy/covariance"] = covariance(stats.logp, batch.advantage, at)
    return parts


def kept(batch: Batch) -> Tensor:  # (T,) bool
    return batch.target != IGNORE


def _given(batch: Batch, name: str) -> Tensor:
    value = getattr(batch, name)
    if value is None:
        raise ValueError(f"this metric needs batch.{name}, which is None")
    return value


def _clipped(
    stats: Stats, batch: Batch, epsilon: float, epsilon_high: float | None, level: str
) -> tuple[Tensor, Tensor]:  # (T,) bool, (T,) bool
    """Which tokens are clipped below, and above."""
    if level not in ("token", "sequence"):
        guess = nearest(level, ["token", "sequence"])
        raise ValueError(f"importance_sampling_level must be 'token' or 'sequence', got {level!r}{guess}")
    at, advantage = kept(batch), _given(batch, "advantage")
    log_ratio = torch.where(at, stats.logp - batch.behaviour_logp(stats.logp), 0.0)
    if level == "sequence":
        log_ratio = batch.spread(batch.per_sequence(log_ratio) / batch.per_sequence(at.float()).clamp(min=1))
    ratio = log_ratio.exp()
    high = epsilon if epsilon_high is None else epsilon_high
    return at & (ratio < 1 - epsilon) & (advantage < 0), at & (ratio > 1 + high) & (advantage > 0)
