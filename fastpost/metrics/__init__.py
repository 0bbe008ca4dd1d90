"""Metrics: pure functions of (stats, batch, ...) -> {name: Part}, by TRL's names, with nothing read back to the host.

    seen = {}
    for batch in microbatches:
        ...
        seen = metrics.joined(seen, metrics.policy(stats, batch), metrics.kl_budget(stats, batch))
    log(metrics.values(metrics.over_ranks(seen)))  # 0-dim tensors; metrics.floats: numbers, in one transfer

A Part is sums or an extreme, not yet a quotient, so a mean over microbatches and processes of unequal size is the mean
over all their tokens, sequences or pairs. What is nowhere counted is NaN.
"""

from fastpost.metrics.pairs import displacement, kto, length_bias, preference, reward
from fastpost.metrics.parts import (
    Part,
    correlation,
    covariance,
    explained,
    floats,
    joined,
    largest,
    mean,
    mean_difference,
    over_ranks,
    smallest,
    total,
    values,
    variance,
)
from fastpost.metrics.ppo import ppo_rollout, ppo_update
from fastpost.metrics.rollouts import completions, importance_ratio, length_correlation, sampler_difference
from fastpost.metrics.steps import steps
from fastpost.metrics.tokens import (
    clip_extremes,
    entropy_collapse,
    kl_budget,
    num_tokens,
    policy,
    sft,
    unclipped,
)

__all__ = [
    "Part",
    "clip_extremes",
    "completions",
    "correlation",
    "covariance",
    "displacement",
    "entropy_collapse",
    "explained",
    "floats",
    "importance_ratio",
    "joined",
    "kl_budget",
    "kto",
    "largest",
    "length_bias",
    "length_correlation",
    "mean",
    "mean_difference",
    "num_tokens",
    "over_ranks",
    "policy",
    "ppo_rollout",
    "ppo_update",
    "preference",
    "reward",
    "sampler_difference",
    "sft",
    "smallest",
    "steps",
    "total",
    "unclipped",
    "values",
    "variance",
]
