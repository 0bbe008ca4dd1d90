"""Rows whose coefficient is known to be zero: they add exactly nothing, cost no product, and still count."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

import catalogue
import fastpost as fp
from fastpost import losses, weights
from fastpost import reference as plain
from fastpost.losses import policy
from loss_problems import CASES, T, both, fused, packed, positions, setting
from problems import Problem, adapter, assert_loss_exact, gradients, graph_capture, schedules_of, small_tiles, stat

ADDED = (*catalogue.PENALTY, "kl_estimator")  # what moves a token of advantage 0
POLICY = {
    case: (loss, {name: knob for name, knob in knobs.items() if name not in ADDED})
    for case, (loss, knobs) in CASES.items()
    if loss in vars(policy).values()
}
LEVEL = torch.tensor([2, 5])  # sequences of groups without variance
SCHEDULES = ("FrozenLogp", "EagerLoss", "LazyStats")
FIELDS = ("old_logp", "ref_logp")


def level(batch: fp.Batch) -> Tensor:  # (T,) bool
    return torch.isin(batch.sequence, LEVEL)


def levelled(batch: fp.Batch) -> fp.Batch:
    return replace(batch, advantage=batch.advantage.masked_fill(level(batch), 0.0))


def with_idle(loss: fp.Loss, **options) -> tuple[Problem, fp.Batch]:
    p, batch = setting(loss, **options)
    return p, levelled(batch)


def rows_of(schedule: str) -> int:
    """So few that no sequence fits in a chunk, or so many that each does."""
    return 8 if schedule == "LazyStats" else 60


# ---- what is declared is true ----


def test_every_policy_loss_says_where_it_is_idle():
    assert {loss for loss, _ in POLICY.values()} == {x for x in vars(policy).values() if isinstance(x, fp.Loss)}
    assert all(loss.idle is not None for loss, _ in POLICY.values())


@pytest.mark.parametrize("case", POLICY)
def test_a_token_without_advantage_has_no_loss_and_no_gradient_however_far_the_policy_has_moved(case):
    loss, knobs = POLICY[case]
    logp = torch.linspace(-1e4, 0, 33, dtype=torch.float64)
    known = {"old_logp": logp.flip(0) / 3, "advantage": torch.zeros(33, dtype=torch.float64)}
    batch, leaf = fp.Batch(torch.ones(33).long(), torch.tensor([11, 11, 11]), **known), logp.clone().requires_grad_()
    units = loss(fp.Stats(logp=leaf), batch, **knobs)
    assert not units.any() and not torch.autograd.grad(units.sum(), leaf)[0].any()


# ---- what is left out adds nothing ----


@pytest.mark.parametrize("train_head", [True, False], ids=["trained", "frozen"])
@pytest.mark.parametrize("rows", [8, 60, 4096], ids="{} rows a chunk".format)
@pytest.mark.parametrize("case", POLICY)
def test_groups_without_variance_change_no_schedule_and_no_number(case, rows, train_head, monkeypatch):
    loss, knobs = POLICY[case]
    p, batch = with_idle(loss, train_head=train_head)
    small_tiles(monkeypatch, rows=rows)
    total = fused(loss, p, batch, **knobs)
    seen = schedules_of(total)
    assert_loss_exact(total, loss, p, batch, case, **knobs)
    assert not gradients(total, torch.ones(()), p)["hidden"][level(batch)].any()
    if train_head:
        assert seen == {"EagerLoss" if loss.unit == "token" or rows > 8 else "LazyStats"}


@pytest.mark.parametrize("train_head", [True, False], ids=["trained", "frozen"])
@pytest.mark.parametrize("case", CASES)
def test_units_of_weight_zero_change_no_number(case, train_head, monkeypatch):
    loss, knobs = CASES[case]
    p, batch = setting(loss, train_head=train_head)
    small_tiles(monkeypatch, rows=60)
    gone = {"sequence": LEVEL, "pair": torch.tensor([1]), "batch": torch.tensor([0])}
    where = {"token": level(batch), "sequence": level(batch), "pair": torch.isin(batch.sequence // 2, gone["pair"])}
    units = level(batch).nonzero()[:, 0] if loss.unit == "token" else gone[loss.unit]
    batch = replace(batch, weight=batch.weight.index_fill(0, units, 0.0))
    total = fused(loss, p, batch, **knobs)
    assert_loss_exact(total, loss, p, batch, case, **knobs)
    gradient = gradients(total, torch.ones(()), p)["hidden"]
    assert not gradient[where.get(loss.unit, slice(None))].any()


@pytest.mark.parametrize("weight", ["desirable_weight", "undesirable_weight"])
@pytest.mark.parametrize("loss", [losses.kto, losses.apo_zero_unpaired])
def test_a_label_may_count_for_nothing(loss, weight):
    p, batch = setting(loss)
    ignored = batch.spread(batch.label if weight == "desirable_weight" else ~batch.label)
    loud = replace(batch, ref_logp=batch.ref_logp.masked_fill(ignored, torch.nan))
    total = fused(loss, p, loud, **{weight: 0.0})
    assert_loss_exact(fused(loss, p, batch, **{weight: 0.0}), loss, p, batch, **{weight: 0.0})
    assert torch.equal(total, fused(loss, p, batch, **{weight: 0.0}))
    assert not gradients(total, torch.ones(()), p)["hidden"][ignored].any()


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_the_fields_of_what_is_left_out_may_hold_anything(poison, schedule, monkeypatch):
    """0 x inf would be NaN; nothing is multiplied."""
    small_tiles(monkeypatch, rows=rows_of(schedule))
    p, quiet = with_idle(losses.gspo, train_head=schedule != "FrozenLogp")
    loud = replace(quiet, **{name: getattr(quiet, name).masked_fill(level(quiet), poison) for name in FIELDS})
    got, want = both(losses.gspo, p, loud), both(losses.gspo, p, quiet)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("train_head", [True, False], ids=["trained", "frozen"])
@pytest.mark.parametrize("case", POLICY)
def test_nothing_but_idle_units_is_zero_and_connected(case, train_head):
    loss, knobs = POLICY[case]
    p, batch = setting(loss, train_head=train_head)
    for weight in (batch.weight, None):
        nothing = replace(batch, advantage=torch.zeros(T), weight=weight)
        total = fused(loss, p, nothing, **knobs)
        assert total.item() == 0 and total.requires_grad
        assert all(not g.any() for g in gradients(total, torch.ones(()), p).values())


def test_a_batch_that_is_one_unit_is_left_out_as_a_whole():
    for case in ("aot", "aot_unpaired"):
        loss, knobs = CASES[case]
        p, batch = setting(loss)
        total = fused(loss, p, replace(batch, weight=torch.zeros(1)), **knobs)
        assert total.item() == 0 and not gradients(total, torch.ones(()), p)["hidden"].any()


# ---- what is not idle ----


@pytest.mark.parametrize("penalty", [{"beta": 0.04}, {"entropy_coef": 0.01}])
@pytest.mark.parametrize("loss", [losses.grpo, losses.gspo])
def test_a_penalty_is_due_whatever_the_advantage(loss, penalty):
    p, batch = with_idle(loss)
    gradient = gradients(fused(loss, p, batch, **penalty), torch.ones(()), p)["hidden"]
    assert gradient[level(batch) & packed()].any(1).all()


@pytest.mark.parametrize("case", [case for case, (loss, _) in POLICY.items() if loss.unit == "sequence"])
def test_a_sequence_is_not_left_out_in_part(case):
    """A token without advantage is part of its sequence's ratio and of its length."""
    loss, knobs = POLICY[case]
    p, batch = setting(loss)
    half = torch.arange(T) < positions(4, 5).start + 10
    batch = replace(batch, advantage=batch.advantage.masked_fill(half, 0.0))
    total = fused(loss, p, batch, **knobs)
    assert_loss_exact(total, loss, p, batch, case, **knobs)
    reached = gradients(total, torch.ones(()), p)["hidden"][half & packed() & (batch.sequence == 4)].any(1)
    assert reached.all() if loss.name in ("gspo", "luspo", "rloo") else len(reached)


