"""Policy gradients: r = exp(logp - old_logp) the importance ratio of a token, A its advantage.

batch.old_logp None: on policy, r = 1 with the gradient of logp. A loss of sequences sees r through a mean or a sum over
the n tokens, and A through its mean. Every loss here is linear in A at a given sign, so what scales or masks a token
(rollout correction, top entropy) is done to its advantage, in `fastpost.advantages`; and where A is 0, r stopped short
of infinity, so are the loss and its gradient, and the head never sees the token. The family adds these knobs:
  beta                     + beta KL(p || reference), a token
  kl_estimator             "k3", "k2", "k1" of ref_logp (`fastpost.losses.kl`), or "exact": over the vocabulary, from a
                           `reference`
  use_bias_correction_kl   the estimate times r, always a token's own: unbiased where the tokens were sampled by
                           another policy (arXiv:2512.02556; TRL's default, and not in GRPO's paper). What is exact is
                           left alone
  entropy_coef             - entropy_coef H, a token, with the weight of the rest (TRL's is a mean over tokens whatever
                           normalises the loss)
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from fastpost.equation import Loss, loss
from fastpost.knobs import AboveOne, Fraction, NonNegative, Number, Positive, Switch, picked, shared_signature
from fastpost.losses.kl import ESTIMATORS
from fastpost.types import Batch, Stats

High = NonNegative | None  # epsilon_high: None means epsilon
Bound = AboveOne | None  # on the ratio itself; None: no bound

LARGEST_LOG_RATIO = 20.0  # r stops at exp(20), where nothing can be learned from a sample any more, and stays finite


def _log_ratio(stats: Stats, batch: Batch) -> Tensor:  # (T,)
    return (stats.logp - batch.behaviour_logp(stats.logp)).clamp(-LARGEST_LOG_RATIO, LARGEST_LOG_RATIO)


def _penalty(
    stats: Stats,
    batch: Batch,
    *,
    beta: NonNegative = 0.0,
    kl_estimator: Literal["k1", "k2", "k3", "exact"] = "k3",
    use_bias_correction_kl: Switch = False,
    entropy_coef: Number = 0.0,
) -> Tensor | float:  # (T,)
    """What keeps the policy near its reference and its entropy up."""
    penalty = 0.0
    if beta:
        exact = kl_estimator == "exact"
        divergence = stats.reverse_kl if exact else ESTIMATORS[kl_estimator](stats.logp, batch.ref_logp)
        if use_bias_correction_kl and not exact:
            divergence = divergence * _log_ratio(stats, batch).exp()
        penalty = beta * divergence
    return penalty - entropy_coef * stats.entropy if entropy_coef else penalty


def _without_advantage(batch: Batch, knobs: Mapping[str, Any]) -> Tensor | None:  # (T,) bool
    """Tokens that nothing moves: of a group without variance, or masked by their advantage, and free of penalties."""
    return None if knobs["beta"] or knobs["entropy_coef"] else batch.advantage == 0


def _objective(over: Callable[[Batch, Tensor], Tensor] | None = None) -> Callable[[Callable[..., Tensor]], Loss]:
    """Declares a policy loss: of tokens, or of sequences over which the penalty's tokens are summed up by `over`."""

    def declare(equation: Callable[..., Tensor]) -> Loss:
        @functools.wraps(equation)
        def penalised(stats: Stats, batch: Batch, **knobs) -> Tensor:
            policy = equation(stats, batch, **picked(equation, knobs))
            penalty = _penalty(stats, batch, **picked(_penalty, knobs))
            if not isinstance(penalty, Tensor):
                return policy
            return policy + (penalty if over is None else over(batch, penalty))

        penalised.__signature__ = shared_signature(equation, _penalty)  # pyright: ignore[reportAttributeAccessIssue]
        also = {
            "entropy": lambda k: k["entropy_coef"],
            "reverse_kl": lambda k: k["beta"] and k["kl_estimator"] == "exact",
        }
        return loss(unit="token" if over is None else "sequence", also=also, idle=_without_advantage)(penalised)

    return declare


# A batch arrives as what the loss may see of it, so these are no unbound methods.
def _mean(batch: Batch, x: Tensor) -> Tensor:  # (T,) -> (S,)
    return batch.mean_per_sequence(x)


def _sum(batch: Batch, x: Tensor) -> Tensor:  # (T,) -> (S,)
    return batch.per_sequence(x)


