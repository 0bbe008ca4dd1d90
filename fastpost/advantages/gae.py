"""Rewards of tokens -> advantages of tokens, along each sequence of a packed batch.

A step of an episode is a kept position t: the state is what hidden[t] has read, the action is target[t], and the next
state is the next kept position of the same sequence, so tokens that a tool wrote in between are passed over. Nothing
crosses from one sequence into another, and ignored positions hold 0.

Every sum along an episode is the recurrence y[t] = x[t] + c[t] y[t + 1] with c = 0 at its end. All sequences are solved
at once by doubling, in log2(longest) passes over T numbers, so nothing loops over tokens; the terms are added in pairs,
so rounding grows with the logarithm of the length too.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from fastpost.advantages import checks
from fastpost.losses import kl
from fastpost.types import Batch

KlEstimator = Literal["k1", "k2", "k3"]


@torch.no_grad()
def kl_in_reward(
    score: Tensor,  # (S,); NaN: none applies
    logp: Tensor,  # (T,) under the policy that sampled
    ref_logp: Tensor,  # (T,)
    batch: Batch,
    kl_coef: float = 0.05,
    kl_estimator: KlEstimator = "k1",
) -> Tensor:  # (T,)
    """-kl_coef KL_t, and the score on the last kept token of its sequence: PPO's rewards (arXiv:1909.08593,
    arXiv:2203.02155).

    With k1 their sum is score - kl_coef (logp - ref_logp) of the whole sequence. k3 is never negative, but added to a
    reward it is not the penalty whose gradient is that of the KL.
    """
    checks.per_sequence(batch, score=score)
    checks.per_token(batch, logp=logp, ref_logp=ref_logp)
    checks.finite_or_nan("score", score)
    checks.one_of("kl_estimator", kl_estimator, tuple(kl.ESTIMATORS))
    rows, sequence, last = _steps(batch)
    cost = kl_coef * kl.ESTIMATORS[kl_estimator](logp.index_select(0, rows), ref_logp.index_select(0, rows))
    given = torch.where(last, score.nan_to_num(nan=0.0).index_select(0, sequence), 0.0)
    return _laid(batch, rows, given - cost)


@torch.no_grad()
def reward_to_go(rewards: Tensor, batch: Batch, gamma: float = 1.0) -> Tensor:  # (T,) -> (T,)
    """sum_{i >= t} gamma^(i - t) r_i, to the end of the sequence."""
    checks.per_token(batch, rewards=rewards)
    checks.within("gamma", gamma, 0, 1)
    rows, _, last = _steps(batch)
    return _laid(batch, rows, _scan(_wide(rewards.index_select(0, rows)), gamma, last, _longest(batch)))


def reinforce_plus_plus(rewards: Tensor, batch: Batch, gamma: float = 1.0) -> Tensor:  # (T,) -> (T,)
    """reward_to_go, whitened over all kept tokens of the batch: REINFORCE++ (arXiv:2501.03262).

    rewards are those of `kl_in_reward`, so A_t is the score less kl_coef times the KL from t on. No critic, no groups.
    """
    return whiten(reward_to_go(rewards, batch, gamma), checks.kept(batch))


@torch.no_grad()
def whiten(
    values: Tensor,
    mask: Tensor | None = None,  # of the shape of values; None: all count
    shift_mean: bool = True,
) -> Tensor:
    """(x - mean) / sqrt(var + 1e-8), var over n - 1; 0 where the mask is false: masked_whiten of TRL's PPO.

    shift_mean=False adds the mean again: how rewards are whitened (whiten_rewards). Values that are all equal, or only
    one, have no variance and whiten to exactly 0. It sees what it is given: one process, unless that was gathered.
    """
    mask = torch.ones_like(values, dtype=torch.bool) if mask is None else mask
    if mask.shape != values.shape or mask.dtype != torch.bool:
        raise ValueError(
            f"mask must be bool of the shape of values {tuple(values.shape)}, got {mask.dtype} of shape "
            f"{tuple(mask.shape)}"
        )
    if not values.numel():
        return values
    count = mask.sum().clamp(min=1)
    mean = torch.where(mask, values, 0.0).sum() / count
    varied = torch.where(mask, values, torch.inf).amin() < torch.where(mask, values, -torch.inf).amax()
    centred = torch.where(mask & varied, values - mean, 0.0)
    white = centred * (centred.square().sum() / (count - 1).clamp(min=1) + 1e-8).rsqrt()
    return white if shift_mean else torch.where(mask, white + mean, 0.0)


@torch.no_grad()
def gae(
    rewards: Tensor,  # (T,)
    values: Tensor,  # (T,) V of the state that hidden[t] has read
    batch: Batch,
    gamma: float = 1.0,
    lam: float = 0.95,
    truncated: Tensor | None = None,  # (S,) bool: the episode was cut off; None: all ended
) -> tuple[Tensor, Tensor]:  # advantage (T,), return_ (T,)
    """Generalised advantage estimation (arXiv:1506.02438), gamma and lam in [0, 1]:

      delta_t = r_t + gamma V_{t+1} - V_t,   A_t = sum_{i >= t} (gamma lam)^(i - t) delta_i,   return_ = A + V.

    After the last kept token of an episode that ended V is 0. Where `truncated`, it goes on with the value of the
    position behind that token (its last, which has read the whole sequence); TRL's PPO takes 0 there too, which tells
    the critic that a limit on length is an end.
    """
    checks.per_token(batch, rewards=rewards, values=values)
    checks.within("gamma", gamma, 0, 1)
    checks.within("lam", lam, 0, 1)
    rows, sequence, last = _steps(batch)
    value = _wide(values.index_select(0, rows))
    after = torch.where(last, _bootstrap(values, batch, rows, sequence, truncated).to(value), value.roll(-1))
    delta = rewards.index_select(0, rows) + gamma * after - value
    advantage = _scan(delta, gamma * lam, last, _longest(batch))
    return _laid(batch, rows, advantage), _laid(batch, rows, advantage + value)


def _bootstrap(values: Tensor, batch: Batch, rows: Tensor, sequence: Tensor, truncated: Tensor | None) -> Tensor:
    """(N,) the value behind each step, if it were its episode's last one."""
    if truncated is None:
        return values.new_zeros(rows.shape)
    checks.per_sequence(batch, truncated=truncated)
    if truncated.dtype != torch.bool:
        raise ValueError(f"truncated must be bool, whether an episode was cut off, got {truncated.dtype}")
    behind = (rows + 1).clamp(max=batch.target.numel() - 1)
    goes_on = truncated.index_select(0, sequence) & (batch.sequence.index_select(0, behind) == sequence)
    return torch.where(goes_on & (behind > rows), values.index_select(0, behind), 0.0)


