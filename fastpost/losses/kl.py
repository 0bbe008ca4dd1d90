"""Estimators of KL(p || q) at a token sampled from p, from its two log-probabilities (joschu.net/blog/kl-approx.html).

With r = q / p at that token, E[k1] = E[k3] = KL and k3 >= 0; E[k2] is biased, but its gradient is not.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from fastpost.types import IGNORE, Batch

LARGEST_EXPONENT = 40.0  # exp of it, its square and its product with a ratio are still float32


def k1(logp: Tensor, ref_logp: Tensor) -> Tensor:  # (T,), (T,) -> (T,)
    """-log r: unbiased, of either sign, the noisiest."""
    return logp - ref_logp


def k2(logp: Tensor, ref_logp: Tensor) -> Tensor:  # (T,), (T,) -> (T,)
    """(log r)^2 / 2: low variance, biased in value; E[d k2] = d KL."""
    return (logp - ref_logp).square() / 2


def k3(logp: Tensor, ref_logp: Tensor) -> Tensor:  # (T,), (T,) -> (T,)
    """r - 1 - log r: unbiased and never negative. expm1 keeps it exact where p and q nearly agree."""
    log_ratio = ref_logp - logp
    return torch.expm1(log_ratio.clamp(max=LARGEST_EXPONENT)) - log_ratio


ESTIMATORS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"k1": k1, "k2": k2, "k3": k3}


def kto_baseline(
    logp: Tensor,  # (T,) under the policy, of batch.target
    batch: Batch,  # completions beside prompts that are not theirs, with ref_logp
    mean_over_ranks: Callable[[Tensor], Tensor] = lambda x: x,
) -> Tensor:  # ()
    """max(0, mean over sequences of sum_t (logp - ref_logp)): KTO's z_0, for Batch.kl. A constant. arXiv:2402.01306.

    mean_over_ranks: averages a scalar over processes, before it is clamped.
    """
    if batch.ref_logp is None:
        raise ValueError("kto_baseline needs batch.ref_logp, which is None")
    if logp.shape != batch.target.shape:
        raise ValueError(f"logp must have shape {tuple(batch.target.shape)}, as batch.target, got {tuple(logp.shape)}")
    kept = batch.target != IGNORE
    each = batch.per_sequence(torch.where(kept, logp.detach() - batch.ref_logp, 0.0))
    return mean_over_ranks(each.mean()).clamp(min=0)
