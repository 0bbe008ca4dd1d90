"""Preferences against a reference: a chosen and a rejected sequence, adjacent in the batch.

l is the sum of logp over a sequence's tokens, l_ref that of ref_logp, w the chosen sequence, r the rejected one, s the
sigmoid. An equation of the DPO family sees (P,) numbers of its P pairs: d_w = l_w - l_ref_w and d_r, their difference
d = d_w - d_r, and D, the difference of what an f-divergence makes of them, or M, that of their means over tokens. The
family adds these knobs:
  ld_alpha           tokens of the longer sequence beyond the shorter one's length count ld_alpha (LD-DPO,
                     arXiv:2409.06411)
  use_weighting      the loss times the probabilities of both, exp(mean_t (logp - log sum p^2)), constants (WPO,
                     arXiv:2406.11827)
  rpo_alpha          + rpo_alpha times the chosen sequence's mean negative log-likelihood (arXiv:2404.19733)
  f_divergence_type  d -> f'(exp d) (arXiv:2309.16240): reverse_kl d, forward_kl 1 - exp(-d), js_divergence
                     log 2 + log s(d), alpha_divergence (exp((a - 1) d) - 1) / (a - 1), a = f_alpha_divergence_coef,
                     which is 1 - alpha of the paper
"""

import functools
import math
from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from fastpost.equation import Loss, loss
from fastpost.knobs import (
    BelowHalf,
    Fraction,
    InsideHalf,
    NonNegative,
    Number,
    Positive,
    Switch,
    picked,
    shared_signature,
)
from fastpost.losses.kl import LARGEST_EXPONENT
from fastpost.types import Batch, Stats

FDivergence = Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"]

# ---- what the equations of the DPO family see, and what is done with what they say ----


def _sums(x: Tensor, batch: Batch, ld_alpha: float | None) -> tuple[Tensor, Tensor]:  # (T,) -> (P,), (P,)
    """x summed over each side, with what is beyond the length of the shorter one times ld_alpha."""
    if ld_alpha is not None:
        shorter = torch.minimum(*batch.pairs(batch.counts)).repeat_interleave(2)  # (S,)
        starts = batch.counts.cumsum(0) - batch.counts
        place = torch.arange(len(x), device=x.device) - batch.spread(starts)
        x = torch.where(place < batch.spread(shorter), x, ld_alpha * x)
    return batch.pairs(batch.per_sequence(x))


def _log_ratios(stats: Stats, batch: Batch, *, ld_alpha: Fraction | None = None) -> tuple[Tensor, Tensor]:
    """d_w, d_r: (P,) each."""
    return _sums(stats.logp - batch.ref_logp, batch, ld_alpha)


def _scores(
    stats: Stats,
    batch: Batch,
    *,
    ld_alpha: Fraction | None = None,
    f_divergence_type: FDivergence = "reverse_kl",
    f_alpha_divergence_coef: Number = 0.5,
) -> tuple[Tensor, Tensor]:
    """D_w, D_r: f' of the ratios."""
    slope = _SLOPES[f_divergence_type]
    if f_divergence_type == "alpha_divergence" and abs(f_alpha_divergence_coef - 1) > 1e-6:  # at 1 it is reverse_kl
        slope = functools.partial(_alpha_slope, power=f_alpha_divergence_coef - 1)
    chosen, rejected = _log_ratios(stats, batch, ld_alpha=ld_alpha)
    return slope(chosen), slope(rejected)


def _alpha_slope(d: Tensor, power: float) -> Tensor:
    return torch.expm1((power * d).clamp(max=LARGEST_EXPONENT)) / power


_SLOPES: dict[str, Callable[[Tensor], Tensor]] = {
    "reverse_kl": lambda d: d,
    "forward_kl": lambda d: -torch.expm1((-d).clamp(max=LARGEST_EXPONENT)),
    "js_divergence": lambda d: math.log(2) + F.logsigmoid(d),
    "alpha_divergence": lambda d: d,
}


def _mean_scores(
    stats: Stats,
    batch: Batch,
    *,
    ld_alpha: Fraction | None = None,
    f_divergence_type: FDivergence = "reverse_kl",
    f_alpha_divergence_coef: Number = 0.5,
) -> tuple[Tensor, Tensor]:
    """M_w, M_r: the scores over the numbers of tokens."""
    scores = _scores(
        stats,
        batch,
        ld_alpha=ld_alpha,
        f_divergence_type=f_divergence_type,
        f_alpha_divergence_coef=f_alpha_divergence_coef,
    )
    chosen, rejected = (x / n for x, n in zip(scores, batch.pairs(batch.counts.clamp(min=1)), strict=True))
    return chosen, rejected


def _adjusted(
    each: Tensor, stats: Stats, batch: Batch, *, use_weighting: Switch = False, rpo_alpha: NonNegative = 0.0
) -> Tensor:
    """The family's weight and its added likelihood."""
    if use_weighting:
        chosen, rejected = batch.pairs(batch.mean_per_sequence(stats.logp.detach() - stats.log_sum_sq))
        each = each * (chosen + rejected).exp()
    return each + rpo_alpha * chosen_nll(stats, batch) if rpo_alpha else each


