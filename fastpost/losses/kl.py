"""Estimators of KL(p || q) at a token sampled from p, from its two log-probabilities (joschu.net/blog/kl-approx.html).

With r = q / p at that token, E[k1] = E[k3] = KL and k3 >= 0; E[k2] is biased, but its gradient is not.
"""

import torch
from torch import Tensor


def k1(logp: Tensor, ref_logp: Tensor) -> Tensor:  # (T,), (T,) -> (T,)
    """-log r: unbiased, of either sign, the noisiest."""
    return logp - ref_logp


def k2(logp: Tensor, ref_logp: Tensor) -> Tensor:  # (T,), (T,) -> (T,)
    """(log r)^2 / 2: low variance, biased in value; E[d k2] = d KL."""
    return (logp - ref_logp).square() / 2


def k3(logp: Tensor, ref_logp: Tensor) -> Tensor:  # (T,), (T,) -> (T,)
    """r - 1 - log r: unbiased and never negative. expm1 keeps it exact where p and q nearly agree."""
    log_ratio = ref_logp - logp
    return torch.expm1(log_ratio) - log_ratio
