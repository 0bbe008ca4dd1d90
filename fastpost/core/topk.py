"""A stored top-k teacher against the policy: divergences over K + 1 outcomes, the teacher's K tokens and everything
else.

With q_r = 1 - sum q_k the teacher's rest and p_r = 1 - sum p_k the policy's:
  forward  KL(q || p) = sum_k q_k log(q_k / p_k) + q_r log(q_r / p_r)
  reverse  KL(p || q) = sum_k p_k log(p_k / q_k) + p_r log(p_r / q_r)
  jsd      b KL(q || m) + (1 - b) KL(p || m), m = b q + (1 - b) p
By data processing each is a lower bound of the same divergence over the whole vocabulary. A renormalised teacher has
q_r = 0, and then forward and jsd are exactly those over the vocabulary. The policy's rest is summed, not subtracted
from one: 1 - sum p_k is all rounding where the teacher's tokens hold nearly everything.
"""

from __future__ import annotations

import math
from collections.abc import Set as AbstractSet

import torch
from torch import Tensor

TINY = 1e-30  # probabilities below this count as zero: their logarithm is not formed


def teacher_outcomes(logq: Tensor, rest: str, vocabulary: int, dtype: torch.dtype) -> Tensor:  # (R, K) -> (R, K + 1)
    """The teacher's log-probabilities of its K tokens and of the rest, to which a renormalised one leaves nothing.

    With K = V there is no rest: (R, K).
    """
    logq = logq.to(dtype)
    if logq.shape[1] == vocabulary:
        return logq.log_softmax(-1) if rest == "renormalize" else logq
    if rest == "renormalize":
        return torch.cat([logq.log_softmax(-1), torch.full_like(logq[..., :1], -math.inf)], -1)
    left = (1 - logq.exp().sum(-1, keepdim=True)).clamp(min=TINY)
    return torch.cat([logq, left.log()], -1)


def _kl(a: Tensor, b: Tensor) -> Tensor:  # (R, K + 1) log-probabilities -> (R,)
    """KL(a || b), where an outcome that a never takes adds nothing."""
    taken = ~(a <= math.log(TINY))  # so that NaN is taken, and seen
    return torch.where(taken, a.exp() * (torch.where(taken, a, 0.0) - torch.where(taken, b, 0.0)), 0.0).sum(-1)


def divergences(p: Tensor, q: Tensor, wants: AbstractSet[str], beta: float) -> dict[str, Tensor]:
    """Those of forward_kl, reverse_kl and jsd that are wanted, from two (R, K + 1) of log-probabilities."""
    found = {}
    if "forward_kl" in wants:
        found["forward_kl"] = _kl(q, p)
    if "reverse_kl" in wants:
        found["reverse_kl"] = _kl(p, q)
    if "jsd" in wants:
        m = torch.logaddexp(p + math.log1p(-beta), q + math.log(beta))
        found["jsd"] = beta * _kl(q, m) + (1 - beta) * _kl(p, m)
    return {name: value.clamp(min=0) for name, value in found.items()}


def gradient(
    p: Tensor,  # (R, K + 1)
    q: Tensor,  # (R, K + 1)
    K: int,
    d: dict[str, Tensor],  # (R,) dL/d(divergence)
    beta: float,
) -> tuple[Tensor, Tensor]:  # (R, K + 1), (R,)
    """g = dL/dlog p of each outcome, up to multiples of p (which cancel in dL/dlogits), and g / p of the rest.

    forward  g = -q          reverse  g = p log(p / q)          jsd  g = (1 - b) p log(p / m)
    """
    g, ratio = torch.zeros_like(p), torch.zeros_like(p[:, 0])
    probability = p.exp()
    if "forward_kl" in d:
        g -= d["forward_kl"][:, None] * q.exp()
        ratio -= d["forward_kl"] * (q[:, -1] - p[:, -1]).clamp(max=80).exp()  # times a p_v <= p_r, so never large
    slopes = {}
    if "reverse_kl" in d:
        slopes["reverse_kl"] = p - q
    if "jsd" in d:
        slopes["jsd"] = (1 - beta) * (p - torch.logaddexp(p + math.log1p(-beta), q + math.log(beta)))
    for name, slope in slopes.items():
        g += d[name][:, None] * torch.where(probability > 0, probability * slope, 0.0)
        ratio += d[name] * slope[:, -1]
    return g, ratio if p.shape[1] > K else torch.zeros_like(ratio)