def _clipped(
    ratio: Tensor, advantage: Tensor, epsilon: float, epsilon_high: float | None, delta: float | None = None
) -> Tensor:  # of one shape
    """-min(r A, clip(r, 1 - epsilon, 1 + epsilon_high) A) of PPO; delta stops the r of the first term, too."""
    high = epsilon if epsilon_high is None else epsilon_high
    inside = ratio.clamp(1 - epsilon, 1 + high)
    return -torch.minimum((ratio if delta is None else ratio.clamp(max=delta)) * advantage, inside * advantage)


def _by_sign(positive: Tensor, above: float, below: float, like: Tensor) -> Tensor:
    """One of two numbers, in the dtype of `like`: a where of two floats would be float32."""
    return torch.where(positive, above, torch.full_like(positive, below, dtype=like.dtype))


# ---- of tokens ----


@_objective()
def reinforce(stats: Stats, batch: Batch) -> Tensor:
    """-A log p[y]: the plain policy gradient, for samples of this very policy."""
    return -batch.advantage * stats.logp


@_objective()
def ppo(stats: Stats, batch: Batch, *, cliprange: Fraction = 0.2, dual_clip: Bound = None) -> Tensor:
    """-min(r A, clip(r, 1 - cliprange, 1 + cliprange) A), and where A < 0 at most -dual_clip A. arXiv:1707.06347.

    dual_clip (arXiv:1912.09729): None means no bound. grpo's `delta` is the same bound where it is above the clip.
    """
    policy = _clipped(_log_ratio(stats, batch).exp(), batch.advantage, cliprange, None)
    if dual_clip is None:
        return policy
    return torch.where(batch.advantage < 0, torch.minimum(policy, -dual_clip * batch.advantage), policy)


@_objective()
def grpo(
    stats: Stats, batch: Batch, *, epsilon: Fraction = 0.2, epsilon_high: High = None, delta: Bound = None
) -> Tensor:
    """-min(min(r, delta) A, clip(r, 1 - epsilon, 1 + epsilon_high) A). arXiv:2402.03300.

    epsilon_high: None means epsilon. delta: None means no bound; with one the clip is two-sided (arXiv:2505.07291).
    Weight: `weights.grpo`, the mean over sequences of means over their tokens.
    """
    return _clipped(_log_ratio(stats, batch).exp(), batch.advantage, epsilon, epsilon_high, delta)


@_objective()
def bnpo(
    stats: Stats, batch: Batch, *, epsilon: Fraction = 0.2, epsilon_high: High = None, delta: Bound = None
) -> Tensor:
    """The equation of grpo; its weight is the mean over the tokens of the microbatch, `weights.bnpo`."""
    return _clipped(_log_ratio(stats, batch).exp(), batch.advantage, epsilon, epsilon_high, delta)


@_objective()
def dr_grpo(
    stats: Stats, batch: Batch, *, epsilon: Fraction = 0.2, epsilon_high: High = None, delta: Bound = None
) -> Tensor:
    """The equation of grpo, for advantages that no deviation divides; a fixed length divides the sum. arXiv:2503.20783.

    Weight: `weights.dr_grpo`.
    """
    return _clipped(_log_ratio(stats, batch).exp(), batch.advantage, epsilon, epsilon_high, delta)


@_objective()
def dapo(
    stats: Stats, batch: Batch, *, epsilon: Fraction = 0.2, epsilon_high: High = 0.28, delta: Bound = None
) -> Tensor:
    """The equation of grpo with a higher upper clip; the mean over all tokens of a step. arXiv:2503.14476.

    Weight: `weights.dapo`.
    """
    return _clipped(_log_ratio(stats, batch).exp(), batch.advantage, epsilon, epsilon_high, delta)


@_objective()
def cispo(stats: Stats, batch: Batch, *, epsilon_high: Positive = 5.0) -> Tensor:
    """-sg(min(r, epsilon_high)) A log p[y]: every token keeps a gradient. arXiv:2506.13585, arXiv:2510.13786.

    epsilon_high is the bound itself, as in the second paper (its epsilon_max), in TRL and in Liger; the first writes
    1 + epsilon_high. Weight: `weights.dapo`.
    """
    return -_log_ratio(stats, batch).exp().clamp(max=epsilon_high).detach() * batch.advantage * stats.logp


@_objective()
def sapo(
    stats: Stats, batch: Batch, *, sapo_temperature_pos: Positive = 1.0, sapo_temperature_neg: Positive = 1.05
) -> Tensor:
    """-(4 / tau) s(tau (r - 1)) A, tau = sapo_temperature_pos if A > 0 else sapo_temperature_neg. arXiv:2511.20347."""
    tau = _by_sign(batch.advantage > 0, sapo_temperature_pos, sapo_temperature_neg, batch.advantage)
    return -torch.sigmoid(tau * (_log_ratio(stats, batch).exp() - 1)) * (4 / tau) * batch.advantage