def chosen_nll(stats: Stats, batch: Batch) -> Tensor:  # (P,)
    """Mean over the chosen sequence's tokens, so that a pair counts the same whatever its length and its company."""
    return -batch.pairs(batch.mean_per_sequence(stats.logp))[0]


def _of_pairs(
    scores: Callable[..., tuple[Tensor, Tensor]], soft_labels: bool = False
) -> Callable[[Callable[..., Tensor]], Loss]:
    """Declares a loss of the DPO family: an equation on what `scores` makes of each pair. soft_labels: its
    label_smoothing is 1 - batch.probability, a pair's own, where the batch has that."""

    def declare(equation: Callable[..., Tensor]) -> Loss:
        @functools.wraps(equation)
        def of_pairs(stats: Stats, batch: Batch, **knobs) -> Tensor:
            given = picked(equation, knobs)
            if soft_labels:
                given["label_smoothing"] = batch.doubt(given["label_smoothing"])
            each = equation(*scores(stats, batch, **picked(scores, knobs)), **given)
            return _adjusted(each, stats, batch, **picked(_adjusted, knobs))

        of_pairs.__signature__ = shared_signature(equation, scores, _adjusted)  # pyright: ignore[reportAttributeAccessIssue]
        declared = loss(unit="pair", also={"log_sum_sq": lambda k: k["use_weighting"]}, differentiates=("logp",))
        return declared(of_pairs)

    return declare


def logistic(margin: Tensor, label_smoothing: float | Tensor) -> Tensor:
    """-(1 - e) log s(margin) - e log s(-margin): a label is wrong with probability e."""
    return -(1 - label_smoothing) * F.logsigmoid(margin) - label_smoothing * F.logsigmoid(-margin)


# ---- the DPO family ----


@_of_pairs(_scores, soft_labels=True)
def dpo(chosen: Tensor, rejected: Tensor, *, beta: Positive = 0.1, label_smoothing: BelowHalf = 0.0) -> Tensor:
    """-(1 - e) log s(beta D) - e log s(-beta D), with e = label_smoothing. arXiv:2305.18290.

    e > 0 is conservative DPO: a label is wrong with probability e. TRL 1.16's sigmoid loss ignores it. Where the batch
    knows the probability of each label, e is what is left of 1, each pair's own.
    """
    return logistic(beta * (chosen - rejected), label_smoothing)


@_of_pairs(_mean_scores)
def ipo(chosen: Tensor, rejected: Tensor, *, beta: Positive = 0.1) -> Tensor:
    """(M - 1 / (2 beta))^2. arXiv:2310.12036, equation 17, where beta is tau.

    The paper does not say what becomes of the length; its authors' results are of means over tokens, as in TRL. Liger
    has no IPO.
    """
    return (chosen - rejected - 1 / (2 * beta)).square()


@_of_pairs(_scores)
def hinge(chosen: Tensor, rejected: Tensor, *, beta: Positive = 0.1) -> Tensor:
    """max(0, 1 - beta D): SLiC and RSO. arXiv:2305.10425, arXiv:2309.06657."""
    return torch.relu(1 - beta * (chosen - rejected))


@_of_pairs(_scores)
def robust(chosen: Tensor, rejected: Tensor, *, beta: Positive = 0.1, label_smoothing: BelowHalf = 0.0) -> Tensor:
    """(-(1 - e) log s(beta D) + e log s(-beta D)) / (1 - 2 e): unbiased under noise e. arXiv:2403.00409."""
    margin, e = beta * (chosen - rejected), label_smoothing
    return (-(1 - e) * F.logsigmoid(margin) + e * F.logsigmoid(-margin)) / (1 - 2 * e)


@_of_pairs(_scores)
def exo(chosen: Tensor, rejected: Tensor, *, beta: Positive = 0.1, label_smoothing: InsideHalf = 1e-3) -> Tensor:
    """KL((q, 1 - q) || (1 - e, e)), q = s(beta D), e = label_smoothing. arXiv:2402.00856, equation 16."""
    margin, e = beta * (chosen - rejected), label_smoothing
    log_q, log_rest = F.logsigmoid(margin), F.logsigmoid(-margin)
    return log_q.exp() * (log_q - math.log1p(-e)) + log_rest.exp() * (log_rest - math.log(e))


@_of_pairs(_log_ratios)
def nca(chosen: Tensor, rejected: Tensor, *, beta: Positive = 0.1) -> Tensor:
    """-log s(beta d_w) - log s(-beta d_w) / 2 - log s(-beta d_r) / 2. arXiv:2402.05369."""
    return -F.logsigmoid(beta * chosen) - (F.logsigmoid(-beta * chosen) + F.logsigmoid(-beta * rejected)) / 2


