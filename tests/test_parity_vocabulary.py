"""Losses of facts about the whole vocabulary, against peers on materialised logits: SFT and distillation, through
`fused_loss`, gradients in the hidden states and in the head."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastpost as fp
from parity import by_trl as trl
from parity.settings import Row, check, mean_of_tokens, named

T, D, V = 17, 12, 50
LENGTHS = torch.tensor([9, 8])


@dataclass(frozen=True)
class Problem:
    """A student's and a wider teacher's hidden states and heads. Three positions predict nothing."""

    hidden: Tensor  # (T, D)
    weight: Tensor  # (V, D)
    teacher_hidden: Tensor  # (T, 2 D)
    teacher_weight: Tensor  # (V, 2 D)
    target: Tensor  # (T,)

    @property
    def logits(self) -> Tensor:  # (N, V)
        return (self.hidden @ self.weight.T)[self.kept]

    @property
    def teacher_logits(self) -> Tensor:  # (N, V)
        return (self.teacher_hidden @ self.teacher_weight.T)[self.kept]

    @property
    def kept(self) -> Tensor:  # (T,) bool
        return self.target != -100

    @property
    def labels(self) -> Tensor:  # (N,)
        return self.target[self.kept]


def problem(dtype: torch.dtype = torch.float64) -> Problem:
    torch.manual_seed(0)
    target = torch.randint(0, V, (T,)).index_fill(0, torch.tensor([0, 8, 16]), -100)
    draw = lambda *shape: torch.randn(*shape, dtype=dtype)  # noqa: E731
    return Problem(
        draw(T, D).requires_grad_(), draw(V, D).requires_grad_(), draw(T, 2 * D), draw(V, 2 * D) / 2**0.5, target
    )


# ---- peers: (Problem, **knobs) -> the mean over kept tokens ----


def torchs_cross_entropy(p: Problem, *, label_smoothing: float = 0.0) -> Tensor:
    return F.cross_entropy(p.logits, p.labels, label_smoothing=label_smoothing)


def transformers_label_smoother(p: Problem, *, label_smoothing: float) -> Tensor:
    smoother = pytest.importorskip("transformers.trainer_pt_utils").LabelSmoother(label_smoothing)
    return smoother({"logits": p.logits[None]}, p.labels[None])


def z_loss_by_paper(p: Problem, *, z_loss: float, label_smoothing: float = 0.0) -> Tensor:
    """arXiv:2204.02311, section 5: + 1e-4 log^2 Z."""
    return torchs_cross_entropy(p, label_smoothing=label_smoothing) + z_loss * (p.logits.exp().sum(1).log() ** 2).mean()


def divergence_by_trl_gkd(p: Problem, *, beta: float, temperature: float = 1.0) -> Tensor:
    made = pytest.importorskip("trl.experimental.gkd.gkd_trainer").GKDTrainer
    return made.generalized_jsd_loss(p.logits, p.teacher_logits, beta=beta, temperature=temperature)


def divergence_by_trl_distillation(p: Problem, *, beta: float, temperature: float = 1.0) -> Tensor:
    module = pytest.importorskip("trl.trainer.distillation_trainer")
    hidden = p.hidden[None], p.teacher_hidden[None], p.weight, p.teacher_weight
    return module._chunked_divergence_loss(*hidden, p.kept[None].long(), beta, temperature=temperature)[0]


def divergence_by_liger(p: Problem, *, beta: float, temperature: float = 1.0) -> Tensor:
    module = pytest.importorskip("liger_kernel.chunked_loss.jsd_loss")
    whole = module.LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0, weight_soft_loss=1.0, beta=beta, temperature=temperature, compiled=False, chunk_size=4
    )
    return whole(p.hidden, p.weight, p.teacher_hidden, p.teacher_weight, p.target)


def kd_by_paper(p: Problem, *, alpha: float = 0.5, temperature: float = 1.0) -> Tensor:
    """arXiv:1503.02531, section 2: the hard term at temperature 1, the soft one at tau, times tau^2."""
    total = torch.zeros((), dtype=p.logits.dtype)
    for student, teacher, label in zip(p.logits, p.teacher_logits, p.labels, strict=True):
        soft, teacher = (torch.softmax(x / temperature, 0) for x in (student, teacher))
        hard = -torch.log(torch.softmax(student, 0)[label])
        total += alpha * hard + (1 - alpha) * temperature**2 * (teacher * torch.log(teacher / soft)).sum()
    return total / len(p.labels)


@dataclass(frozen=True)
class Line:
    """fused_loss of this loss, with these knobs and these arguments of the call, is what that peer gives."""

    loss: str
    knobs: dict[str, object]
    peer: Callable[..., Tensor]
    theirs: dict[str, object] = field(default_factory=dict)
    call: dict[str, object] = field(default_factory=dict)

    def __str__(self) -> str:
        return "-".join([self.loss, *(f"{k}={v}" for k, v in (self.knobs | self.call).items()), self.peer.__name__])


DIVERGENCES = (divergence_by_trl_gkd, divergence_by_trl_distillation, divergence_by_liger)
ONE_SIDED = {"forward_kl": 0.0, "reverse_kl": 1.0}
IN_FP32 = (divergence_by_trl_distillation, divergence_by_liger, transformers_label_smoother)  # whatever comes


def of_divergence(name: str, peer: Callable[..., Tensor], beta: float, call: dict) -> Line:
    theirs = {"beta": beta, "temperature": call.get("temperature", 1.0)}
    return Line(name, {}, peer, theirs, call)


LINES = [
    *(Line("sft", {"label_smoothing": e}, torchs_cross_entropy, {"label_smoothing": e}) for e in (0.0, 0.1, 1.0)),
    *(Line("sft", {"label_smoothing": e}, transformers_label_smoother, {"label_smoothing": e}) for e in (0.1, 1.0)),
    *(Line("sft", {"z_loss": c}, z_loss_by_paper, {"z_loss": c}) for c in (0.0, 1e-4, 0.3)),
    Line("sft", both := {"z_loss": 0.3, "label_smoothing": 0.1}, z_loss_by_paper, both),
    *(
        of_divergence(name, peer, beta, call)
        for name, beta in ONE_SIDED.items()
        for peer in DIVERGENCES
        for call in ({}, {"temperature": 2.0})
    ),
    *(of_divergence("gkd", peer, b, {"jsd_beta": b}) for b in (0.0, 0.1, 0.5, 0.9, 1.0) for peer in DIVERGENCES),
    *(of_divergence("gkd", peer, b, {"jsd_beta": b, "temperature": 0.7}) for b in (0.0, 0.3) for peer in DIVERGENCES),
    *(
        Line("kd", {"alpha": a}, kd_by_paper, {"alpha": a, "temperature": t}, {"temperature": t})
        for a in (0.0, 0.3, 1.0)
        for t in (0.5, 1.0, 4.0)
    ),
]
ROWS = [
    Row("sft", {}, partial(trl.sft, "nll"), weight=mean_of_tokens),
    Row("dft", {}, partial(trl.sft, "dft"), weight=mean_of_tokens),
]


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_same_loss_and_gradients(row):
    check(row)


@pytest.mark.parametrize("line", LINES, ids=str)
def test_same_loss_and_gradients_in_the_hidden_states_and_the_head(line):
    p = problem(torch.float32 if line.peer in IN_FP32 else torch.float64)
    reads_teacher = line.loss not in ("sft", "dft")
    call = line.call | ({"reference": (p.teacher_hidden, fp.Head(p.teacher_weight))} if reads_teacher else {})
    got = fp.fused_loss(named(line.loss), p.hidden, p.weight, fp.Batch(p.target, LENGTHS), **call, **line.knobs)
    want = line.peer(p, **line.theirs)
    torch.testing.assert_close(got, want)
    leaves = p.hidden, p.weight
    ours, theirs = torch.autograd.grad(got, leaves), torch.autograd.grad(want, leaves)
    torch.testing.assert_close(ours, theirs)


def test_logp_and_entropy_are_trls():
    utils = pytest.importorskip("trl.trainer.utils")
    logits, target = torch.randn(1, 12, 40), torch.randint(0, 40, (1, 12))
    stats = fp.token_stats(logits, torch.eye(40), target, outputs=("logp", "entropy"))
    torch.testing.assert_close(stats.logp, utils.selective_log_softmax(logits, target))
    torch.testing.assert_close(stats.entropy, utils.entropy_from_logits(logits))
