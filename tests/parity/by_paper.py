"""The papers' equations in float64, a sequence at a time: for what no peer has, and where a peer is not the paper.

Nothing here is stabilised, shared with fastpost, or faster than it need be.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from parity.settings import Case

Peer = Callable[..., Tensor]


def log_sigmoid(x: Tensor) -> Tensor:
    return torch.log(1 / (1 + torch.exp(-x)))


def kept(case: Case, *names: str) -> list[list[Tensor]]:
    """For each sequence its tokens' statistics and fields of these names."""
    columns = [case.each(getattr(case.stats if hasattr(case.stats, n) else case.batch, n)) for n in names]
    return [list(each) for each in zip(*columns, strict=True)]


def pairs(values: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
    return list(zip(values[0::2], values[1::2], strict=True))


# ---- preference: D is the sum over a sequence of log pi - log pi_ref ----


def log_ratios(case: Case) -> list[tuple[Tensor, Tensor]]:
    return pairs([(logp - ref).sum() for logp, ref in kept(case, "logp", "ref_logp")])


def dpo(case: Case, *, beta: float = 0.1, label_smoothing: float = 0.0) -> Tensor:  # (S / 2,)
    """arXiv:2305.18290, equation 7; with label noise e, Mitchell's note on conservative DPO, equation 3."""
    e = label_smoothing
    terms = [(log_sigmoid(beta * (w - r)), log_sigmoid(-beta * (w - r))) for w, r in log_ratios(case)]
    return torch.stack([-(1 - e) * right - e * wrong for right, wrong in terms])


def hinge(case: Case, *, beta: float = 0.1) -> Tensor:  # (S / 2,)
    """arXiv:2305.10425: max(0, 1 - beta (D_w - D_r))."""
    return torch.stack([torch.clip(1 - beta * (w - r), min=0) for w, r in log_ratios(case)])


def wpo(peer: Peer, case: Case, *, use_weighting: bool, **knobs: object) -> Tensor:  # (S / 2,)
    """arXiv:2406.11827, equation 2: the loss of each pair times the weights of both sequences, which are constants."""
    weight = pairs([torch.exp((logp - sq).mean()).detach() for logp, sq in kept(case, "logp", "log_sum_sq")])
    return peer(case, **knobs) * torch.stack([w * r for w, r in weight])


def bco(case: Case, *, beta: float = 0.1, delta: float = 0.0) -> Tensor:  # (S / 2,)
    """arXiv:2404.04656: -log s(R_w - delta) - log s(-(R_r - delta)), both rewards beta D."""
    return torch.stack([-log_sigmoid(beta * w - delta) - log_sigmoid(-(beta * r - delta)) for w, r in log_ratios(case)])


def alpha_divergence(case: Case, *, beta: float = 0.1, alpha: float) -> Tensor:  # (S / 2,)
    """arXiv:2309.16240, table 1: f'(u) = (1 - u^-alpha) / alpha, in -log s(beta f'(u_w) - beta f'(u_r))."""
    slope = lambda log_u: (1 - torch.exp(-alpha * log_u)) / alpha  # noqa: E731
    return torch.stack([-log_sigmoid(beta * slope(w) - beta * slope(r)) for w, r in log_ratios(case)])


def with_nll(peer: Peer, case: Case, *, rpo_alpha: float, **knobs: object) -> Tensor:  # (S / 2,)
    """arXiv:2404.19733, equation 1: the loss of each pair and, by its own length, the nll of its chosen sequence."""
    chosen = [logp for (logp,) in kept(case, "logp")][0::2]
    return peer(case, **knobs) + rpo_alpha * torch.stack([-logp.mean() for logp in chosen])


def cpo(case: Case, *, beta: float = 0.1, label_smoothing: float = 0.0, cpo_alpha: float = 1.0) -> Tensor:  # (S / 2,)
    """arXiv:2401.08417, equation 3 and the nll, by the length of the chosen sequence."""
    out, e = [], label_smoothing
    for w, r in pairs([logp for (logp,) in kept(case, "logp")]):
        d = beta * (w.sum() - r.sum())
        out.append(-(1 - e) * log_sigmoid(d) - e * log_sigmoid(-d) - cpo_alpha * w.mean())
    return torch.stack(out)


def orpo(case: Case, *, beta: float = 0.1) -> Tensor:  # (S / 2,)
    """arXiv:2403.07691, equations 4, 6 and 7: nll - beta log s(log(odds_w / odds_r)), odds of the mean over tokens."""
    out = []
    for w, r in pairs([logp for (logp,) in kept(case, "logp")]):
        odds_w, odds_r = (torch.exp(x.mean()) / (1 - torch.exp(x.mean())) for x in (w, r))
        out.append(-w.mean() - beta * log_sigmoid(torch.log(odds_w / odds_r)))
    return torch.stack(out)


# ---- policy: r is pi / pi_old of a token, A its advantage ----

ESTIMATORS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {  # joschu.net/blog/kl-approx.html
    "k1": lambda logp, ref, exact: -torch.log(torch.exp(ref - logp)),
    "k2": lambda logp, ref, exact: torch.log(torch.exp(ref - logp)) ** 2 / 2,
    "k3": lambda logp, ref, exact: torch.exp(ref - logp) - 1 - (ref - logp),
    "exact": lambda logp, ref, exact: exact,
}


def penalties(
    case: Case,
    *,
    beta: float = 0.0,
    kl_estimator: str = "k3",
    use_bias_correction_kl: bool = False,
    entropy_coef: float = 0.0,
) -> list[Tensor]:  # S of (n,)
    """beta KL - coef H of each token; corrected, an estimate from one sample is weighted by that token's ratio
    (arXiv:2512.02556, 3.1), and a KL over the whole vocabulary, which is of no sample, by nothing."""
    out = []
    columns = kept(case, "logp", "ref_logp", "reverse_kl", "entropy")
    corrected = use_bias_correction_kl and kl_estimator != "exact"
    for (logp, ref, exact, entropy), r in zip(columns, token_ratios(case), strict=True):
        divergence = ESTIMATORS[kl_estimator](logp, ref, exact) * (r if corrected else 1)
        out.append(beta * divergence - entropy_coef * entropy)
    return out


def token_ratios(case: Case) -> list[Tensor]:
    return [torch.exp(logp) / torch.exp(old) for logp, old in kept(case, "logp", "old_logp")]


def mean_ratios(case: Case) -> list[Tensor]:
    """GSPO's, arXiv:2507.18071, equation 7: (pi(y) / pi_old(y))^(1 / |y|)."""
    return [torch.prod(r) ** (1 / len(r)) for r in token_ratios(case)]


def surrogate(r: Tensor, advantage: Tensor, low: float, high: float | None) -> Tensor:
    clipped = torch.clip(r, 1 - low, 1 + (low if high is None else high))
    return torch.minimum(r * advantage, clipped * advantage)


def on_tokens(case: Case, values: list[Tensor], extra: dict) -> Tensor:  # S of (n,) -> (T,)
    """With the penalties, in their places, zeros elsewhere."""
    both = [value + penalty for value, penalty in zip(values, penalties(case, **extra), strict=True)]
    return torch.zeros_like(case.stats.logp).masked_scatter(case.batch.target != -100, torch.cat(both))


def on_sequences(case: Case, values: list[Tensor], extra: dict, over: Callable = torch.mean) -> Tensor:  # (S,)
    return torch.stack([value + over(each) for value, each in zip(values, penalties(case, **extra), strict=True)])


def reinforce(case: Case, **extra: object) -> Tensor:  # (T,)
    """-A log pi (Williams, 1992)."""
    return on_tokens(case, [-a * logp for logp, a in kept(case, "logp", "advantage")], extra)


def ppo(
    case: Case, *, cliprange: float = 0.2, high: float | None = None, dual_clip: float | None = None, **extra: object
) -> Tensor:  # (T,)
    """arXiv:1707.06347, equation 7; where A < 0 its dual clip is max(surrogate, c A) (arXiv:1912.09729)."""
    out = []
    for r, (a,) in zip(token_ratios(case), kept(case, "advantage"), strict=True):
        gain = surrogate(r, a, cliprange, high)
        if dual_clip is not None:
            gain = torch.where(a < 0, torch.maximum(gain, dual_clip * a), gain)
        out.append(-gain)
    return on_tokens(case, out, extra)


def grpo(
    case: Case,
    *,
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
    delta: float | None = None,
    **extra: object,
) -> Tensor:  # (T,)
    """PPO's clip with one group's advantage for all tokens (arXiv:2402.03300); two-sided it is min(min(r, delta) A,
    clip(r) A) (arXiv:2505.07291), which is the dual clip wherever delta > 1 + epsilon_high."""
    return ppo(case, cliprange=epsilon, high=epsilon_high, dual_clip=delta, **extra)


def cispo(case: Case, *, epsilon_high: float = 5.0, **extra: object) -> Tensor:  # (T,)
    """arXiv:2510.13786: -sg(min(r, epsilon_max)) A log pi."""
    columns = zip(token_ratios(case), kept(case, "logp", "advantage"), strict=True)
    out = [-torch.clip(r, max=epsilon_high).detach() * a * logp for r, (logp, a) in columns]
    return on_tokens(case, out, extra)


def sapo(
    case: Case, *, sapo_temperature_pos: float = 1.0, sapo_temperature_neg: float = 1.05, **extra: object
) -> Tensor:  # (T,)
    """arXiv:2511.20347: -(4 / tau) s(tau (r - 1)) A, tau by the sign of A."""
    out = []
    for r, (a,) in zip(token_ratios(case), kept(case, "advantage"), strict=True):
        tau = torch.tensor([sapo_temperature_pos if x > 0 else sapo_temperature_neg for x in a], dtype=a.dtype)
        out.append(-4 / tau / (1 + torch.exp(-tau * (r - 1))) * a)
    return on_tokens(case, out, extra)


def gspo(case: Case, *, epsilon: float = 3e-4, epsilon_high: float | None = None, **extra: object) -> Tensor:  # (S,)
    """arXiv:2507.18071, equation 5."""
    columns = zip(mean_ratios(case), kept(case, "advantage"), strict=True)
    return on_sequences(case, [-surrogate(s, a.mean(), epsilon, epsilon_high) for s, (a,) in columns], extra)


def gspo_token(
    case: Case, *, epsilon: float = 3e-4, epsilon_high: float | None = None, **extra: object
) -> Tensor:  # (S,)
    """arXiv:2507.18071, equations 13 and 14: s_t = sg(s) pi / sg(pi), and an advantage of each token's own."""
    out = []
    for s, (logp, a) in zip(mean_ratios(case), kept(case, "logp", "advantage"), strict=True):
        each = s.detach() * torch.exp(logp) / torch.exp(logp).detach()
        out.append(-surrogate(each, a, epsilon, epsilon_high).mean())
    return on_sequences(case, out, extra)


def gmpo(case: Case, *, epsilon: float = 0.4, epsilon_high: float | None = None, **extra: object) -> Tensor:  # (S,)
    """arXiv:2507.20673: the geometric mean of ratios clipped to e^-epsilon, e^epsilon_high, on the side of A's sign."""
    low, high = math.exp(-epsilon), math.exp(epsilon if epsilon_high is None else epsilon_high)
    out = []
    for r, (a,) in zip(token_ratios(case), kept(case, "advantage"), strict=True):
        clipped = torch.clip(r, max=high) if a.mean() > 0 else torch.clip(r, min=low)
        out.append(-a.mean() * torch.prod(clipped) ** (1 / len(r)))
    return on_sequences(case, out, extra)


def luspo(case: Case, *, epsilon: float = 3e-4, epsilon_high: float | None = None, **extra: object) -> Tensor:  # (S,)
    """arXiv:2602.05261: GSPO's loss of a sequence times its length; the penalties' sum, likewise."""
    columns = zip(mean_ratios(case), kept(case, "advantage"), strict=True)
    out = [-len(a) * surrogate(s, a.mean(), epsilon, epsilon_high) for s, (a,) in columns]
    return on_sequences(case, out, extra, torch.sum)


def rloo(case: Case, *, epsilon: float = 0.2, epsilon_high: float | None = None, **extra: object) -> Tensor:  # (S,)
    """arXiv:2402.14740: the whole sequence is one action; PPO's clip on its ratio."""
    columns = zip(token_ratios(case), kept(case, "advantage"), strict=True)
    out = [-surrogate(torch.prod(r), a.mean(), epsilon, epsilon_high) for r, (a,) in columns]
    return on_sequences(case, out, extra, torch.sum)


def vespo(
    case: Case,
    *,
    vespo_k_pos: float = 2.0,
    vespo_lambda_pos: float = 3.0,
    vespo_k_neg: float = 3.0,
    vespo_lambda_neg: float = 2.0,
    **extra: object,
) -> Tensor:  # (S,)
    """arXiv:2602.10693: -phi(w) A sum log pi, phi(w) = w^k exp(lambda (1 - w)) a constant, w = pi(y) / pi_old(y)."""
    out = []
    for r, (logp, a) in zip(token_ratios(case), kept(case, "logp", "advantage"), strict=True):
        k, decay = (vespo_k_pos, vespo_lambda_pos) if a.mean() >= 0 else (vespo_k_neg, vespo_lambda_neg)
        w = torch.prod(r).detach()
        out.append(-(w**k) * torch.exp(decay * (1 - w)) * (a * logp).sum())
    return on_sequences(case, out, extra, torch.sum)
