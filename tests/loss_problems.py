"""What losses are tried on: a packed batch with whatever any of them reads, and losses that ask more than theirs do."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

import catalogue
import fastpost as fp
from fastpost.types import NEEDS_REFERENCE
from problems import Problem, gradients, problem

LENGTHS = torch.tensor([21, 0, 29, 9, 24, 37, 1, 7])  # four pairs; one sequence is empty, one has a single position
PROMPTS = (2, 0, 5, 1, 4, 2, 0, 1)  # positions at the head of each sequence that predict nothing; nor does the last
T = int(LENGTHS.sum())


@fp.loss(unit="token", reads=("logp", "entropy", "mean_logp"), differentiates=("logp", "entropy"))
def entropic(stats: fp.Stats, batch: fp.Batch, *, beta: float = 0.1) -> Tensor:
    """A loss of tokens with two differentiated statistics and one that is only looked at."""
    return -stats.logp * stats.mean_logp.detach().exp() - beta * stats.entropy


@fp.loss(unit="sequence", reads=("logp", "reverse_kl"))
def distant(stats: fp.Stats, batch: fp.Batch) -> Tensor:
    return torch.log1p(batch.per_sequence(stats.reverse_kl)) - 0.1 * batch.per_sequence(stats.logp)


@fp.loss(unit="batch", reads=("logp", "log_sum_sq"))
def spread(stats: fp.Stats, batch: fp.Batch) -> Tensor:
    """A loss that cannot be cut: the variance over the batch."""
    return (stats.logp + stats.log_sum_sq).var(correction=0)[None]


OWN: dict[str, tuple[fp.Loss, dict]] = {
    "entropic": (entropic, {"beta": 0.2}),
    "distant": (distant, {}),
    "spread": (spread, {}),
}
CASES = catalogue.CASES | OWN


def positions(first: int, last: int) -> slice:
    """Of sequences first..last."""
    return slice(int(LENGTHS[:first].sum()), int(LENGTHS[:last].sum()))


def packed() -> Tensor:  # (T,) bool
    """Which positions predict a token."""
    keep = torch.ones(T, dtype=torch.bool)
    for i, prompt in enumerate(PROMPTS):
        where = positions(i, i + 1)
        keep[where][:prompt] = False
        keep[where][-1:] = False
    return keep


def longest_unit(loss: fp.Loss) -> int:
    """Kept tokens."""
    each = [int(packed()[positions(i, i + 1)].sum()) for i in range(len(LENGTHS))]
    pairs = [a + b for a, b in zip(each[::2], each[1::2], strict=True)]
    return {"token": 1, "sequence": max(each), "pair": max(pairs), "batch": sum(each)}[loss.unit]


def setting(loss: fp.Loss, dtype: torch.dtype = torch.float32, *, train_head: bool = True) -> tuple[Problem, fp.Batch]:
    p = problem(dtype, T=T, bias=True, temperature=0.75)
    hidden, head = torch.randn(T, 9), fp.Head(torch.randn(200, 9))
    p = replace(p, reference=(hidden.to(dtype), head)).to(dtype, train_head=train_head)
    with torch.no_grad():
        logp = fp.token_stats(p.hidden, p.head, p.target, temperature=0.75).logp.float()
    batch = fp.Batch(
        torch.where(packed(), p.target, -100),
        LENGTHS,
        old_logp=logp + 0.2 * torch.randn(T),
        ref_logp=logp + 0.2 * torch.randn(T),
        advantage=torch.randn(len(LENGTHS)),
        label=torch.arange(len(LENGTHS)) % 3 == 0,
        kl=torch.tensor(0.1),
    )
    return p, replace(batch, weight=torch.rand(batch.units(loss.unit)) + 0.5)


def referred(loss: fp.Loss, p: Problem, knobs: dict) -> dict:
    """The reference, for a loss that reads a divergence from it."""
    return {"reference": p.reference} if NEEDS_REFERENCE & set(loss.bind(**knobs).reads) else {}


def fused(loss: fp.Loss, p: Problem, batch: fp.Batch, **knobs: object) -> Tensor:
    total = fp.fused_loss(loss, p.hidden, p.head, batch, temperature=p.temperature, **referred(loss, p, knobs), **knobs)
    assert isinstance(total, Tensor)
    return total


def both(loss: fp.Loss, p: Problem, batch: fp.Batch, **knobs: object) -> tuple[Tensor, ...]:
    """The loss, and its gradient in each leaf."""
    total = fused(loss, p, batch, **knobs)
    return total.detach(), *gradients(total, torch.ones(()), p).values()