def _steps(batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Kept positions (N,), the sequence of each (N,), and whether it is its sequence's last (N,) bool."""
    rows = batch.kept if batch.kept is not None else checks.kept(batch).nonzero()[:, 0]
    sequence = batch.sequence.index_select(0, rows)
    last = torch.ones_like(sequence, dtype=torch.bool)
    last[:-1] = sequence[1:] != sequence[:-1]
    return rows, sequence, last


def _longest(batch: Batch) -> int:
    """Steps of the longest episode, or more: what is known without waiting for an accelerator."""
    lengths = batch.lengths if batch.kept_lengths is None else batch.kept_lengths
    return int(lengths.max()) if lengths.device.type == "cpu" else batch.target.numel()


def _laid(batch: Batch, rows: Tensor, x: Tensor) -> Tensor:  # (N,) -> (T,)
    return x.new_zeros(batch.target.numel()).index_copy(0, rows, x)


def _wide(x: Tensor) -> Tensor:
    """A critic under autocast may speak bfloat16; sums are of fp32 at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _scan(x: Tensor, decay: float, last: Tensor, longest: int) -> Tensor:  # (N,), (N,) bool -> (N,)
    """y[i] = x[i] + decay y[i + 1], and y[i] = x[i] where `last`. After k passes y covers 2^k terms."""
    carry = torch.where(last, 0.0, torch.full_like(x, decay))
    step = 1
    while step < min(longest, len(x)):
        # 0 times the NaN of another sequence would not be 0
        rest = torch.where(carry[:-step] > 0, carry[:-step] * x[step:], 0.0)
        x = torch.cat([x[:-step] + rest, x[-step:]])
        carry = torch.cat([carry[:-step] * carry[step:], carry.new_zeros(step)])
        step *= 2
    return x
