"""The same inputs give the same bits, run after run: statistics, loss and gradients, in every schedule and backend."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

import fastpost as fp
from fastpost import losses
from fastpost.types import OUTPUTS
from problems import DTYPES, Problem, gradients, problem, schedules_of, small_tiles

EVERY = tuple(OUTPUTS)
T = 61
CALLS = [
    ("statistics", ()),
    ("frozen", ()),
    ("eager", ()),
    ("lazy", ()),
    ("statistics", (3,)),
    ("eager", (3,)),
    ("lazy", (3,)),
]


def setting(dtype: torch.dtype, device: torch.device, *, ranks: tuple[int, ...], trained: bool) -> Problem:
    p = problem(dtype, device, T=T, D=40, V=1003, bias=True, softcap=20.0, temperature=0.8, ranks=ranks)
    q = problem(dtype, device, T=T, D=24, V=1003)
    return replace(p, reference=(q.hidden, q.head)).to(dtype, train_head=trained)


def run(schedule: str, p: Problem) -> list[Tensor]:
    """The numbers that come out, gradients included."""
    batch = fp.Batch(p.target, torch.tensor([T]), advantage=torch.ones(T, device=p.target.device))
    outputs = tuple(name for name in EVERY if name != "top1")
    if schedule == "statistics":
        with torch.no_grad():
            stats = fp.token_stats(p.hidden, p.head, p.target, outputs=EVERY, **p.options)
        return list(vars(stats).values())
    if schedule == "lazy":
        stats = fp.token_stats(p.hidden, p.head, p.target, outputs=outputs, **p.options)
        total = torch.stack([getattr(stats, OUTPUTS[name]).sum() for name in outputs]).sum()
    else:
        loss = losses.grpo if schedule == "frozen" else losses.gkd
        total, stats = fp.fused_loss(loss, p.hidden, p.head, batch, outputs=EVERY, return_stats=True, **p.options)
    if p.hidden.dtype == torch.float16 and schedule == "eager":
        schedule = "lazy"  # its loss scale comes with the gradient from above
    name = {"frozen": "FrozenLogp", "eager": "EagerLoss", "lazy": "LazyStats"}[schedule]
    assert schedules_of(total) == {name}
    found = gradients(total, torch.ones((), device=total.device), p)
    return [total.detach(), *found.values(), *(x.detach() for x in vars(stats).values() if x is not None)]


@pytest.mark.parametrize("tiles", ["one tile", "many tiles"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("schedule", "ranks"), CALLS)
def test_two_runs_give_the_same_bits(schedule, ranks, dtype, tiles, device, monkeypatch):
    if tiles == "many tiles":
        small_tiles(monkeypatch, columns=64, rows=T if schedule == "eager" else 16)
    p = setting(dtype, device, ranks=ranks, trained=schedule not in ("statistics", "frozen"))
    once, again = run(schedule, p), run(schedule, p)
    assert len(once) == len(again) > 4
    assert [i for i, (a, b) in enumerate(zip(once, again, strict=True)) if not torch.equal(a, b)] == []
