"""fused_loss: each schedule gives the same loss and gradients, at the number of products that it promises."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

import catalogue
import fastpost as fp
from fastpost import losses
from fastpost.types import NEEDS_REFERENCE
from problems import OWN as OWN_OUTPUTS
from problems import Problem, assert_loss_exact, gradients, graph_capture, problem, schedules_of, small_tiles, stat

LENGTHS = torch.tensor([21, 0, 29, 9, 24, 37, 1, 7])  # four pairs; one sequence is empty, one has a single position
PROMPTS = (2, 0, 5, 1, 4, 2, 0, 1)  # positions at the head of each sequence that predict nothing; nor does the last
T = int(LENGTHS.sum())


@fp.loss(unit="token", reads=("logp", "entropy", "mean_logp"), differentiates=("logp", "entropy"))
def entropic(stats: fp.Stats, batch: fp.Batch, *, beta: float = 0.1) -> Tensor:
    """A loss of tokens with two differentiated statistics and one that is only looked at."""
    return -stats.logp * stats.mean_logp.detach().exp() - beta * stats.entropy


@fp.loss(unit="sequence", reads=("logp", "reverse_kl"))
def distant(stats: fp.Stats, batch: fp.Batch) -> Tensor:
    return torch.log1p(batch.per_sequence(stats.reverse_kl)) - 0.1 * batch.per_sequence(stats.logp)


@fp.loss(unit="batch", reads=("logp", "log_sum_sq"))
def spread(stats: fp.Stats, batch: fp.Batch) -> Tensor:
    """A loss that cannot be cut: the variance over the batch."""
    return (stats.logp + stats.log_sum_sq).var(correction=0)[None]


OWN: dict[str, tuple[fp.Loss, dict]] = {
    "entropic": (entropic, {"beta": 0.2}),
    "distant": (distant, {}),
    "spread": (spread, {}),
}
CASES = catalogue.CASES | OWN


def positions(first: int, last: int) -> slice:
    """Of sequences first..last."""
    return slice(int(LENGTHS[:first].sum()), int(LENGTHS[:last].sum()))


def packed() -> Tensor:  # (T,) bool
    """Which positions predict a token."""
    keep = torch.ones(T, dtype=torch.bool)
    for i, prompt in enumerate(PROMPTS):
        where = positions(i, i + 1)
        keep[where][:prompt] = False
        keep[where][-1:] = False
    return keep


def longest_unit(loss: fp.Loss) -> int:
    """Kept tokens."""
    each = [int(packed()[positions(i, i + 1)].sum()) for i in range(len(LENGTHS))]
    pairs = [a + b for a, b in zip(each[::2], each[1::2], strict=True)]
    return {"token": 1, "sequence": max(each), "pair": max(pairs), "batch": sum(each)}[loss.unit]


def setting(loss: fp.Loss, dtype: torch.dtype = torch.float32, *, train_head: bool = True) -> tuple[Problem, fp.Batch]:
    p = problem(dtype, T=T, bias=True, temperature=0.75)
    hidden, head = torch.randn(T, 9), fp.Head(torch.randn(200, 9))
    p = replace(p, reference=(hidden.to(dtype), head)).to(dtype, train_head=train_head)
    with torch.no_grad():
        logp = fp.token_stats(p.hidden, p.head, p.target, temperature=0.75).logp.float()
    batch = fp.Batch(
        torch.where(packed(), p.target, -100),
        LENGTHS,
        old_logp=logp + 0.2 * torch.randn(T),
        ref_logp=logp + 0.2 * torch.randn(T),
        advantage=torch.randn(len(LENGTHS)),
        label=torch.arange(len(LENGTHS)) % 3 == 0,
        kl=torch.tensor(0.1),
    )
    return p, replace(batch, weight=torch.rand(batch.units(loss.unit)) + 0.5)


def referred(loss: fp.Loss, p: Problem, knobs: dict) -> dict:
    """The reference, for a loss that reads a divergence from it."""
    return {"reference": p.reference} if NEEDS_REFERENCE & set(loss.bind(**knobs).reads) else {}


def fused(loss: fp.Loss, p: Problem, batch: fp.Batch, **knobs: object) -> Tensor:
    total = fp.fused_loss(loss, p.hidden, p.head, batch, temperature=p.temperature, **referred(loss, p, knobs), **knobs)
    assert isinstance(total, Tensor)
    return total


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("train_head", [True, False], ids=["trained", "frozen"])
@pytest.mark.parametrize("rows", [8, 60, 4096], ids="{} rows a chunk".format)
@pytest.mark.parametrize("case", CASES)
def test_every_schedule_is_exact(case, rows, train_head, dtype, monkeypatch):
    """60 rows hold a pair or several sequences, and not the whole batch; 8 hold no unit of more than a token."""
    loss, knobs = CASES[case]
    p, batch = setting(loss, dtype, train_head=train_head)
    small_tiles(monkeypatch, rows=rows)
    total = fused(loss, p, batch, **knobs)
    schedule = "EagerLoss" if longest_unit(loss) <= rows else "LazyStats"
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


# ---- what is ignored ----

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


def both(loss: fp.Loss, p: Problem, batch: fp.Batch, **knobs: object) -> tuple[Tensor, ...]:
    total = fused(loss, p, batch, **knobs)
    return total.detach(), *gradients(total, torch.ones(()), p).values()


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
    monkeypatch.setattr("fastpost.sweep.WORKSPACE", {"cpu": 40_000, "cuda": 40_000})
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