def test_an_advantage_that_is_no_number_is_not_zero():
    p, batch = with_idle(losses.grpo)
    advantage = batch.advantage.index_fill(0, packed().nonzero()[0], torch.nan)
    assert fused(losses.grpo, p, replace(batch, advantage=advantage)).isnan()


# ---- it keeps its place ----

WEIGHTS = {
    "token_mean": weights.token_mean,
    "token_mean_of_sums": weights.token_mean_of_sums,
    "sequence_mean": weights.sequence_mean,
    "fixed_length": lambda batch, unit: weights.fixed_length(batch, 40, unit=unit),
    "microbatch_mean": lambda batch, unit: weights.microbatch_mean(batch, unit=unit),
    "total": weights.total,
}


@pytest.mark.parametrize("weigh", WEIGHTS)
@pytest.mark.parametrize("loss", [losses.grpo, losses.gspo])
def test_every_normalisation_is_over_all_that_is_kept(loss, weigh):
    p, batch = with_idle(loss)
    batch = replace(batch, weight=WEIGHTS[weigh](batch, unit=loss.unit))
    assert_loss_exact(fused(loss, p, batch), loss, p, batch)


@pytest.mark.parametrize("loss", [losses.grpo, losses.gspo])
def test_without_a_weight_it_is_the_mean_over_all_kept_units(loss):
    p, batch = with_idle(loss)
    kept = {"token": int(packed().sum()), "sequence": 6}[loss.unit]
    explicit = replace(batch, weight=torch.full((batch.units(loss.unit),), 1 / kept))
    assert_loss_exact(fused(loss, p, replace(batch, weight=None)), loss, p, explicit)