@_of_pairs(_log_ratios)
def bco(chosen: Tensor, rejected: Tensor, *, beta: Positive = 0.1, delta: Number = 0.0) -> Tensor:
    """-log s(beta d_w - delta) - log s(delta - beta d_r). arXiv:2404.04656.

    delta: the paper's reward shift, a running mean over both sides of beta d, kept by the caller. TRL has none.
    """
    return -F.logsigmoid(beta * chosen - delta) - F.logsigmoid(delta - beta * rejected)


@_of_pairs(_log_ratios)
def sppo(chosen: Tensor, rejected: Tensor, *, beta: Positive = 0.1) -> Tensor:
    """(d_w - 1 / (2 beta))^2 + (d_r + 1 / (2 beta))^2: who wins is certain. arXiv:2405.00675, equation 4.7."""
    return (chosen - 0.5 / beta).square() + (rejected + 0.5 / beta).square()


@_of_pairs(_log_ratios)
def apo_zero(chosen: Tensor, rejected: Tensor, *, beta: Positive = 0.1) -> Tensor:
    """1 - s(beta d_w) + s(beta d_r): for chosen answers better than the model's own. arXiv:2408.06266, equation 7."""
    return torch.sigmoid(-beta * chosen) + torch.sigmoid(beta * rejected)


@_of_pairs(_log_ratios)
def apo_down(chosen: Tensor, rejected: Tensor, *, beta: Positive = 0.1) -> Tensor:
    """s(beta d_w) + 1 - s(beta d): for chosen answers worse than the model's own. arXiv:2408.06266, equation 8."""
    return torch.sigmoid(beta * chosen) + torch.sigmoid(-beta * (chosen - rejected))


@_of_pairs(_scores)
def discopop(chosen: Tensor, rejected: Tensor, *, beta: Positive = 0.1, discopop_tau: Positive = 0.05) -> Tensor:
    """-(1 - m) log s(x) + m exp(-x), x = beta D, m = s(x / discopop_tau). arXiv:2406.08414, equation 5."""
    x = beta * (chosen - rejected)
    # m and exp(-x) in one exponent: far below 0 their product, which is 0, would be 0 * inf.
    log_m = F.logsigmoid(x / discopop_tau)
    return -torch.sigmoid(-x / discopop_tau) * F.logsigmoid(x) + (log_m - x).clamp(max=LARGEST_EXPONENT).exp()


@_of_pairs(_mean_scores)
def sigmoid_norm(chosen: Tensor, rejected: Tensor, *, beta: Positive = 0.1) -> Tensor:
    """-log s(beta M): length-normalised DPO. arXiv:2411.15124. Its beta is some tens of times DPO's."""
    return -F.logsigmoid(beta * (chosen - rejected))


# ---- of the whole batch: quantile against quantile ----


def _sorted_loss(
    above: Tensor, below: Tensor, *, beta: Positive = 0.1, label_smoothing: BelowHalf = 0.0
) -> Tensor:  # (P,), (P,) -> (1,)
    margin = beta * (above.sort().values - below.sort().values)
    return logistic(margin, label_smoothing).mean(0, keepdim=True)


def _present(batch: Batch, above: Tensor, below: Tensor) -> tuple[Tensor, Tensor]:  # (P,) -> (P',)
    """Without the pairs that have no token left: they must not take a place in the order."""
    there = (torch.maximum(*batch.pairs(batch.counts)) > 0).nonzero()[:, 0]
    return above.index_select(0, there), below.index_select(0, there)


def _of_quantiles(samples: Callable[..., tuple[Tensor, Tensor]]) -> Loss:
    """Declares a loss of two samples, of which the first should be above the second at each quantile."""

    @functools.wraps(samples)
    def of_batch(stats: Stats, batch: Batch, **knobs) -> Tensor:
        above, below = _present(batch, *samples(stats, batch, **picked(samples, knobs)))
        return _sorted_loss(above, below, **picked(_sorted_loss, knobs))

    of_batch.__signature__ = shared_signature(_sorted_loss, samples)  # pyright: ignore[reportAttributeAccessIssue]
    return loss(unit="batch")(of_batch)


@_of_quantiles
def aot(stats: Stats, batch: Batch, *, ld_alpha: Fraction | None = None) -> tuple[Tensor, Tensor]:
    """mean_i of DPO on x_(i) - y_(i), x = l_w - l_r, y = l_ref_w - l_ref_r, each sorted. arXiv:2406.05882.

    First-order stochastic dominance of the policy's margins over the reference's. What weighs a pair has no place here:
    a quantile is nobody's own.
    """
    chosen, rejected = _sums(stats.logp, batch, ld_alpha)
    ref_chosen, ref_rejected = _sums(batch.ref_logp, batch, ld_alpha)
    return chosen - rejected, ref_chosen - ref_rejected


@_of_quantiles
def aot_unpaired(stats: Stats, batch: Batch, *, ld_alpha: Fraction | None = None) -> tuple[Tensor, Tensor]:
    """mean_i of DPO on x_(i) - y_(i), x = d_w, y = d_r, each sorted. arXiv:2406.05882."""
    return _log_ratios(stats, batch, ld_alpha=ld_alpha)
