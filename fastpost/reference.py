"""The same mathematics with the logits in memory, for tests and for reading. Nothing here is fast, and nothing here is
used at run time.

`token_stats` is the truth that fastpost.token_stats is compared with: in float64 it is exact, in the inputs' own dtype
it is what plain torch would give. Gradients are autograd's.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fastpost.core.quantised import Quantised
from fastpost.types import OUTPUTS, Head, Stats, TopK


def logits(hidden: Tensor, head: Head, temperature: float | Tensor = 1.0) -> Tensor:  # (T, D) -> (T, V)
    assert head.shard is None, "the truth has the whole vocabulary"
    weight = head.weight.to(hidden.dtype)[:] if isinstance(head.weight, Quantised) else head.weight
    z = F.linear(hidden, weight, head.bias)
    for each in head.lora:  # in its own dtype, as PEFT does
        z = z + each.scaling * F.linear(F.linear(F.dropout(hidden.to(each.a.dtype), each.dropout), each.a), each.b)
    z = head.scale * z.to(hidden.dtype)
    if head.softcap is not None:
        z = head.softcap * torch.tanh(z / head.softcap)
    return z / (temperature[:, None] if isinstance(temperature, Tensor) else temperature)


def kl(logp: Tensor, logq: Tensor) -> Tensor:  # (T, V), (T, V) -> (T,)
    """KL(p || q) = sum p (log p - log q)."""
    return (logp.exp() * (logp - logq)).sum(-1)


def jsd(logp: Tensor, logq: Tensor, beta: float) -> Tensor:
    """Generalised Jensen-Shannon divergence; its ends are taken as the two KLs, as GKD does (arXiv:2306.13649)."""
    if beta == 0:
        return kl(logq, logp)
    if beta == 1:
        return kl(logp, logq)
    m = torch.logaddexp(logq + math.log(beta), logp + math.log1p(-beta))
    return beta * kl(logq, m) + (1 - beta) * kl(logp, m)


def over_outcomes(logp: Tensor, teacher: TopK) -> tuple[Tensor, Tensor]:  # (T, V) -> (T, K + 1) or (T, V), twice
    """Log-probabilities of policy and stored teacher over the outcomes on which they are compared."""
    logq = teacher.logp.to(logp.dtype)
    if teacher.rest == "renormalize":
        floor = torch.full_like(logp, -1e4)  # stands for log 0, so that 0 * log 0 is 0
        return logp, floor.scatter(1, teacher.ids, logq.log_softmax(-1))
    chosen = logp.gather(1, teacher.ids)
    if chosen.shape == logp.shape:
        return chosen, logq
    mask = torch.zeros_like(logp, dtype=torch.bool).scatter(1, teacher.ids, True)
    rest = logp.masked_fill(mask, -torch.inf).logsumexp(-1, keepdim=True)
    rest_q = (1 - logq.exp().sum(-1, keepdim=True)).clamp(min=1e-30).log()
    return torch.cat([chosen, rest], 1), torch.cat([logq, rest_q], 1)


def token_stats(
    hidden: Tensor,  # (T, D)
    head: Head,
    target: Tensor,  # (T,), none ignored
    *,
    reference: tuple[Tensor, Head] | TopK | None = None,
    temperature: float | Tensor = 1.0,
    jsd_beta: float = 0.5,
) -> Stats:
    """Every statistic, each by its definition."""
    z = logits(hidden, head, temperature)
    logp = z.log_softmax(-1)
    p = logp.exp()
    at_target = lambda x: x.gather(1, target[:, None])[:, 0]  # noqa: E731
    found = {
        "logp": at_target(logp),
        "lse": z.logsumexp(-1),
        "entropy": -(p * logp).sum(-1),
        "log_sum_sq": (2 * logp).logsumexp(-1),
        "mean_logp": logp.mean(-1),
        "top1": at_target(z) >= z.amax(-1),
        "logp@1": at_target(logits(hidden, head).log_softmax(-1)),
    }
    if reference is not None:
        if isinstance(reference, TopK):
            a, b = over_outcomes(logp, reference)
        else:
            a, b = logp, logits(*reference, temperature).log_softmax(-1)
        found |= {"reverse_kl": kl(a, b), "forward_kl": kl(b, a), "jsd": jsd(a, b, jsd_beta)}
    return Stats(**{OUTPUTS[name]: value for name, value in found.items()})
