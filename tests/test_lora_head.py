"""A LoRA on the head, against float64: its statistics and their gradients, dropout, and what does not fit."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

import fastpost as fp
from fastpost import reference as plain
from fastpost.core.gemm import Gemm
from fastpost.types import LowRank
from problems import (
    DIVERGENCES,
    DTYPES,
    OWN,
    Problem,
    assert_exact,
    gradients,
    graph_capture,
    ours,
    problem,
    schedules_of,
    small_tiles,
    stat,
)

EVERY = (*OWN, *DIVERGENCES)
MANY = 64  # rows, enough that torch's error, the yardstick, is no stroke of luck
ONE = torch.ones(())
HALF = (torch.bfloat16, torch.float16)
TRAITS = {
    "plain": {},
    "two adapters": {"ranks": (5, 3)},
    "softcap": {"softcap": 5.0},
    "all of them": {"bias": True, "softcap": 5.0, "scale": 0.5, "temperature": 0.75},
}


def lora_problem(dtype: torch.dtype = torch.float32, *, lora: torch.dtype | None = None, **traits: object) -> Problem:
    """A frozen weight, and adapters in a dtype of their own."""
    traits = {"ranks": (6,), "T": MANY, "D": 48} | traits
    return problem(lora or dtype, **traits).to(dtype, train_head=False, lora=lora)


def with_reference(p: Problem, *, ranks: tuple[int, ...] = (2,)) -> Problem:
    """p beside a reference of another width, with adapters of its own."""
    q = problem(p.hidden.dtype, T=len(p.target), D=9, V=p.head.weight.shape[0], bias=True, ranks=ranks)
    lora = p.head.lora[0].a.dtype
    return replace(p, reference=(q.hidden, q.head)).to(p.hidden.dtype, train_head=False, lora=lora)


@pytest.fixture(params=["one tile", "many tiles"])
def tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "many tiles":
        small_tiles(monkeypatch)


# ---- against the truth ----


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("traits", TRAITS.values(), ids=TRAITS)
def test_every_statistic_and_gradient(traits, dtype):
    p = with_reference(lora_problem(dtype, **traits))
    assert schedules_of(ours(p, ["logp"]).logp) == {"LazyStats"}
    assert_exact(p, EVERY)


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("traits", TRAITS.values(), ids=TRAITS)
def test_adapters_in_fp32_over_a_head_in_half(traits, dtype):
    """As PEFT keeps them."""
    p = with_reference(lora_problem(dtype, lora=torch.float32, **traits))
    assert_exact(p, EVERY)
    assert gradients(ours(p, ["logp"]).logp, torch.ones(MANY), p)["a0"].dtype == torch.float32


@pytest.mark.parametrize("train_head", [True, False], ids=["weight trained", "weight frozen"])
@pytest.mark.parametrize("frozen", ["", "hidden", "a0", "b0", "a0 b0", "hidden a0", "hidden b0"])
def test_any_part_may_be_frozen(frozen, train_head):
    frozen = frozen.split()
    p = problem(T=MANY, ranks=(4,), bias=True).to(torch.float32, train_head=train_head)
    want = gradients(ours(p, ["logp"]).logp, torch.ones(MANY), p)
    for name in frozen:
        p.leaves[name].requires_grad_(False)
    value = ours(p, ["logp"]).logp
    assert schedules_of(value) == ({"LazyStats"} if train_head or "b0" not in frozen else {"FrozenLogp"})
    got = gradients(value, torch.ones(MANY), p)
    assert got.keys() == want.keys() - set(frozen)
    torch.testing.assert_close(got, {name: want[name] for name in got})


SHAPES = [
    {"T": 1},
    {"V": 1},
    {"T": 1, "V": 1, "D": 1, "ranks": (1,)},
    {"V": 199},  # a prime
    {"V": 65},  # a tile of one column
    {"D": 1},
    {"ranks": (1,)},
    {"ranks": (30, 31)},  # together more than D
    {"T": 6},  # a chunk of one row
]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_odd_shapes(shape, dtype, monkeypatch):
    small_tiles(monkeypatch)
    assert_exact(with_reference(lora_problem(dtype, bias=True, **({"T": 13} | shape))), EVERY)


def test_blocks_of_hidden_states_are_invisible(monkeypatch):
    p = lora_problem()
    value = ours(p, ["logp"]).logp
    want = value, gradients(value, torch.ones(MANY), p)
    monkeypatch.setattr("fastpost.core.lowrank.ROWS", 7)
    value = ours(p, ["logp"]).logp
    torch.testing.assert_close((value, gradients(value, torch.ones(MANY), p)), want)


def test_an_adapter_of_zeros_is_none_at_all_and_its_b_has_a_gradient():
    p = lora_problem()
    with torch.no_grad():
        p.head.lora[0].b.zero_()
    value = ours(p, ["logp"]).logp
    assert torch.equal(value, ours(replace(p, head=replace(p.head, lora=())), ["logp"]).logp)
    found = gradients(value, torch.ones(MANY), p)
    assert not found["a0"].any() and found["b0"].norm() > 1


def test_two_adapters_are_the_sum_of_their_products():
    p = lora_problem(torch.float64, ranks=(3, 2))
    merged = p.head.weight + sum(x.scaling * x.b @ x.a for x in p.head.lora)
    torch.testing.assert_close(ours(p, ["logp"]).logp, fp.linear_logprobs(p.hidden, merged, p.target))


def test_gradients_are_those_of_finite_differences():
    p = with_reference(lora_problem(torch.float64, T=3, D=4, V=7, ranks=(2,), softcap=3.0, temperature=0.8))

    def function(hidden: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        head = replace(p.head, lora=(LowRank(a, b, 0.7),))
        stats = fp.token_stats(hidden, head, p.target, outputs=EVERY, **p.options)
        return tuple(stat(stats, name) for name in EVERY)

    assert torch.autograd.gradcheck(function, tuple(p.leaves.values()))


# ---- ignored rows, stored teachers ----


@pytest.mark.parametrize("kept", [[], [4], [1, 2, 3, 5, 7, 11]], ids=str)
@pytest.mark.parametrize("frozen", [True, False], ids=["FrozenLogp", "LazyStats"])
def test_an_ignored_row_is_not_even_looked_at(kept, frozen):
    p = with_reference(lora_problem(T=13))
    p.head.lora[0].b.requires_grad_(not frozen)
    outputs = ["logp"] if frozen else EVERY
    mask = torch.zeros(13, dtype=torch.bool)
    mask[kept] = True
    with torch.no_grad():
        p.hidden[~mask] = torch.nan
    masked = replace(p, target=torch.where(mask, p.target, -100))
    picked = replace(p, hidden=p.hidden[mask], target=p.target[mask], reference=(p.reference[0][mask], p.reference[1]))
    got, upstream = ours(masked, outputs), torch.randn(13)
    for name in outputs:
        assert not stat(got, name)[~mask].any()
        grads = gradients(stat(got, name), upstream, masked)
        assert not grads["hidden"][~mask].any()
        if not kept:
            assert all(not g.any() for g in grads.values())
            continue
        alone = stat(ours(picked, outputs), name)
        assert torch.equal(stat(got, name)[mask], alone)
        torch.testing.assert_close(grads, gradients(alone, upstream[mask], replace(picked, hidden=p.hidden)))


def test_under_graph_capture_ignored_rows_go_through_for_nothing(monkeypatch):
    p = lora_problem(T=13)
    p = replace(p, target=p.target.index_fill(0, torch.tensor([2, 7]), -100))
    want = ours(p, ["entropy"]).entropy
    grads = gradients(want, torch.ones(13), p)
    graph_capture(monkeypatch)
    value = ours(p, ["entropy"]).entropy
    torch.testing.assert_close((value, gradients(value, torch.ones(13), p)), (want, grads))


@pytest.mark.parametrize("rest", ["bucket", "renormalize"])
def test_a_stored_teacher(rest, monkeypatch):
    small_tiles(monkeypatch)
    p = lora_problem(torch.float64, T=13, bias=True, softcap=5.0)
    ids = torch.stack([torch.randperm(200)[:6] for _ in range(13)])
    teacher = fp.TopK(ids, torch.randn(13, 200).log_softmax(-1).gather(1, ids), rest)
    assert_exact(replace(p, reference=teacher), ["forward_kl", *(["reverse_kl"] if rest == "bucket" else [])])


def test_a_policy_is_no_distance_from_itself_and_its_adapter_some_from_its_base():
    p = lora_problem()
    same = ours(replace(p, reference=(p.hidden, p.head)), (*DIVERGENCES, "entropy"))
    assert not same.reverse_kl.any() and not same.forward_kl.any()
    assert (same.jsd <= torch.finfo(torch.float32).eps * same.entropy).all()  # log m is log p, rounded
    base = replace(p, reference=(p.hidden, replace(p.head, lora=())))
    assert_exact(base, DIVERGENCES)
    assert (ours(base, DIVERGENCES).reverse_kl > 0).all()


def test_the_references_adapter_is_a_constant():
    p = with_reference(lora_problem())
    for x in p.reference[1].lora:
        x.a.requires_grad_()
        x.b.requires_grad_()
    ours(p, ["reverse_kl"]).reverse_kl.sum().backward()
    assert all(x.a.grad is None and x.b.grad is None for x in p.reference[1].lora)
    assert p.head.lora[0].a.grad.any() and p.head.lora[0].b.grad.any()


def test_one_frozen_weight_is_widened_once_for_policy_and_reference(monkeypatch):
    p = lora_problem(torch.bfloat16)
    widened = []
    operand = Gemm.operand
    monkeypatch.setattr(
        "fastpost.core.sweep.Gemm.operand", lambda s, x, name: widened.append(name) or operand(s, x, name)
    )
    for head, names in (
        (replace(p.head, lora=()), {"weight"}),
        (fp.Head(p.head.weight.clone()), {"weight", "weight q"}),
    ):
        widened.clear()
        ours(replace(p, reference=(p.hidden, head)), ["reverse_kl"])
        assert {name for name in widened if "weight" in name} == names


# ---- dropout ----


@pytest.mark.parametrize("ignored", [False, True])
def test_dropout_drops_from_what_a_sees_alone(ignored):
    """Of the kept rows, by the same random numbers as torch's own; the product with the weight sees them whole."""
    p = lora_problem(torch.float64)
    p = replace(p, head=replace(p.head, lora=(replace(p.head.lora[0], dropout=0.4),)))
    target = torch.where(torch.arange(MANY) % 3 == 0, -100, p.target) if ignored else p.target
    kept = target >= 0
    torch.manual_seed(5)
    logp = fp.linear_logprobs(p.hidden, p.head, target)
    got = gradients(logp, torch.ones(MANY), p)
    torch.manual_seed(5)
    want = plain.token_stats(p.hidden[kept], p.head, target[kept]).logp
    torch.testing.assert_close(logp[kept], want)
    torch.testing.assert_close(got, gradients(want, torch.ones(len(want)), p))
    assert not torch.equal(logp, fp.linear_logprobs(p.hidden, p.head, target))


