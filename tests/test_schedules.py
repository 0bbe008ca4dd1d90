"""fused_loss: each schedule gives the same loss and gradients, those of float64, however a batch is cut."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

import fastpost as fp
from fastpost import losses
from fastpost.core.sweep import spans
from loss_problems import CASES, LENGTHS, T, both, fused, longest_unit, packed, positions, referred, setting
from problems import OWN as OWN_OUTPUTS
from problems import assert_loss_exact, gradients, schedules_of, small_tiles, small_workspace, stat


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("train_head", [True, False], ids=["trained", "frozen"])
@pytest.mark.parametrize("rows", [8, 60, 4096], ids="{} rows a chunk".format)
@pytest.mark.parametrize("case", CASES)
def test_every_schedule_is_exact(case, rows, train_head, dtype, monkeypatch):
    """60 rows hold a pair or several sequences, and not the whole batch; 8 hold no unit of more than a token. fp16
    holds no gradient before the loss scale has come."""
    loss, knobs = CASES[case]
    p, batch = setting(loss, dtype, train_head=train_head)
    small_tiles(monkeypatch, rows=rows)
    total = fused(loss, p, batch, **knobs)
    schedule = "EagerLoss" if longest_unit(loss) <= rows and dtype != torch.float16 else "LazyStats"
    if loss.bind(**knobs).differentiates == ("logp",) and not train_head:
        schedule = "FrozenLogp"
    assert schedules_of(total) == {schedule}
    assert_loss_exact(total, loss, p, batch, case, **knobs)


@pytest.mark.parametrize("case", CASES)
def test_the_loss_itself_on_token_stats_is_the_lazy_schedule(case):
    loss, knobs = CASES[case]
    p, batch = setting(loss)
    bound, needs = loss.bind(**knobs), referred(loss, p, knobs)
    stats = fp.token_stats(p.hidden, p.head, batch.target, outputs=bound.reads, temperature=p.temperature, **needs)
    at = {"temperature": p.temperature} if "temperature" in bound.knobs else {}
    total = (loss(stats, batch, **knobs, **at) * batch.weight).sum()
    assert schedules_of(total) == {"LazyStats"}
    assert_loss_exact(total, loss, p, batch, case, **knobs)


@pytest.mark.parametrize("case", CASES)
def test_without_gradients_only_the_statistics_are_found(case):
    loss, knobs = CASES[case]
    p, batch = setting(loss)
    with torch.no_grad():
        value = fused(loss, p, batch, **knobs)
    assert not value.requires_grad
    torch.testing.assert_close(value, fused(loss, p, batch, **knobs).detach())


# ---- return_stats ----


@pytest.mark.parametrize("schedule", ["FrozenLogp", "EagerLoss", "LazyStats", "none"])
def test_return_stats_are_those_of_token_stats_in_input_order(schedule, monkeypatch):
    p, batch = setting(losses.dpo, train_head=schedule != "FrozenLogp")
    if schedule == "LazyStats":
        small_tiles(monkeypatch, rows=8)
    with torch.set_grad_enabled(schedule != "none"):
        extra = ("entropy", "top1", "logp@1", "reverse_kl", "forward_kl", "jsd")
        total, stats = fp.fused_loss(
            losses.dpo,
            p.hidden,
            p.head,
            batch,
            reference=p.reference,
            temperature=p.temperature,
            outputs=extra,
            return_stats=True,
        )
    assert schedules_of(total) == ({schedule} - {"none"})
    want = fp.token_stats(p.hidden, p.head, batch.target, outputs=("logp", *extra), **p.options)
    for name in ("logp", *extra):
        assert not stat(stats, name).requires_grad
        torch.testing.assert_close(stat(stats, name), stat(want, name).detach(), msg=name)
    assert stats.lse is None and stats.mean_logp is None


@pytest.mark.parametrize("sequences", [1, 3, 5])
def test_sequences_need_not_be_even_in_number(sequences):
    p, batch = setting(losses.gspo)
    where = positions(0, sequences)
    part = replace(batch.slice(0, sequences, where.start, where.stop), weight=batch.weight[:sequences])
    p = replace(p, hidden=p.hidden[where].detach(), target=p.target[where], reference=None).to(torch.float32)
    assert_loss_exact(fused(losses.gspo, p, part), losses.gspo, p, part)


# ---- invariances ----


@pytest.mark.parametrize("train_head", [True, False], ids=["trained", "frozen"])
@pytest.mark.parametrize("case", CASES)
def test_the_same_inputs_give_the_same_bits(case, train_head, monkeypatch):
    loss, knobs = CASES[case]
    small_tiles(monkeypatch, rows=60)
    p, batch = setting(loss, torch.bfloat16, train_head=train_head)
    first = both(loss, p, batch, **knobs)
    assert all(torch.equal(a, b) for a, b in zip(first, both(loss, p, batch, **knobs), strict=True))


@pytest.mark.parametrize(("rows", "columns"), [(1, 64), (3, 64), (50, 100), (97, 64), (40, 4096)])
@pytest.mark.parametrize("case", ["grpo", "dpo", "distant"])
def test_the_size_of_chunks_is_invisible(case, rows, columns, monkeypatch):
    """To rounding, as torch.testing understands it."""
    loss, knobs = CASES[case]
    p, batch = setting(loss)
    want = both(loss, p, batch, **knobs)
    small_tiles(monkeypatch, rows=rows, columns=columns)
    torch.testing.assert_close(both(loss, p, batch, **knobs), want)


def test_a_smaller_workspace_is_invisible(monkeypatch):
    p, batch = setting(losses.gspo)
    want = both(losses.gspo, p, batch)
    small_workspace(monkeypatch, 40_000)
    torch.testing.assert_close(both(losses.gspo, p, batch), want)


@pytest.mark.parametrize("train_head", [True, False], ids=["trained", "frozen"])
@pytest.mark.parametrize("case", ["sft", "grpo", "gspo", "dpo"])
def test_packed_is_the_sum_of_each_unit_alone(case, train_head):
    """Which is gradient accumulation: the weight is given, so it does not matter how a batch is cut."""
    loss, knobs = CASES[case]
    p, batch = setting(loss, train_head=train_head)
    step = 2 if loss.unit == "pair" else 1
    whole = both(loss, p, batch, **knobs)
    parts = []
    for first in range(0, len(LENGTHS), step):
        where = positions(first, first + step)
        if where.start == where.stop:
            continue
        unit = where if loss.unit == "token" else slice(first // step, first // step + 1)
        alone = replace(batch.slice(first, first + step, where.start, where.stop), weight=batch.weight[unit])
        total = fp.fused_loss(loss, p.hidden[where], p.head, alone, temperature=p.temperature, **knobs)
        parts.append((total.detach(), *gradients(total, torch.ones(()), p).values()))
    torch.testing.assert_close(tuple(sum(each) for each in zip(*parts, strict=True)), whole)


def test_kept_rows_that_are_known_beforehand_change_nothing():
    p, batch = setting(losses.dpo)
    rows = packed().nonzero()[:, 0]
    lengths = batch.per_sequence(packed().float()).long()
    for known in ({"kept": rows}, {"kept": rows, "kept_lengths": lengths}):
        got, want = both(losses.dpo, p, replace(batch, **known)), both(losses.dpo, p, batch)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_kept_rows_are_those_of_another_ignore_index():
    p, batch = setting(losses.dpo)
    target = torch.where(packed(), p.target, -1)
    everything = {"kept": torch.arange(T), "kept_lengths": LENGTHS}
    want = fused(losses.dpo, p, batch)
    other = replace(batch, target=target, **everything)
    got = fp.fused_loss(losses.dpo, p.hidden, p.head, other, temperature=p.temperature, ignore_index=-1)
    assert torch.equal(got, want)


@fp.loss(unit="token")
def by_length(stats: fp.Stats, batch: fp.Batch) -> Tensor:
    """A loss of tokens that knows something of the token's sequence."""
    return -stats.logp / batch.spread(batch.completion_length) * torch.where(batch.spread(batch.label), 1.0, 2.0)


