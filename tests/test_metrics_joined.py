"""Metrics of several microbatches and processes are those of the whole; and what no metric can be made of."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import fields, replace

import pytest
import torch
from torch import Tensor

from fastpost import metrics
from fastpost.advantages import rollout_correction
from fastpost.types import Batch, Stats
from test_metrics import LENGTHS, batch_of, got, near, stats_of

FAMILIES: dict[str, Callable[[Stats, Batch], dict[str, metrics.Part]]] = {
    "num_tokens": lambda stats, batch: metrics.num_tokens(batch),
    "sft": metrics.sft,
    "preference": metrics.preference,
    "displacement": metrics.displacement,
    "kto": metrics.kto,
    "reward": lambda stats, batch: metrics.reward(batch.per_sequence(batch.return_)),
    "steps": lambda stats, batch: metrics.steps(stats.logp, batch.return_),
    "policy": metrics.policy,
    "GSPO": lambda stats, batch: metrics.policy(stats, batch, importance_sampling_level="sequence"),
    "clip_extremes": metrics.clip_extremes,
    "kl_budget": metrics.kl_budget,
    "entropy_collapse": metrics.entropy_collapse,
    "sampler_difference": lambda stats, batch: metrics.sampler_difference(batch),
    "importance_ratio": lambda stats, batch: metrics.importance_ratio(
        batch, rollout_correction(batch.old_logp, batch.rollout_logp, batch)
    ),
    "completions": lambda stats, batch: metrics.completions(batch.lengths, batch.lengths % 2 == 0),
    "length": lambda stats, batch: metrics.length_correlation(batch.per_sequence(batch.return_), batch.lengths),
    "ppo_rollout": lambda stats, batch: metrics.ppo_rollout(
        batch.per_sequence(batch.return_), batch, batch.lengths % 2 == 0
    ),
    "ppo_update": lambda stats, batch: metrics.ppo_update(stats, batch, batch.old_value - 0.1 * batch.advantage),
}
every = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES.keys())


def cut(stats: Stats, batch: Batch, first: int, last: int) -> tuple[Stats, Batch]:
    start, stop = sum(LENGTHS[:first]), sum(LENGTHS[:last])
    part = batch.slice(first, last, start, stop)
    given = {f.name: getattr(stats, f.name) for f in fields(Stats) if getattr(stats, f.name) is not None}
    return Stats(**{name: value[start:stop] for name, value in given.items()}), part


@every
@pytest.mark.parametrize("bounds", [(0, 2, 8), (0, 4, 6, 8), (0, 6, 8)])
def test_microbatches_give_the_metrics_of_the_whole(family, bounds: tuple[int, ...]):
    """One of the cuts has a microbatch in which nothing is kept."""
    batch = batch_of()
    stats = stats_of(batch)
    parts = [family(*cut(stats, batch, a, b)) for a, b in itertools.pairwise(bounds)]
    assert got(metrics.joined(*parts)) == near(got(family(stats, batch)))


@every
def test_processes_give_the_metrics_of_the_whole(family, monkeypatch: pytest.MonkeyPatch):
    """all_reduce is played by the other process's parts, in the order in which ours are sent."""
    batch = batch_of()
    stats = stats_of(batch)
    ours, theirs = (family(*cut(stats, batch, *ends)) for ends in ((0, 4), (4, 8)))
    joins = {"SUM": ("sum", torch.add), "MIN": ("min", torch.minimum), "MAX": ("max", torch.maximum)}

    def all_reduce(flat: Tensor, operation: torch.distributed.ReduceOp) -> None:
        join, combine = joins[str(operation).rpartition(".")[2]]
        sent = [theirs[name].numbers for name in sorted(theirs) if theirs[name].join == join]
        flat.copy_(combine(flat, torch.cat(sent)))

    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    together = metrics.over_ranks(ours)
    assert list(together) == list(ours)
    assert got(together) == near(got(family(stats, batch)))