# ---- what does not fit ----


def lora(a: object = (2, 4), b: object = (9, 2), **rest: float) -> LowRank:
    """Of these shapes, or of whatever else was given."""
    return LowRank(*(torch.ones(x) if isinstance(x, tuple) else x for x in (a, b)), **rest)


REFUSED = {
    "a list": (lambda: [lora()], r"head\.lora must be a tuple of fastpost\.types\.LowRank"),
    "a tensor": (lambda: (torch.ones(2, 4),), r"head\.lora must be a tuple of fastpost\.types\.LowRank"),
    "another D": (lambda: (lora(a=(2, 5)),), r"fit head\.weight \(9, 4\) .*got shapes \(2, 5\) and \(9, 2\)"),
    "another V": (lambda: (lora(b=(8, 2)),), r"fit head\.weight \(9, 4\) .*got shapes \(2, 4\) and \(8, 2\)"),
    "two ranks": (lambda: (lora(b=(9, 3)),), r"must have one r, got shapes \(2, 4\) and \(9, 3\)"),
    "a vector": (lambda: (lora(a=(4,)),), r"LowRank\.a must be a floating \(r, D\) matrix, got .* of shape \(4,\)"),
    "integers": (lambda: (lora(b=torch.ones(9, 2).long()),), r"LowRank\.b must be a floating \(V, r\) .*int64"),
    "no b": (lambda: (lora(b=None),), r"LowRank\.b must be a tensor, got NoneType"),
    "scaling": (lambda: (lora(scaling=float("nan")),), r"LowRank\.scaling must be a finite number, got nan"),
    "dropout": (lambda: (lora(dropout=1.0),), r"LowRank\.dropout must be in \[0, 1\), got 1\.0"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_lora_that_does_not_fit_is_refused(what):
    make, message = REFUSED[what]
    with pytest.raises(ValueError, match=message):
        fp.Head(torch.ones(9, 4), lora=make())


def test_a_lora_on_another_device_is_refused():
    head = fp.Head(torch.ones(9, 4), lora=(lora(b=torch.ones(9, 2, device="meta")),))
    with pytest.raises(ValueError, match=r"hidden is on cpu and LowRank\.b on meta"):
        fp.linear_logprobs(torch.ones(3, 4), head, torch.zeros(3, dtype=torch.int64))
