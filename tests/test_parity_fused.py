"""Liger's fused losses as wholes, from hidden states and a head to their gradients, against `fused_loss`.

Theirs are of rectangles, the chosen half before the rejected one, each row already shifted.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from torch import Tensor

import fastpost as fp
from parity.settings import named

S, N, D, V = 6, 5, 8, 40  # sequences, tokens of each, and the head's sizes
PAIRED = [0, 3, 1, 4, 2, 5]  # the rows of theirs in the order of ours
LABEL = torch.tensor([True, False, True, True, False, False])
ADVANTAGE = torch.tensor([1.0, -0.5, 0.25, -2.0, 0.0, 1.5])
KL = torch.tensor(0.2)


@dataclass(frozen=True)
class Problem:
    """As Liger takes it, with a reference of another width."""

    hidden: Tensor  # (S, N, D)
    weight: Tensor  # (V, D)
    bias: Tensor  # (V,)
    reference: tuple[Tensor, Tensor, Tensor]  # (S, N, D'), (V, D'), (V,)
    target: Tensor  # (S, N)
    ref_logp: Tensor  # (S, N)
    old_logp: Tensor  # (S, N)


def problem() -> Problem:
    hidden, weight, bias = torch.randn(S, N, D), torch.randn(V, D) / 2, torch.randn(V)
    reference = torch.randn(S, N, D + 1), torch.randn(V, D + 1) / 2, torch.randn(V)
    target = torch.randint(0, V, (S, N))
    score = lambda x, w, b: (x @ w.T + b).log_softmax(-1).gather(-1, target[..., None])[..., 0]  # noqa: E731
    old = score(hidden, weight, bias) + 0.3 * torch.randn(S, N)
    leaves = hidden.requires_grad_(), weight.requires_grad_(), bias.requires_grad_()
    return Problem(*leaves, reference, target, score(*reference), old)


def chunked_loss(name: str, **options: object):
    module = pytest.importorskip("liger_kernel.chunked_loss")
    return getattr(module, f"LigerFusedLinear{name}Loss")(compiled=False, **options)


def of_pairs(name: str, p: Problem, *, referenced: bool = False, **options: object) -> Tensor:
    whole = chunked_loss(name, **options)
    return whole(p.weight, p.hidden, p.target, p.bias, *(p.reference if referenced else ()))[0]


def kto(p: Problem, **options: object) -> Tensor:
    whole = chunked_loss("KTO", use_ref_model=True, **options)
    return whole(p.hidden, p.weight, p.target, p.bias, LABEL, *p.reference, kl=KL)[0]


def grpo(loss_type: str, p: Problem, **options: object) -> Tensor:
    whole = chunked_loss("GRPO", loss_type=loss_type, **options)
    ones = torch.ones(S, N)
    return whole(p.hidden, p.weight, p.target, ones, ADVANTAGE, p.bias, p.ref_logp, p.old_logp)[0]


@dataclass(frozen=True)
class Line:
    loss: str
    knobs: dict[str, object]
    peer: Callable[..., Tensor]
    theirs: dict[str, object]

    def __str__(self) -> str:
        return "-".join([self.loss, *(f"{k}={v}" for k, v in self.knobs.items())])


SMOOTHED = {"beta": 0.3, "label_smoothing": 0.1}
OF_SEQUENCES = {"beta": 0.0, "epsilon_low": 0.1, "epsilon_high": 0.1, "importance_sampling_level": "sequence"}
dpo = partial(of_pairs, "DPO", referenced=True)
LINES = [
    Line("dpo", {"beta": 0.3}, dpo, {"beta": 0.3}),
    Line("robust", SMOOTHED, dpo, SMOOTHED | {"loss_type": "robust"}),
    Line("exo", SMOOTHED, dpo, SMOOTHED | {"loss_type": "exo_pair"}),
    Line("discopop", {"beta": 0.3}, dpo, {"beta": 0.3, "loss_type": "discopop"}),
    Line("dpo", {"rpo_alpha": 0.5}, dpo, {"compute_nll_loss": True, "alpha": 0.5}),
    Line("cpo", {"beta": 0.3, "cpo_alpha": 0.5}, partial(of_pairs, "CPO"), {"beta": 0.3, "alpha": 0.5}),
    Line("simpo", {"beta": 1.5}, partial(of_pairs, "SimPO"), {"beta": 1.5, "gamma": 1.0, "compute_nll_loss": False}),
    Line("orpo", {"beta": 0.3}, partial(of_pairs, "ORPO"), {"beta": 0.3}),
    Line("kto", {"beta": 0.3}, kto, {"beta": 0.3}),
    *(Line(name, {"beta": 0.1}, partial(grpo, name), {"beta": 0.1}) for name in ("grpo", "bnpo", "sapo")),
    Line("gspo", {"epsilon": 0.1}, partial(grpo, "grpo"), OF_SEQUENCES),
]


def fused(line: Line, p: Problem) -> Tensor:
    order = torch.tensor(PAIRED) if named(line.loss).unit == "pair" else torch.arange(S)
    flat = lambda x: x[order].flatten()  # noqa: E731
    batch = fp.Batch(
        flat(p.target),
        torch.full((S,), N),
        ref_logp=flat(p.ref_logp),
        old_logp=flat(p.old_logp),
        advantage=ADVANTAGE,
        label=LABEL,
        kl=KL,
    )
    head = fp.Head(p.weight, p.bias)
    return fp.fused_loss(named(line.loss), p.hidden[order].flatten(0, 1), head, batch, **line.knobs)


@pytest.mark.parametrize("line", LINES, ids=str)
def test_same_loss_and_gradients(line):
    p = problem()
    got, want = fused(line, p), line.peer(p, **line.theirs)
    torch.testing.assert_close(got, want)
    leaves = p.hidden, p.weight, p.bias
    for ours, theirs in zip(torch.autograd.grad(got, leaves), torch.autograd.grad(want, leaves), strict=True):
        torch.testing.assert_close(ours, theirs)
