"""Policy gradients with clipped importance ratios r = exp(logp - old_logp), advantage A."""

import torch
from torch import Tensor

from fastpost.losses.kl import k3
from fastpost.equation import loss
from fastpost.types import Batch, Stats


def clipped(ratio: Tensor, advantage: Tensor, epsilon: float, epsilon_high: float | None) -> Tensor:  # (U,) each
    """-min(r A, clip(r, 1 - epsilon, 1 + epsilon_high) A) of PPO (arXiv:1707.06347); DAPO's clip-higher
    is another epsilon_high."""
    high = epsilon if epsilon_high is None else epsilon_high
    if not (0 <= epsilon <= 1 and high >= 0):
        raise ValueError(f"epsilon must be in [0, 1] and epsilon_high not negative, got {epsilon} and {epsilon_high}")
    return -torch.minimum(ratio * advantage, ratio.clamp(1 - epsilon, 1 + high) * advantage)


@loss(unit="token")
def grpo(
    stats: Stats, batch: Batch, *, epsilon: float = 0.2, epsilon_high: float | None = None, beta: float = 0.0
) -> Tensor:
    """-min(r A, clip(r, 1 - epsilon, 1 + epsilon_high) A) + beta k3(logp, ref_logp). Unit: token. arXiv:2402.03300.

    epsilon_high: None means epsilon; larger is DAPO's clip-higher (arXiv:2503.14476). beta: 0 reads no ref_logp.
    """
    policy = clipped((stats.logp - batch.behaviour_logp(stats.logp)).exp(), batch.advantage, epsilon, epsilon_high)
    return policy + beta * k3(stats.logp, batch.ref_logp) if beta else policy


@loss(unit="sequence")
def gspo(
    stats: Stats, batch: Batch, *, epsilon: float = 3e-4, epsilon_high: float | None = None, beta: float = 0.0
) -> Tensor:
    """GRPO's clip on one ratio a sequence, s = exp(mean_t log r_t), A the sequence's mean advantage. Unit: sequence.

    arXiv:2507.18071, equation 5 (which clips at 3e-4 and 4e-4: ratios of means are near 1). beta adds the mean of k3.
    """
    n = batch.counts.clamp(min=1)
    ratio = (batch.per_sequence(stats.logp - batch.behaviour_logp(stats.logp)) / n).exp()
    policy = clipped(ratio, batch.per_sequence(batch.advantage) / n, epsilon, epsilon_high)
    return policy + beta * batch.per_sequence(k3(stats.logp, batch.ref_logp)) / n if beta else policy