# ---- of sequences ----


@_objective(over=_mean)
def gspo(stats: Stats, batch: Batch, *, epsilon: Fraction = 3e-4, epsilon_high: High = None) -> Tensor:
    """-min(s A, clip(s, 1 - epsilon, 1 + epsilon_high) A), s = exp(mean_t log r). arXiv:2507.18071, equation 5.

    The paper clips at 3e-4 and 4e-4: ratios of means are near 1.
    """
    ratio = batch.mean_per_sequence(_log_ratio(stats, batch)).exp()
    return _clipped(ratio, batch.mean_per_sequence(batch.advantage), epsilon, epsilon_high)


@_objective(over=_mean)
def gspo_token(stats: Stats, batch: Batch, *, epsilon: Fraction = 3e-4, epsilon_high: High = None) -> Tensor:
    """-mean_t min(s_t A_t, clip(s_t, 1 - epsilon, 1 + epsilon_high) A_t), s_t = sg(s) p / sg(p). arXiv:2507.18071.

    Equation 13: gspo with an advantage for each token; the same number and gradient where they are all one.
    """
    ratio = batch.mean_per_sequence(_log_ratio(stats, batch)).exp().detach()
    each = batch.spread(ratio) * (stats.logp - stats.logp.detach()).exp()
    return batch.mean_per_sequence(_clipped(each, batch.advantage, epsilon, epsilon_high))


@_objective(over=_mean)
def gmpo(stats: Stats, batch: Batch, *, epsilon: NonNegative = 0.4, epsilon_high: High = None) -> Tensor:
    """-A exp(mean_t c(log r)), c clips at epsilon_high above if A > 0, at -epsilon below if not. arXiv:2507.20673.

    The bounds are on log r, so that the ratio stays in (exp(-epsilon), exp(epsilon_high)).
    """
    high = epsilon if epsilon_high is None else epsilon_high
    log_ratio, advantage = _log_ratio(stats, batch), batch.mean_per_sequence(batch.advantage)
    clipped = torch.where(batch.spread(advantage) > 0, log_ratio.clamp(max=high), log_ratio.clamp(min=-epsilon))
    return -advantage * batch.mean_per_sequence(clipped).exp()


@_objective(over=_sum)
def luspo(stats: Stats, batch: Batch, *, epsilon: Fraction = 3e-4, epsilon_high: High = None) -> Tensor:
    """n times gspo, so that a token of a long completion counts as much as one of a short. arXiv:2602.05261."""
    ratio = batch.mean_per_sequence(_log_ratio(stats, batch)).exp()
    return batch.counts * _clipped(ratio, batch.mean_per_sequence(batch.advantage), epsilon, epsilon_high)


@_objective(over=_sum)
def rloo(stats: Stats, batch: Batch, *, epsilon: Fraction = 0.2, epsilon_high: High = None) -> Tensor:
    """-min(s A, clip(s, 1 - epsilon, 1 + epsilon_high) A), s = exp(sum_t log r). arXiv:2402.14740.

    A completion is one action. The clip is TRL's; the paper, on policy, has no need of it. The advantage is
    `advantages.leave_one_out`.
    """
    ratio = batch.per_sequence(_log_ratio(stats, batch)).clamp(max=LARGEST_LOG_RATIO).exp()
    return _clipped(ratio, batch.mean_per_sequence(batch.advantage), epsilon, epsilon_high)


@_objective(over=_sum)
def vespo(
    stats: Stats,
    batch: Batch,
    *,
    vespo_k_pos: Positive = 2.0,
    vespo_lambda_pos: Positive = 3.0,
    vespo_k_neg: Positive = 3.0,
    vespo_lambda_neg: Positive = 2.0,
) -> Tensor:
    """-sg(phi(w)) sum_t A log p[y], phi(w) = w^k exp(lambda (1 - w)), w = exp(sum_t log r). arXiv:2602.10693.

    k and lambda by the sign of A. Weight: 1 / tokens of a step, for each sequence.
    """
    positive = batch.mean_per_sequence(batch.advantage) >= 0
    k = _by_sign(positive, vespo_k_pos, vespo_k_neg, stats.logp)
    decay = _by_sign(positive, vespo_lambda_pos, vespo_lambda_neg, stats.logp)
    log_w = batch.per_sequence(_log_ratio(stats, batch)).detach().clamp(-LARGEST_LOG_RATIO, LARGEST_LOG_RATIO)
    phi = (decay * (1 - log_w.exp()) + k * log_w).exp()
    return -phi * batch.per_sequence(batch.advantage * stats.logp)
