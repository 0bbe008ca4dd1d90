"""Units that are ignored: exactly nothing, whatever their fields hold, and no part of a mean."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import fastpost as fp
from fastpost import losses
from fastpost.core.compaction import find_rows
from loss_problems import CASES, T, fused, packed, positions, setting
from problems import assert_loss_exact, gradients, graph_capture, schedules_of, small_tiles

IGNORED = {
    "a sequence": ("gspo", positions(2, 3), slice(2, 3)),
    "a pair": ("dpo", positions(2, 4), slice(1, 2)),
    "tokens": ("grpo", slice(10, 12), slice(10, 12)),
}


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    ("schedule", "what"),
    [
        *((schedule, what) for schedule in ("FrozenLogp", "EagerLoss") for what in IGNORED),
        *(("LazyStats", what) for what in ("a sequence", "a pair")),  # a loss of tokens is never lazy
    ],
)
def test_an_ignored_unit_is_exactly_nothing(schedule, what, poison, monkeypatch):
    """Its fields may hold anything: the loss is never formed from them."""
    case, where, units = IGNORED[what]
    loss, knobs = CASES[case]
    if schedule == "LazyStats":
        small_tiles(monkeypatch, rows=8)
    p, batch = setting(loss, train_head=schedule != "FrozenLogp")
    batch.target[where] = -100
    quiet = replace(batch, weight=batch.weight.index_fill(0, torch.arange(units.start, units.stop), 0.0))
    loud = replace(batch, **{n: getattr(batch, n).clone() for n in ("old_logp", "ref_logp", "advantage")})
    for name in ("old_logp", "ref_logp", "advantage"):
        getattr(loud, name)[where] = poison
    total, want = fused(loss, p, loud, **knobs), fused(loss, p, quiet, **knobs)
    assert schedules_of(total) == {schedule}
    assert torch.equal(total, want)
    got = gradients(total, torch.ones(()), p)
    assert not got["hidden"][where].any() and got["hidden"].any()
    for leaf, gradient in gradients(want, torch.ones(()), p).items():
        assert torch.equal(got[leaf], gradient)


@pytest.mark.parametrize("train_head", [True, False], ids=["trained", "frozen"])
def test_the_weight_of_an_ignored_unit_may_be_one_over_nothing(train_head):
    p, batch = setting(losses.gspo, train_head=train_head)
    batch.target[positions(2, 3)] = -100
    weight = 1 / batch.per_sequence((batch.target >= 0).float())
    assert weight.isinf().sum() == 3
    total = fused(losses.gspo, p, replace(batch, weight=weight))
    assert torch.equal(total, fused(losses.gspo, p, replace(batch, weight=weight.nan_to_num(posinf=0.0))))


@pytest.mark.parametrize("schedule", ["FrozenLogp", "EagerLoss"])
def test_one_side_of_a_pair_may_be_ignored(schedule):
    p, batch = setting(losses.dpo, train_head=schedule == "EagerLoss")
    rejected = positions(3, 4)  # the second pair's
    batch.target[rejected] = -100
    total = fused(losses.dpo, p, batch)
    assert schedules_of(total) == {schedule}
    assert_loss_exact(total, losses.dpo, p, batch)
    assert not gradients(total, torch.ones(()), p)["hidden"][rejected].any()


@pytest.mark.parametrize("train_head", [True, False], ids=["trained", "frozen"])
@pytest.mark.parametrize("case", ["sft", "grpo", "gspo", "dpo", "entropic"])
def test_nothing_kept_is_zero_and_connected(case, train_head):
    loss, knobs = CASES[case]
    p, batch = setting(loss, train_head=train_head)
    target = torch.full_like(batch.target, -100)
    for weight in (batch.weight, None):
        nothing = replace(batch, target=target, weight=weight)
        total, stats = fp.fused_loss(loss, p.hidden, p.head, nothing, return_stats=True, **knobs)
        assert total.item() == 0 and total.requires_grad
        assert stats.logp.shape == (T,) and not stats.logp.any()
        assert all(not g.any() for g in gradients(total, torch.ones(()), p).values())


@pytest.mark.parametrize("case", ["grpo", "gspo", "dpo"])
def test_without_a_weight_it_is_the_mean_over_kept_units(case):
    loss, knobs = CASES[case]
    p, batch = setting(loss)
    batch.target[positions(2, 4)] = -100  # the second pair
    units = loss(fp.token_stats(p.hidden, p.head, batch.target, temperature=p.temperature), batch, **knobs)
    kept = {"token": int((batch.target >= 0).sum()), "sequence": 4, "pair": 3}[loss.unit]
    torch.testing.assert_close(fused(loss, p, replace(batch, weight=None), **knobs), units.sum() / kept)


@pytest.mark.parametrize("train_head", [True, False], ids=["trained", "frozen"])
@pytest.mark.parametrize("case", ["sft", "grpo", "entropic"])
def test_under_graph_capture_ignored_rows_go_through_for_nothing(case, train_head, monkeypatch):
    loss, knobs = CASES[case]
    p, batch = setting(loss, train_head=train_head)
    want = fused(loss, p, batch, **knobs)
    grads, mean = gradients(want, torch.ones(()), p), fused(loss, p, replace(batch, weight=None), **knobs)
    graph_capture(monkeypatch)
    torch.testing.assert_close(fused(loss, p, replace(batch, weight=None), **knobs), mean)
    total, stats = fp.fused_loss(
        loss, p.hidden, p.head, batch, temperature=p.temperature, return_stats=True, outputs=("top1",), **knobs
    )
    torch.testing.assert_close(total, want)
    torch.testing.assert_close(gradients(total, torch.ones(()), p), grads)
    assert not gradients(total, torch.ones(()), p)["hidden"][~packed()].any()
    assert not stats.logp[~packed()].any() and not stats.top1[~packed()].any()


@pytest.mark.parametrize("train_head", [True, False], ids=["trained", "frozen"])
def test_under_graph_capture_fields_of_ignored_rows_may_hold_anything(train_head, monkeypatch):
    graph_capture(monkeypatch)
    p, batch = setting(losses.grpo, train_head=train_head)
    batch.advantage[~packed()] = torch.nan
    total = fused(losses.grpo, p, batch)
    assert total.isfinite() and all(g.isfinite().all() for g in gradients(total, torch.ones(()), p).values())


def test_under_graph_capture_only_tokens_can_be_units(monkeypatch):
    graph_capture(monkeypatch)
    p, batch = setting(losses.dpo)
    with pytest.raises(ValueError, match="only a loss of tokens can run, and 'dpo' is one of pairs"):
        fused(losses.dpo, p, batch)


@pytest.mark.parametrize("live", [None, [1, 0, 1, 1, 0, 1, 1, 1]], ids=["no row is idle", "some are"])
def test_what_is_left_of_each_sequence_comes_with_the_count_of_rows(live):
    """In its transfer, so that units of sequences are no further wait: lengths of an accelerator's are never read."""
    target, lengths = torch.tensor([1, -100, 2, -100, 3, 4, 5, -100]), torch.tensor([3, 1, 0, 4])
    alive = None if live is None else torch.tensor(live).bool() & (target != -100)
    rows = find_rows(target, -100, 10, None, lengths, alive)
    assert rows.index.tolist() == ([0, 2, 4, 5, 6] if live is None else [0, 2, 5, 6])
    assert rows.lengths.tolist() == ([2, 0, 0, 3] if live is None else [2, 0, 0, 2])
    batch = fp.Batch(target, lengths)
    assert torch.equal(batch.at(rows.index, rows.lengths).lengths, batch.at(rows.index).lengths)
    assert find_rows(target, -100, 10, None, None, alive).lengths is None
