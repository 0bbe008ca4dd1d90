"""token_stats against float64, by the rule of rules.py: every output and gradient, in every dtype and shape."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

import fastpost as fp
from problems import (
    DIVERGENCES,
    DTYPES,
    OWN,
    Problem,
    assert_exact,
    gradients,
    ours,
    problem,
    schedules_of,
    stat,
    theirs,
)

pytestmark = pytest.mark.usefixtures("tiles")
EVERY = (*OWN, *DIVERGENCES)
MANY = 64  # rows, enough that torch's error, the yardstick, is no stroke of luck
TEMPERATURES = torch.tensor([0.5, 0.75, 1.0, 2.0]).repeat(16)

HEADS = {
    "plain": {},
    "bias": {"bias": True},
    "softcap": {"softcap": 5.0},
    "scale": {"scale": 0.25},
    "temperature": {"temperature": 0.75},
    "a temperature each": {"temperature": TEMPERATURES},
    "all of them": {
        "bias": True,
        "softcap": 5.0,
        "scale": 0.5,
        "temperature": TEMPERATURES,
    },
}


def with_reference(p: Problem, *, D: int = 9, **traits: object) -> Problem:
    """p beside a reference of another hidden size, with a bias and a scale of its own."""
    V, dtype, device = p.head.weight.shape[0], p.hidden.dtype, p.hidden.device
    q = problem(dtype, device, T=len(p.target), D=D, V=V, bias=True, scale=0.75, softcap=p.head.softcap)
    return replace(p, reference=(q.hidden, q.head), **traits).to(dtype)


# ---- against the truth ----


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("traits", HEADS.values(), ids=HEADS)
def test_statistics_of_the_policy(traits, dtype, device):
    assert_exact(problem(dtype, device, T=MANY, **traits), OWN)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("traits", HEADS.values(), ids=HEADS)
def test_divergences_from_a_reference_of_another_width(traits, dtype, device):
    assert_exact(with_reference(problem(dtype, device, T=MANY, **traits)), DIVERGENCES)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("traits", HEADS.values(), ids=HEADS)
def test_logp_with_its_gradient_made_in_one_pass(traits, dtype, device):
    """The frozen schedule, which no other test of this file takes."""
    p = problem(dtype, device, T=MANY, **traits).to(dtype, train_head=False)
    assert schedules_of(ours(p, ["logp"]).logp) == {"FrozenLogp"}
    assert_exact(p, ["logp"])


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_the_jsd_family_ends_in_the_two_kls(beta):
    p = with_reference(problem(T=MANY), jsd_beta=beta)
    assert_exact(p, ["jsd"])
    if beta in (0, 1):
        kl = stat(ours(p, ["forward_kl" if beta == 0 else "reverse_kl"]), "forward_kl" if beta == 0 else "reverse_kl")
        assert torch.equal(stat(ours(p, ["jsd"]), "jsd"), kl)


def test_all_outputs_together_are_what_each_is_alone():
    p = with_reference(problem(bias=True))
    together = ours(p, EVERY)
    for name in EVERY:
        torch.testing.assert_close(stat(together, name), stat(ours(p, [name]), name), msg=name)
    upstream = {name: torch.randn(13) for name in EVERY}
    total = sum((stat(together, name) * g).sum() for name, g in upstream.items())
    one = torch.ones(())
    apart = [gradients(stat(ours(p, [name]), name), g, p) for name, g in upstream.items()]
    for leaf, gradient in gradients(total, one, p).items():
        torch.testing.assert_close(gradient, sum(each[leaf] for each in apart))


def test_top1_says_whether_no_token_is_likelier():
    p = problem(T=200, V=5, std=1.0)
    assert 20 < int(ours(p, ["top1"]).top1.sum()) < 100
    assert torch.equal(ours(p, ["top1", "logp"]).top1, theirs(p).top1)
    tied = replace(p, head=fp.Head(torch.zeros(5, 16)))
    assert ours(tied, ["top1"]).top1.all()


def test_what_was_not_asked_for_is_none():
    stats = ours(problem(), ["entropy"])
    assert stats.logp is None and stats.lse is None and stats.entropy is not None
    assert ours(problem(), []) == fp.Stats()


# ---- shapes ----

SHAPES = [
    {"T": 1},
    {"V": 1},
    {"T": 1, "V": 1, "D": 1},
    {"V": 2},
    {"V": 199},  # a prime
    {"V": 63},  # smaller than a tile
    {"V": 65},  # a tile of one column
    {"D": 1},
    {"D": 17},
    {"T": 6},  # a chunk of one row
]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_odd_shapes(shape, dtype, device):
    assert_exact(with_reference(problem(dtype, device, bias=True, **shape), D=3), EVERY)


def test_transposed_and_strided_tensors_are_what_their_copies_are():
    p = problem(bias=True)
    hidden = p.hidden.detach().T.contiguous().T.requires_grad_()
    weight = p.head.weight.detach().T.contiguous().T.requires_grad_()
    bias = p.head.bias.detach().repeat_interleave(2)[::2].requires_grad_()
    target = p.target.repeat_interleave(3)[::3]
    strided = Problem(hidden, fp.Head(weight, bias), target)
    assert not (hidden.is_contiguous() or weight.is_contiguous() or bias.is_contiguous() or target.is_contiguous())
    got, want = ours(strided, OWN), ours(p, OWN)
    for name in OWN:
        torch.testing.assert_close(stat(got, name), stat(want, name), msg=name)
        upstream = torch.randn(13)
        grads = gradients(stat(got, name), upstream, strided)
        torch.testing.assert_close(grads, gradients(stat(want, name), upstream, p))


@pytest.mark.parametrize("shape", [(3, 4), (2, 3, 2), (1, 12), ()], ids=str)
def test_leading_dimensions_are_kept(shape):
    p = problem(T=max(1, math.prod(shape)))
    flat = fp.token_stats(p.hidden, p.head, p.target).logp
    got = fp.token_stats(p.hidden.view(*shape, -1), p.head, p.target.view(shape)).logp
    assert got.shape == shape
    assert torch.equal(got.flatten(), flat)


def test_a_packed_trunk_gives_hidden_a_leading_one():
    p = problem()
    hidden = p.hidden.detach()[None].requires_grad_()
    logp = fp.linear_logprobs(hidden, p.head, p.target)
    assert logp.shape == (13,)
    (gradient,) = torch.autograd.grad(logp.sum(), hidden)
    assert torch.equal(gradient[0], torch.autograd.grad(ours(p, ["logp"]).logp.sum(), p.hidden)[0])


def test_linear_logprobs_is_the_logp_of_token_stats_with_its_arguments():
    p = problem(bias=True, softcap=5.0)
    target = torch.where(p.target % 3 == 0, 7, p.target)
    got = fp.linear_logprobs(p.hidden, p.head, target, temperature=0.7, ignore_index=7)
    assert torch.equal(got, fp.token_stats(p.hidden, p.head, target, temperature=0.7, ignore_index=7).logp)
    assert (got[target == 7] == 0).all() and (got[target != 7] < 0).all()


def test_a_bare_weight_is_a_head():
    p = problem()
    assert torch.equal(fp.linear_logprobs(p.hidden, p.head.weight, p.target), ours(p, ["logp"]).logp)


# ---- ignored targets ----


@pytest.mark.parametrize("train_head", [True, False], ids=["trained", "frozen"])
@pytest.mark.parametrize("kept", [[], [4], [0, 12], [1, 2, 3, 5, 7, 11]], ids=str)
def test_an_ignored_target_is_zero_everywhere_and_changes_nothing_else(kept, train_head):
    # Of 16: rows that begin elsewhere in a cache line may be multiplied in another order.
    p = with_reference(problem(bias=True), D=16).to(torch.float32, train_head=train_head)
    outputs = [*EVERY, "top1"] if train_head else ["logp", "top1"]
    mask = torch.zeros(13, dtype=torch.bool)
    mask[kept] = True
    with torch.no_grad():
        p.hidden[~mask] = torch.nan  # an ignored row is not even looked at
    masked = replace(p, target=torch.where(mask, p.target, -100))
    picked = replace(p, hidden=p.hidden[mask], target=p.target[mask], reference=(p.reference[0][mask], p.reference[1]))
    got, upstream = ours(masked, outputs), torch.randn(13)
    for name in outputs:
        assert not stat(got, name)[~mask].any()
        if kept:
            assert torch.equal(stat(got, name)[mask], stat(ours(picked, outputs), name))
        if name != "top1":
            grads = gradients(stat(got, name), upstream, masked)
            assert not grads["hidden"][~mask].any()
            if not kept:
                assert all(not g.any() for g in grads.values())
                continue
            alone = gradients(stat(ours(picked, outputs), name), upstream[mask], replace(picked, hidden=p.hidden))
            assert all(torch.equal(grads[leaf], alone[leaf]) for leaf in grads)


def test_the_temperature_of_an_ignored_target_is_not_looked_at():
    p = problem()
    target = p.target.index_fill(0, torch.tensor([2]), -100)
    temperature = torch.ones(13).index_fill(0, torch.tensor([2]), 0.0)
    logp = fp.linear_logprobs(p.hidden, p.head, target, temperature=temperature)
    assert torch.equal(logp, fp.linear_logprobs(p.hidden, p.head, target))
