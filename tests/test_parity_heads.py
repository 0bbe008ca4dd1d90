"""Losses of a scalar head: the reward model's against TRL's trainer, the others against the papers in float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

import fastpost as fp
from fastpost import losses
from parity import by_trl as trl
from parity.settings import Case, case, named

SCORES = torch.tensor([1.5, -0.3, 0.2, 0.9, -2.0, -2.5, 30.0, -30.0], dtype=torch.float64)
MARGIN = torch.tensor([0.0, 1.0, 0.3, 2.0], dtype=torch.float64)


def valued() -> Case:
    """Of old values, returns, and step labels: 1 in the middle and 0 at the end of each completion."""
    c = case()
    T = len(c.batch.target)
    draw = lambda: torch.randn(T, dtype=torch.float64)  # noqa: E731
    fields = {name: getattr(c.batch, name) for name in ("target", "lengths")}
    return Case(c.stats, fp.Batch(**fields, old_value=draw(), return_=draw()), c.completions)


def value_by_paper(values: Tensor, c: Case, *, cliprange_value: float | None = 0.2) -> Tensor:  # (T,)
    """PPO's value loss, clipped as in its authors' code: half of max((v - R)^2, (clip(v) - R)^2)."""
    out = torch.zeros_like(values)
    for t in (c.batch.target != -100).nonzero()[:, 0]:
        v, old, goal = values[t], c.batch.old_value[t], c.batch.return_[t]
        error = (v - goal) ** 2
        if cliprange_value is not None:
            error = max(error, (torch.clip(v, old - cliprange_value, old + cliprange_value) - goal) ** 2)
        out[t] = error / 2
    return out


@dataclass(frozen=True)
class Line:
    loss: str
    knobs: dict[str, object]
    peer: Callable[..., Tensor]


LINES = [Line("value", {"cliprange_value": c}, value_by_paper) for c in (0.05, 0.2, 3.0, None)] + [
    Line("bradley_terry", {"center_rewards_coefficient": c}, trl.reward) for c in (0.0, 0.01, 1.0)
]


@pytest.mark.parametrize("line", [line for line in LINES if line.loss == "value"], ids=lambda line: str(line.knobs))
def test_value(line):
    c = valued()
    values = (c.batch.old_value + 0.3 * torch.randn_like(c.batch.old_value)).requires_grad_()
    got, want = named("value")(values, c.batch, **line.knobs), line.peer(values, c, **line.knobs)
    torch.testing.assert_close(got, want)
    upstream = torch.randn_like(want)
    torch.testing.assert_close(torch.autograd.grad(got, values, upstream), torch.autograd.grad(want, values, upstream))


@pytest.mark.parametrize("margin", [None, MARGIN], ids=["", "margin"])
@pytest.mark.parametrize("line", [line for line in LINES if line.loss != "value"], ids=lambda line: str(line.knobs))
def test_bradley_terry(line, margin):
    scores = SCORES.clone().requires_grad_()
    batch = fp.Batch(torch.ones(8, dtype=torch.int64), torch.ones(8, dtype=torch.int64), margin=margin)
    got = named("bradley_terry")(scores, batch, **line.knobs).mean()
    want = line.peer(scores, margin, **line.knobs)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(torch.autograd.grad(got, scores), torch.autograd.grad(want, scores))


@pytest.mark.parametrize("classes", [None, 2, 3])
def test_prm(classes):
    """arXiv:2305.20050, appendix F: at a step's last token the probability of the step's label; nothing elsewhere."""
    c = case()
    target = torch.where(c.batch.target == -100, -100, torch.arange(len(c.batch.target)) % (classes or 2))
    scores = torch.randn(len(target), *([classes] if classes else []), dtype=torch.float64, requires_grad=True)
    got = named("prm")(scores, fp.Batch(target, c.batch.lengths))
    want = torch.zeros(len(target), dtype=torch.float64)
    for t in (target != -100).nonzero()[:, 0]:
        right = torch.exp(scores[t]) / torch.exp(scores[t]).sum() if classes else 1 / (1 + torch.exp(-scores[t]))
        p = right[target[t]] if classes else (right if target[t] == 1 else 1 - right)
        want[t] = -torch.log(p)
    torch.testing.assert_close(got, want)
    upstream = torch.randn_like(want)
    torch.testing.assert_close(torch.autograd.grad(got, scores, upstream), torch.autograd.grad(want, scores, upstream))


def test_two_classes_are_one_score():
    """The difference of their logits, which is what a head of one output learns."""
    target = torch.tensor([1, 0, -100, 1])
    scores = torch.randn(4, 2, dtype=torch.float64)
    batch = fp.Batch(target, torch.tensor([4]))
    torch.testing.assert_close(losses.prm(scores, batch), losses.prm(scores[:, 1] - scores[:, 0], batch))


def test_explained_variance():
    c = valued()
    values, kept = torch.randn(len(c.batch.target), dtype=torch.float64), (c.batch.target != -100).numpy()
    returns = c.batch.return_.numpy()[kept]
    want = 1 - np.var(returns - values.numpy()[kept]) / np.var(returns)
    torch.testing.assert_close(losses.explained_variance(values, c.batch).item(), want)


@pytest.mark.parametrize(("shift", "want"), [(0.0, 1.0), (5.0, 1.0)])
def test_a_critic_that_is_right_up_to_a_constant_explains_all(shift, want):
    c = valued()
    assert losses.explained_variance(c.batch.return_ + shift, c.batch).item() == pytest.approx(want)
