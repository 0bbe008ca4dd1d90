"""What is measured: the inputs, and the cases of the head.

A case is a loss of per-token statistics, averaged over its units, and a head that is trained or not; a run of it is the
loss and its gradients. Where a loss compares with a reference, computing what it needs of the reference is part of it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

import fastpost as fp

SEQUENCES = 8  # adjacent ones are a pair
LOGITS_STD = 3.0
WEIGHT_ROWS = 4096  # of dW that are compared: the first targets, and others at random
DIVERGENCES = ("forward_kl", "reverse_kl", "jsd")
JSD_BETA = 0.5


@dataclass(frozen=True)
class Inputs:
    hidden: Tensor  # (T, D), a leaf
    weight: Tensor  # (V, D), a leaf where the head is trained
    hidden_q: Tensor  # (T, D), the reference's
    weight_q: Tensor  # (V, D)
    batch: fp.Batch  # SEQUENCES of one length; advantage is one number a sequence
    sampled: Tensor  # (N,) the rows of dW that are compared

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        return (self.hidden, self.weight) if self.weight.requires_grad else (self.hidden,)

    def trained(self, yes: bool) -> Inputs:
        """The same memory, with the head trained or frozen."""
        return replace(self, weight=self.weight.detach().requires_grad_(yes))


@dataclass(frozen=True, eq=False)  # a loss holds its knobs in a dict, so a case is known by its identity
class Case:
    name: str
    loss: fp.Loss
    trained: bool
    scores_reference: bool = False  # batch.ref_logp is computed in the run, as trainers of a preference do

    @property
    def title(self) -> str:
        return f"{self.name}, W {'trained' if self.trained else 'frozen'}"

    @property
    def compares(self) -> bool:
        """Whether the loss reads a divergence from the reference."""
        return any(name in DIVERGENCES for name in self.loss.reads)

    @property
    def products(self) -> int:
        """The fewest that compute it, each 2 T D V flop."""
        return 2 + self.trained + (self.compares or self.scores_reference)

    def value(self, stats: fp.Stats, batch: fp.Batch) -> Tensor:  # ()
        return self.loss(stats, batch).mean()


@fp.loss(unit="token")
def reinforce(stats: fp.Stats, batch: fp.Batch) -> Tensor:
    """-R logp: per-token log-probabilities with an arbitrary gradient from above."""
    return -batch.return_ * stats.logp


@fp.loss(unit="token", reads=("logp", "entropy"))
def entropy_bonus(stats: fp.Stats, batch: fp.Batch) -> Tensor:
    """-R logp - H, H large enough that an error in its gradient shows."""
    return -batch.return_ * stats.logp - stats.entropy


@fp.loss(unit="token", reads=("logp", "reverse_kl"))
def kl_penalty(stats: fp.Stats, batch: fp.Batch) -> Tensor:
    """-R logp + KL(p || q), exact over the vocabulary."""
    return -batch.return_ * stats.logp + stats.reverse_kl


CASES = (
    Case("logp", reinforce, trained=False),
    Case("logp", reinforce, trained=True),
    Case("sft", fp.losses.sft, trained=False),
    Case("sft", fp.losses.sft, trained=True),
    Case("logp + entropy", entropy_bonus, trained=True),
    Case("logp + reverse_kl", kl_penalty, trained=True),
    Case("grpo", fp.losses.grpo, trained=False),
)


def make_inputs(tokens: int, hidden_size: int, vocabulary: int, dtype: torch.dtype, device: torch.device) -> Inputs:
    """Logits of standard deviation 3; a reference that agrees with the policy in part."""
    generator = torch.Generator(device).manual_seed(0)
    normal = lambda *shape: torch.randn(shape, generator=generator, device=device)  # noqa: E731
    hidden = normal(tokens, hidden_size)
    weight = normal(vocabulary, hidden_size).mul_(LOGITS_STD / math.sqrt(hidden_size))
    target = torch.randint(vocabulary, (tokens,), generator=generator, device=device)
    others = torch.randperm(vocabulary, generator=generator, device=device)
    near = lambda x: (0.9 * x + math.sqrt(1 - 0.9**2) * x.std() * normal(*x.shape)).to(dtype)  # noqa: E731
    hidden_q, weight_q = near(hidden), near(weight)
    hidden, weight = hidden.to(dtype), weight.to(dtype)
    # Log-ratios stay clear of the clip's corners, where a rounding would switch a gradient off.
    log_ratio = torch.where(torch.arange(tokens, device=device) % 8 == 0, 0.6, 0.05) * normal(tokens).sign()
    batch = fp.Batch(
        target,
        torch.full((SEQUENCES,), tokens // SEQUENCES),
        advantage=normal(SEQUENCES).repeat_interleave(tokens // SEQUENCES),
        old_logp=fp.linear_logprobs(hidden, weight, target) + log_ratio,
        return_=normal(tokens),
        label=torch.arange(SEQUENCES, device=device) % 2 == 0,
        kl=torch.tensor(0.5, device=device),
    )
    sampled = torch.cat([target[: WEIGHT_ROWS // 4], others[: WEIGHT_ROWS - WEIGHT_ROWS // 4]]).unique()
    return Inputs(hidden.requires_grad_(), weight, hidden_q, weight_q, batch, sampled)