@pytest.mark.parametrize("schedule", [*SCHEDULES, "none"])
@pytest.mark.parametrize("reference", ["head", "top-k"])
def test_statistics_are_those_of_all_rows_in_their_order(reference, schedule, monkeypatch):
    small_tiles(monkeypatch, rows=rows_of(schedule))
    p, batch = with_idle(losses.gspo, train_head=schedule != "FrozenLogp")
    head = replace(p.head, lora=(adapter(3, p.head.weight.detach()),))
    likeliest = plain.logits(p.hidden, head).argmax(1)
    batch = replace(batch, target=torch.where(packed() & (torch.arange(T) % 2 == 0), likeliest, batch.target))
    ids = torch.stack([torch.randperm(200)[:6] for _ in range(T)])
    stored = fp.TopK(ids, torch.randn(T, 200).log_softmax(1).gather(1, ids))
    given = {"reference": p.reference if reference == "head" else stored, "temperature": 0.5 + torch.rand(T)}
    more = ("entropy", "top1", "logp@1", "reverse_kl", "jsd")
    with torch.set_grad_enabled(schedule != "none"):
        total, stats = fp.fused_loss(losses.gspo, p.hidden, head, batch, outputs=more, return_stats=True, **given)
    assert schedules_of(total) == {schedule} - {"none"}
    want = fp.token_stats(p.hidden, head, batch.target, outputs=("logp", *more), **given)
    for name in ("logp", *more):
        torch.testing.assert_close(stat(stats, name), stat(want, name).detach(), msg=name)
        assert stat(stats, name)[level(batch) & packed()].any(), f"{name} of what is idle"
    assert stats.lse is None


# ---- wherever it comes from ----


@pytest.mark.parametrize("train_head", [True, False], ids=["trained", "frozen"])
def test_under_an_adapter_on_the_head(train_head):
    p, batch = with_idle(losses.gspo, train_head=train_head)
    p = replace(p, head=replace(p.head, lora=(adapter(3, p.head.weight.detach()),)), reference=None)
    p = p.to(torch.float32, train_head=train_head)
    assert_loss_exact(fused(losses.gspo, p, batch), losses.gspo, p, batch)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("loss", [losses.grpo, losses.gspo])
def test_in_half_precision(loss, dtype):
    p, batch = with_idle(loss, dtype=dtype)
    half = replace(batch, advantage=batch.advantage.to(dtype))
    total = fused(loss, p, half)
    assert not gradients(total, torch.ones(()), p)["hidden"][level(batch)].any()
    exact = replace(batch, advantage=half.advantage.float())
    assert_loss_exact(fused(loss, p, exact), loss, p, exact)


@pytest.mark.parametrize("loss", [losses.grpo, losses.gspo])
def test_a_packed_batch_gives_the_same_bits(loss):
    p, batch = with_idle(loss)
    known = {"kept": packed().nonzero()[:, 0], "kept_lengths": batch.per_sequence(packed().int()).long()}
    got, want = both(loss, p, replace(batch, **known)), both(loss, p, batch)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_ignored_positions_may_have_an_advantage():
    p, batch = with_idle(losses.gspo)
    anything = replace(batch, advantage=torch.where(packed(), batch.advantage, torch.nan))
    assert torch.equal(fused(losses.gspo, p, anything), fused(losses.gspo, p, batch))


def test_under_graph_capture_it_goes_through(monkeypatch):
    graph_capture(monkeypatch)
    p, batch = with_idle(losses.grpo)
    assert_loss_exact(fused(losses.grpo, p, batch), losses.grpo, p, batch)


@fp.loss(unit="sequence", idle=lambda batch, knobs: batch.spread(batch.label) if knobs["only_bad"] else None)
def unlikelihood(stats: fp.Stats, batch: fp.Batch, *, only_bad: bool = True) -> Tensor:
    return batch.per_sequence(stats.logp) * torch.where(batch.label & torch.tensor(only_bad), 0.0, 1.0)


def test_a_loss_of_ones_own_says_where_it_is_idle():
    p, batch = setting(unlikelihood)
    for only_bad in (True, False):
        total = fused(unlikelihood, p, batch, only_bad=only_bad)
        assert_loss_exact(total, unlikelihood, p, batch, only_bad=only_bad)