@pytest.mark.parametrize("train_head", [True, False], ids=["eager", "frozen"])
def test_a_loss_of_tokens_may_read_what_is_known_of_sequences(train_head, monkeypatch):
    p, batch = setting(by_length, train_head=train_head)
    known = {"completion_length": torch.arange(1, 9), "label": torch.arange(8) % 3 == 0}
    batch = replace(batch, weight=batch.weight / T, **known)
    small_tiles(monkeypatch, rows=10)
    total = fused(by_length, p, batch)
    assert schedules_of(total) == {"EagerLoss" if train_head else "FrozenLogp"}
    assert_loss_exact(total, by_length, p, batch)


def test_a_strided_target_is_taken():
    hidden, weight, target = torch.randn(6, 4), torch.randn(9, 4), torch.randint(9, (6, 2))[:, 0]
    torch.testing.assert_close(
        fp.linear_logprobs(hidden, weight, target), fp.linear_logprobs(hidden, weight, target.contiguous())
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("outputs", [OWN_OUTPUTS, (*OWN_OUTPUTS, "reverse_kl", "forward_kl")], ids=["own", "with a KL"])
def test_what_the_frozen_schedule_only_looks_at_is_what_statistics_are(outputs, dtype, monkeypatch):
    small_tiles(monkeypatch)
    p, _ = setting(losses.sft, dtype, train_head=False)
    call = {"outputs": outputs, "temperature": p.temperature, "reference": p.reference}
    found = fp.token_stats(p.hidden, p.head, p.target, differentiates=("logp",), **call)
    with torch.no_grad():
        want = fp.token_stats(p.hidden, p.head, p.target, **call)
    assert schedules_of(stat(found, "logp")) == {"FrozenLogp"}
    for name in outputs:
        assert torch.equal(stat(found, name), stat(want, name)), name


@pytest.mark.parametrize("multiple", [1, 12, 128])
@pytest.mark.parametrize("most", [1, 11, 12, 60, 399])
def test_chunks_are_few_alike_and_of_whole_panels(most, multiple):
    for total in range(400):
        pieces = list(spans(total, most, multiple))
        sizes = [x.stop - x.start for x in pieces]
        assert [i for x in pieces for i in range(x.start, x.stop)] == list(range(total))
        assert all(0 < size <= most for size in sizes)
        if most > multiple:
            assert all(size % multiple == 0 for size in sizes[:-1])
            assert len(sizes) == (1 if 0 < total <= most else -(-total // (most - most % multiple)))
