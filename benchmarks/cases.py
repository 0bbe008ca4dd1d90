"""What is measured: the inputs, the cases, and the truth that every result is held against.

A case is a loss of per-token statistics, and a head that is trained or not; a run of it is the loss and its gradients.
The truth is plain torch in float64, a block of rows at a time. So are the two yardsticks of the error rule:

  ours    statistics  |ours - truth| <= 2 |fp32 torch - truth| + 1e-5           (worst token; a loss likewise)
          gradients   |ours - truth| <= 2 |torch in the inputs' dtype - truth| + eps32    (relative, Frobenius)
  others  either      |theirs - truth| <= 8 |torch in the inputs' dtype - truth| + 2 eps of that dtype

On CUDA the fp32 yardstick multiplies the same operands on the same tensor cores, with an fp32 result.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

import fastpost as fp

SEQUENCES = 8
LOGITS_STD = 3.0
BLOCK_ELEMENTS = 1 << 24  # of a block of logits; float64 makes it 128 MB
WEIGHT_ROWS = 4096  # of dW that are compared: the first targets, and others at random
OTHERS_ALLOWANCE = 8.0
GRADIENTS = ("dhidden", "dweight")


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


@dataclass(frozen=True)
class Case:
    name: str
    loss: fp.Loss
    trained: bool
    products: int  # the fewest that compute it, each 2 T D V flop

    @property
    def title(self) -> str:
        return f"{self.name}, W {'trained' if self.trained else 'frozen'}"


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
    Case("logp", reinforce, trained=False, products=2),
    Case("logp", reinforce, trained=True, products=3),
    Case("sft", fp.losses.sft, trained=False, products=2),
    Case("sft", fp.losses.sft, trained=True, products=3),
    Case("logp + entropy", entropy_bonus, trained=True, products=3),
    Case("logp + reverse_kl", kl_penalty, trained=True, products=4),
    Case("grpo", fp.losses.grpo, trained=False, products=2),
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
    )
    sampled = torch.cat([target[: WEIGHT_ROWS // 4], others[: WEIGHT_ROWS - WEIGHT_ROWS // 4]]).unique()
    return Inputs(hidden.requires_grad_(), weight, hidden_q, weight_q, batch, sampled)


def statistics(logits: Tensor, target: Tensor, outputs: Sequence[str], logits_q: Tensor | None = None) -> fp.Stats:
    """By their definitions, in plain torch and the dtype of the logits."""
    logp = logits.log_softmax(-1)
    found = {"logp": logp.gather(-1, target[:, None])[:, 0]}
    if "entropy" in outputs:
        found["entropy"] = -(logp.exp() * logp).sum(-1)
    if "reverse_kl" in outputs:
        assert logits_q is not None
        found["reverse_kl"] = (logp.exp() * (logp - logits_q.log_softmax(-1))).sum(-1)
    return fp.Stats(**found)


# ---- truth and errors ----


@dataclass(frozen=True)
class Outcome:
    """One run of a case. A contestant that returns the loss alone has no statistics."""

    stats: fp.Stats
    loss: Tensor  # ()
    dhidden: Tensor  # (T, D)
    dweight: Tensor | None  # (V, D), or the sampled rows of it

    def named(self, sampled: Tensor) -> dict[str, Tensor]:
        found = {f.name: getattr(self.stats, f.name) for f in fields(self.stats)}
        found |= {"loss": self.loss, "dhidden": self.dhidden}
        if self.dweight is not None:
            found["dweight"] = self.dweight if len(self.dweight) == len(sampled) else self.dweight[sampled]
        return {name: value.detach() for name, value in found.items() if value is not None}


def by_rows(case: Case, x: Inputs, operands: torch.dtype, product: torch.dtype) -> Outcome:
    """The case in plain torch: operands of one dtype, their product in another, and fp32 or wider from there on."""
    hidden, weight = x.hidden.detach().to(operands), x.weight.detach().to(operands)
    compared = "reverse_kl" in case.loss.reads
    hidden_q, weight_q = (x.hidden_q.to(operands), x.weight_q.to(operands)) if compared else (hidden, weight)
    T, each, wide = len(hidden), max(1, BLOCK_ELEMENTS // len(weight)), torch.promote_types(product, torch.float32)
    dhidden = torch.empty_like(hidden)
    dweight = torch.zeros(len(x.sampled), hidden.shape[1], dtype=wide, device=hidden.device)
    loss, parts = torch.zeros((), dtype=wide, device=hidden.device), []
    for rows in (slice(a, min(a + each, T)) for a in range(0, T, each)):
        z = _product(hidden[rows], weight, product).requires_grad_()
        z_q = _product(hidden_q[rows], weight_q, product).to(wide) if compared else None
        stats = statistics(z.to(wide), x.batch.target[rows], case.loss.reads, z_q)
        value = case.loss(stats, x.batch.tokens(rows)).sum() / T
        (dz,) = torch.autograd.grad(value, z)
        dhidden[rows] = dz.to(operands) @ weight
        dweight += dz[:, x.sampled].T.to(wide) @ hidden[rows].to(wide)
        loss += value.detach()
        parts.append({name: getattr(stats, name).detach() for name in case.loss.reads})
    stats = fp.Stats(**{name: torch.cat([part[name] for part in parts]) for name in parts[0]})
    return Outcome(stats, loss, dhidden, dweight.to(operands) if case.trained else None)


def _product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:  # (M, K), (N, K) -> (M, N)
    return a @ b.T if a.dtype == dtype else torch.mm(a, b.T, out_dtype=dtype)


def errors(found: Outcome, truth: Outcome, sampled: Tensor) -> dict[str, float]:
    """Worst absolute error of each statistic and of the loss; relative Frobenius error of each gradient."""
    want, result = truth.named(sampled), {}
    for name, value in found.named(sampled).items():
        difference = value.double() - want[name].double()
        if name in GRADIENTS:
            result[name] = float(difference.norm() / want[name].double().norm())
        else:
            result[name] = float(difference.abs().max())
    return result


@dataclass(frozen=True)
class Judge:
    """A case's truth, and how far from it a result may be."""

    truth: Outcome
    ours: dict[str, float]
    others: dict[str, float]

    @staticmethod
    def of(case: Case, x: Inputs) -> Judge:
        dtype, fp32 = x.hidden.dtype, torch.float32
        truth = by_rows(case, x, torch.float64, torch.float64)
        plain = errors(by_rows(case, x, dtype, dtype), truth, x.sampled)
        exact = errors(by_rows(case, x, dtype if x.hidden.is_cuda else fp32, fp32), truth, x.sampled)
        eps, ours, others = torch.finfo(dtype).eps, {}, {}
        for name, value in truth.named(x.sampled).items():
            gradient = name in GRADIENTS
            ours[name] = 2 * plain[name] + torch.finfo(fp32).eps if gradient else 2 * exact[name] + 1e-5
            others[name] = OTHERS_ALLOWANCE * plain[name] + 2 * eps * (1.0 if gradient else float(value.abs().max()))
        return Judge(truth, ours, others)

    def verdict(self, found: Outcome, sampled: Tensor, ours: bool) -> tuple[dict[str, float], list[str]]:
        """The errors, and a line for each that is past its bound. A NaN is."""
        measured, allowed = errors(found, self.truth, sampled), self.ours if ours else self.others
        return measured, [f"{n} {e:.1e} > {allowed[n]:.1e}" for n, e in measured.items() if not e <= allowed[n]]
