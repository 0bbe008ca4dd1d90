"""What every result is held against: plain torch in float64, a block of rows at a time.

The yardsticks of the error rule are the same code in other dtypes:

  ours    statistics  |ours - truth| <= 2 |fp32 torch - truth| + 1e-5           (worst token; a loss likewise)
          gradients   |ours - truth| <= 2 |torch in the inputs' dtype - truth| + eps32    (relative, Frobenius)
  others  either      |theirs - truth| <= 8 |torch in the inputs' dtype - truth| + 2 eps of that dtype

On CUDA the fp32 yardstick multiplies the same operands on the same tensor cores, with an fp32 result.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace

import torch
from cases import JSD_BETA, Case, Inputs
from torch import Tensor

import fastpost as fp

BLOCK_ELEMENTS = 1 << 24  # of a block of logits; float64 makes it 128 MB
OTHERS_ALLOWANCE = 8.0
GRADIENTS = ("dhidden", "dweight")


def statistics(logits: Tensor, target: Tensor, outputs: Sequence[str], logits_q: Tensor | None = None) -> fp.Stats:
    """By their definitions, in plain torch and the dtype of the logits."""
    logp, found = logits.log_softmax(-1), {}
    if "logp" in outputs:
        found["logp"] = logp.gather(-1, target[:, None])[:, 0]
    if "entropy" in outputs:
        found["entropy"] = -(logp.exp() * logp).sum(-1)
    if logits_q is not None:
        found |= _divergences(logp, logits_q.log_softmax(-1), outputs)
    return fp.Stats(**found)


def _divergences(logp: Tensor, logq: Tensor, outputs: Sequence[str]) -> dict[str, Tensor]:
    kl = lambda a, b: (a.exp() * (a - b)).sum(-1)  # noqa: E731
    found = {}
    if "reverse_kl" in outputs:
        found["reverse_kl"] = kl(logp, logq)
    if "forward_kl" in outputs:
        found["forward_kl"] = kl(logq, logp)
    if "jsd" in outputs:
        mixture = torch.logaddexp(logq + math.log(JSD_BETA), logp + math.log(1 - JSD_BETA))
        found["jsd"] = JSD_BETA * kl(logq, mixture) + (1 - JSD_BETA) * kl(logp, mixture)
    return found


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


@dataclass(frozen=True)
class Blocks:
    """A case's logits in plain torch, some rows at a time: operands of one dtype, their product in another."""

    case: Case
    target: Tensor  # (T,)
    operands: tuple[Tensor, Tensor]  # hidden (T, D) and weight (V, D)
    reference: tuple[Tensor, Tensor] | None
    product: torch.dtype

    @staticmethod
    def of(case: Case, x: Inputs, operands: torch.dtype, product: torch.dtype) -> Blocks:
        cast = lambda *both: tuple(t.detach().to(operands) for t in both)  # noqa: E731
        reference = cast(x.hidden_q, x.weight_q) if case.compares or case.scores_reference else None
        return Blocks(case, x.batch.target, cast(x.hidden, x.weight), reference, product)

    @property
    def wide(self) -> torch.dtype:
        return torch.promote_types(self.product, torch.float32)

    def __iter__(self) -> Iterator[tuple[slice, Tensor, fp.Stats, Tensor | None]]:
        """Rows; their logits, a leaf; the statistics of these; the reference's logp where the case scores it."""
        T, each = len(self.target), max(1, BLOCK_ELEMENTS // len(self.operands[1]))
        for rows in (slice(a, min(a + each, T)) for a in range(0, T, each)):
            target, z = self.target[rows], self._logits(*self.operands, rows).requires_grad_()
            z_q = None if self.reference is None else self._logits(*self.reference, rows).to(self.wide)
            scored = statistics(z_q, target, ("logp",)).logp if z_q is not None and self.case.scores_reference else None
            yield rows, z, statistics(z.to(self.wide), target, self.case.loss.reads, z_q), scored

    def _logits(self, hidden: Tensor, weight: Tensor, rows: slice) -> Tensor:
        a, b = hidden[rows], weight.T
        return a @ b if a.dtype == self.product else torch.mm(a, b, out_dtype=self.product)


def by_rows(case: Case, x: Inputs, operands: torch.dtype, product: torch.dtype) -> Outcome:
    """The case in plain torch, whatever its unit: the statistics of all rows, the loss of these, then each row back."""
    blocks, names = Blocks.of(case, x, operands, product), case.loss.reads
    found = [([getattr(stats, name).detach() for name in names], scored) for _, _, stats, scored in blocks]
    leaves = [torch.cat(parts).requires_grad_() for parts in zip(*(values for values, _ in found), strict=True)]
    stats = fp.Stats(**dict(zip(names, leaves, strict=True)))
    scored = [ref_logp for _, ref_logp in found if ref_logp is not None]
    loss = case.value(stats, replace(x.batch, ref_logp=torch.cat(scored)) if scored else x.batch)
    upstream = torch.autograd.grad(loss, leaves)

    hidden, weight = blocks.operands
    dhidden = torch.empty_like(hidden)
    dweight = torch.zeros(len(x.sampled), hidden.shape[1], dtype=blocks.wide, device=hidden.device)
    for rows, z, block, _ in blocks:
        (dz,) = torch.autograd.grad([getattr(block, name) for name in names], z, [u[rows] for u in upstream])
        dhidden[rows] = dz.to(hidden.dtype) @ weight
        dweight += dz[:, x.sampled].T.to(blocks.wide) @ hidden[rows].to(blocks.wide)
    return Outcome(stats, loss.detach(), dhidden, dweight.to(hidden.dtype) if case.trained else None)


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
