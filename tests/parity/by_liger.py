"""Liger 0.8.5's chunked_loss functions: the equation each hands to its chunks, and the fused loss as a whole."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from parity.settings import Case


def function(module: str, name: str):
    """The class that holds a fused loss's equation."""
    return getattr(pytest.importorskip(f"liger_kernel.chunked_loss.{module}"), f"LigerFusedLinear{name}Function")


def sums(case: Case, x: Tensor) -> tuple[Tensor, Tensor]:  # (T,) -> (S / 2,), (S / 2,)
    total = case.rows(x).sum(1)
    return total[0::2], total[1::2]


def means(case: Case, x: Tensor) -> tuple[Tensor, Tensor]:  # (T,) -> (S / 2,), (S / 2,)
    mean = case.rows(x).sum(1) / case.lengths
    return mean[0::2], mean[1::2]


def rows_of(case: Case) -> Tensor:  # (S, 1): Liger divides by half its length
    return torch.zeros(case.S, 1)


def dpo(loss_type: str, case: Case, **knobs: object) -> Tensor:  # scalar: the mean over pairs
    logp, reference = sums(case, case.stats.logp), sums(case, case.batch.ref_logp)
    equation = function("dpo_loss", "DPO").preference_loss_fn
    return equation(*logp, rows_of(case), *reference, loss_type=loss_type, **knobs)[0]


def cpo(case: Case, **knobs: object) -> Tensor:  # scalar
    return function("cpo_loss", "CPO").preference_loss_fn(*sums(case, case.stats.logp), rows_of(case), **knobs)[0]


def simpo(case: Case, **knobs: object) -> Tensor:  # scalar
    return function("simpo_loss", "SimPO").preference_loss_fn(*means(case, case.stats.logp), rows_of(case), **knobs)[0]


def orpo(case: Case, *, beta: float = 0.1) -> Tensor:  # scalar: the odds, and the mean over chosen tokens
    odds = function("orpo_loss", "ORPO").preference_loss_fn(*means(case, case.stats.logp), rows_of(case), beta=beta)[0]
    chosen = case.each(case.stats.logp)[0::2]
    return odds - torch.cat(chosen).mean()


def kto(case: Case, *, beta: float = 0.1, kl: bool = True) -> Tensor:  # scalar: the mean over sequences
    logp, reference = (case.rows(x).sum(1) for x in (case.stats.logp, case.batch.ref_logp))
    return function("kto_loss", "KTO").preference_loss_fn(
        logp, case.batch.label, rows_of(case), reference, beta=beta, kl=case.batch.kl if kl else None
    )[0]


def grpo(
    loss_type: str,
    case: Case,
    *,
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
    level: str = "token",
    beta: float = 0.0,
    **knobs: object,
) -> Tensor:  # scalar, reduced as the loss type says
    mask, old = case.mask, case.batch.old_logp
    return function("grpo_loss", "GRPO").ppo_loss_fn(
        case.rows(case.stats.logp),
        mask,
        torch.stack([x[0] for x in case.each(case.batch.advantage)]),
        mask,
        ref_per_token_logps=case.rows(case.batch.ref_logp),
        old_per_token_logps=None if old is None else case.rows(old),
        epsilon_low=epsilon,
        epsilon_high=epsilon if epsilon_high is None else epsilon_high,
        beta=beta,
        loss_type=loss_type,
        importance_sampling_level=level,
        max_completion_length=16,
        **knobs,
    )[0]
