"""Preferences without a reference: a chosen and a rejected sequence, adjacent in the batch.

l is the sum of logp over a sequence's tokens, m its mean, w the chosen sequence, r the rejected one, s the sigmoid, and
nll_w = -m_w.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fastpost.equation import loss
from fastpost.knobs import BelowHalf, NonNegative, Number, Positive
from fastpost.losses.preference import chosen_nll, logistic
from fastpost.types import Batch, Stats


@loss(unit="pair")
def cpo(
    stats: Stats,
    batch: Batch,
    *,
    beta: Positive = 0.1,
    label_smoothing: BelowHalf = 0.0,
    cpo_alpha: NonNegative = 1.0,
) -> Tensor:
    """-(1 - e) log s(x) - e log s(-x) + cpo_alpha nll_w, x = beta (l_w - l_r), e = label_smoothing. arXiv:2401.08417.

    nll_w is the mean over the chosen sequence's tokens. TRL's is the mean over all chosen tokens of a microbatch, so
    that a pair's share depends on its company.
    """
    chosen, rejected = batch.pairs(batch.per_sequence(stats.logp))
    return logistic(beta * (chosen - rejected), label_smoothing) + cpo_alpha * chosen_nll(stats, batch)


@loss(unit="pair")
def simpo(
    stats: Stats,
    batch: Batch,
    *,
    beta: Positive = 2.0,
    simpo_gamma: Number = 1.0,
    label_smoothing: BelowHalf = 0.0,
    cpo_alpha: NonNegative = 0.0,
) -> Tensor:
    """-log s(beta (m_w - m_r) - simpo_gamma), m = l over the number of tokens. arXiv:2405.14734.

    label_smoothing as in dpo; cpo_alpha > 0 is CPO-SimPO, the nll of cpo. TRL's defaults are CPO's.
    """
    chosen, rejected = batch.pairs(batch.mean_per_sequence(stats.logp))
    return logistic(beta * (chosen - rejected) - simpo_gamma, label_smoothing) - cpo_alpha * chosen


def _log_odds(logp: Tensor) -> Tensor:
    """log(p / (1 - p)), with p kept an ulp from one, where the odds end."""
    logp = logp.clamp(max=-torch.finfo(logp.dtype).eps)
    near_one = logp > -math.log(2)
    rest = torch.where(near_one, (-torch.expm1(torch.where(near_one, logp, -1.0))).log(), torch.log1p(-logp.exp()))
    return logp - rest


@loss(unit="pair")
def orpo(stats: Stats, batch: Batch, *, beta: NonNegative = 0.1) -> Tensor:
    """nll_w - beta log s(log odds(m_w) - log odds(m_r)), odds(m) = e^m / (1 - e^m). arXiv:2403.07691, equation 6.

    m is the mean of logp over the tokens, nll_w = -m_w, beta the paper's lambda. TRL takes nll_w over the prompt, too.
    Where a policy is certain, P = 1, TRL's and Liger's gradients are NaN.
    """
    chosen, rejected = batch.pairs(batch.mean_per_sequence(stats.logp))
    return -chosen - beta * F.logsigmoid(_log_odds(chosen) - _log_odds(rejected))
