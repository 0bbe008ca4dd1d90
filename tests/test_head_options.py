"""Every option of a head, in every schedule, under every statistic: one table, against float64.

The loss of a case differentiates one statistic and weighs its tokens at random, so a slope that is missing anywhere
between the product and the statistic shows in the gradient of hidden states, weight, bias or adapters.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

import fastpost as fp
from fastpost.types import OUTPUTS
from problems import (
    DIVERGENCES,
    OWN,
    Problem,
    assert_loss_exact,
    gradients,
    leaf,
    plain_loss,
    problem,
    schedules_of,
    sensitivity,
    small_tiles,
    statistics_slack,
)
from rules import STATISTIC_SLACK, assert_close_to_truth, assert_gradient_close_to_truth

LENGTHS = torch.tensor([9, 20, 3, 32])
T = int(LENGTHS.sum())  # rows, enough that torch's error, the yardstick, is no stroke of luck
TEMPERATURES = torch.tensor([0.5, 0.75, 1.0, 2.0]).repeat(T // 4)
OPTIONS = {
    "bias": {"bias": True},
    "softcap": {"softcap": 5.0},
    "scale": {"scale": 0.25},
    "a temperature each": {"temperature": TEMPERATURES},
    "lora": {"ranks": (3,)},
    "all of them": {"bias": True, "softcap": 5.0, "scale": 0.5, "temperature": TEMPERATURES, "ranks": (3, 2)},
}
EVERY = (*OWN, *DIVERGENCES)


def option_problem(name: str, dtype: torch.dtype, *, train_head: bool = True) -> Problem:
    """Its reference has the same options, on a head of another width."""
    options = OPTIONS[name]
    p = problem(dtype, T=T, **options)
    q = problem(dtype, T=T, D=9, **{key: x for key, x in options.items() if key != "temperature"})
    return replace(p, reference=(q.hidden, q.head)).to(dtype, train_head=train_head)


def on_one(name: str) -> fp.Loss:
    """A loss of sequences that is linear in one statistic."""

    @fp.loss(unit="sequence", reads=(name,))
    def linear(stats: fp.Stats, batch: fp.Batch) -> Tensor:
        return batch.per_sequence(batch.old_value * getattr(stats, OUTPUTS[name]))

    return linear


def packed(p: Problem) -> fp.Batch:
    target = p.target.index_fill(0, torch.tensor([0, 8, 9, 30]), -100)
    return fp.Batch(target, LENGTHS, old_value=torch.randn(T), weight=torch.rand(4) + 0.5)


def fused(p: Problem, batch: fp.Batch, name: str) -> Tensor:
    given = {"reference": p.reference} if name in DIVERGENCES else {}
    return fp.fused_loss(on_one(name), p.hidden, p.head, batch, temperature=p.temperature, **given)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("schedule", ["EagerLoss", "LazyStats"])
@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("option", OPTIONS)
def test_each_option_is_exact_under_each_statistic(option, name, schedule, dtype, monkeypatch):
    small_tiles(monkeypatch, rows=5 if schedule == "LazyStats" else 40)
    p = option_problem(option, dtype)
    batch = packed(p)
    total = fused(p, batch, name)
    assert schedules_of(total) == {schedule}
    assert_loss_exact(total, on_one(name), p, batch, name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("option", OPTIONS)
def test_each_option_is_exact_where_the_head_is_frozen(option, dtype, monkeypatch):
    """One pass sums dlogp/dhidden, and dlogp/dlow of an adapter of which A alone trains."""
    small_tiles(monkeypatch, rows=40)
    p = option_problem(option, dtype, train_head=False)
    for each in p.head.lora:
        each.b.requires_grad_(False)
    batch = packed(p)
    total = fused(p, batch, "logp")
    assert schedules_of(total) == {"FrozenLogp"}
    assert_loss_exact(total, on_one("logp"), p, batch, "logp")


def rounded(p: Problem, dtype: torch.dtype) -> Problem:
    """Its operands as F.linear rounds them under autocast, in float64; a bias is added to fp32 logits as it is."""
    assert isinstance(p.reference, tuple)
    truth = p.to(dtype).to(torch.float64)
    hidden_q, head_q = truth.reference
    if p.head.bias is None:
        return truth
    exact = [leaf(head.bias, torch.float64, head is p.head) for head in (p.head, p.reference[1])]
    return replace(truth, head=replace(truth.head, bias=exact[0]), reference=(hidden_q, replace(head_q, bias=exact[1])))


@pytest.mark.parametrize(
    ("dtype", "schedule"),  # fp16 is never eager: its loss scale comes with the gradient from above
    [(torch.bfloat16, "EagerLoss"), (torch.bfloat16, "LazyStats"), (torch.float16, "LazyStats")],
    ids=str,
)
@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("option", OPTIONS)
def test_each_option_is_exact_under_autocast(option, name, schedule, dtype, monkeypatch):
    """The truth is float64 on rounded operands; the yardstick of a gradient, torch under autocast."""
    small_tiles(monkeypatch, rows=5 if schedule == "LazyStats" else 40)
    p = option_problem(option, torch.float32)
    batch, truth, same, one = packed(p), rounded(p, dtype), p.to(torch.float32), torch.ones(())
    with torch.autocast("cpu", dtype):
        total, yardstick = fused(p, batch, name), plain_loss(on_one(name), same, batch)
    assert schedules_of(total) == {schedule}
    fp32 = truth.to(torch.float32)
    want, single = plain_loss(on_one(name), truth, batch), plain_loss(on_one(name), fp32, batch)
    slack = statistics_slack(truth, fp32, [name]) * sensitivity(on_one(name), truth, batch)
    assert_close_to_truth(total, single, want, name, STATISTIC_SLACK + slack)
    got, truths, yardsticks = gradients(total, one, p), gradients(want, one, truth), gradients(yardstick, one, same)
    for each, gradient in got.items():
        assert gradient.dtype == torch.float32
        assert_gradient_close_to_truth(gradient, yardsticks[each], truths[each], f"d{name}/d{each}")