@every
def test_the_order_of_pairs_does_not_matter(family):
    batch = batch_of()
    stats = stats_of(batch)
    forwards = metrics.joined(*(family(*cut(stats, batch, a, a + 2)) for a in (0, 2, 4, 6)))
    backwards = metrics.joined(*(family(*cut(stats, batch, a, a + 2)) for a in (6, 4, 2, 0)))
    assert got(forwards) == near(got(backwards))


def test_floats_are_the_values_and_one_process_is_itself():
    batch = batch_of()
    seen = metrics.policy(stats_of(batch), batch)
    assert metrics.floats(seen) == got(seen) and metrics.over_ranks(seen) is seen
    assert metrics.floats({}) == {}


def test_what_is_nowhere_counted_is_nan():
    batch = Batch(torch.full((4,), -100), torch.tensor([2, 2]), ref_logp=torch.zeros(4), advantage=torch.zeros(4))
    stats = Stats(logp=torch.zeros(4), entropy=torch.zeros(4), top1=torch.ones(4, dtype=torch.bool))
    for family in (metrics.sft, metrics.preference, metrics.policy, metrics.clip_extremes, metrics.kl_budget):
        assert all(math.isnan(value) for value in got(family(stats, batch)).values())


def test_a_variance_keeps_its_digits():
    """Ratios of a policy near the one that sampled: the squares agree to six digits."""
    x = 1 + 1e-3 * torch.randn(10_000, dtype=torch.float64)
    halves = metrics.joined({"v": metrics.variance(x[:10])}, {"v": metrics.variance(x[10:])})
    rounded = torch.finfo(torch.float64).eps / 1e-6  # an ulp of a square, of which the variance is a millionth
    assert got(halves)["v"] == pytest.approx(float(x.var()), rel=rounded)


B, THREE = batch_of(), torch.zeros(3)
STATS = Stats(logp=torch.zeros(sum(LENGTHS)))
BAD = [
    (lambda: metrics.reward(THREE), r"scores must be \(S,\), chosen and rejected in turns, got \(3,\)"),
    (
        lambda: metrics.displacement(STATS, replace(B, ref_logp=None)),
        "displacement needs batch.ref_logp, which is None",
    ),
    (lambda: metrics.kto(STATS, replace(B, label=None)), "kto needs batch.label, which is None"),
    (lambda: metrics.policy(STATS, replace(B, advantage=None)), "needs batch.advantage, which is None"),
    (
        lambda: metrics.policy(STATS, B, importance_sampling_level="sequences"),  # type: ignore[arg-type]
        r"importance_sampling_level must be 'token' or 'sequence', got 'sequences' \(did you mean 'sequence'",
    ),
    (lambda: metrics.kl_budget(STATS, replace(B, ref_logp=None)), "needs batch.ref_logp, which is None"),
    (
        lambda: metrics.sampler_difference(replace(B, rollout_logp=None)),
        "sampler_difference needs batch.rollout_logp, which is None",
    ),
    (lambda: metrics.importance_ratio(B, THREE), r"weight must have shape \(31,\), got \(3,\)"),
    (lambda: metrics.completions(THREE, THREE), "finished must be bool.*got torch.float32"),
    (lambda: metrics.length_correlation(THREE, torch.zeros(2)), r"must have one shape, got \(3,\) and \(2,\)"),
    (lambda: metrics.ppo_update(STATS, replace(B, return_=None), STATS.logp), "ppo_update needs batch.return_"),
    (
        lambda: metrics.ppo_rollout(torch.zeros(8), replace(B, ref_logp=None), B.label),
        "ppo_rollout needs batch.ref_logp",
    ),
    (
        lambda: metrics.joined({"x": metrics.mean(THREE)}, {"x": metrics.smallest(THREE)}),
        "the metric 'x' is of two kinds: sum and min",
    ),
]


@pytest.mark.parametrize(("call", "message"), BAD)
def test_bad_input(call, message: str):
    with pytest.raises(ValueError, match=message):
        call()
