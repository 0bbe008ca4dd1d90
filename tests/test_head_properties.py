"""token_stats of hard numbers, and what holds whatever the numbers are: signs, bounds, distances of nothing."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import fastpost as fp
from fastpost import reference as plain
from problems import (
    DIVERGENCES,
    Problem,
    assert_exact,
    assert_gradients_exact,
    comparisons,
    gradients,
    ours,
    problem,
    stat,
    theirs,
)
from rules import STATISTIC_SLACK, assert_close_to_truth
from test_head import EVERY, with_reference

pytestmark = pytest.mark.usefixtures("tiles")


# ---- hard numbers ----


def extreme(kind: str) -> Problem:
    """Heads of 40 tokens whose weight is the identity, so that hidden states are the logits."""
    T, V = 6, 40
    logits = {
        "+1e4": torch.randn(T, V).index_fill(1, torch.tensor([3]), 1e4),
        "-1e4": torch.randn(T, V).index_fill(1, torch.tensor([3]), -1e4),
        "both": torch.randn(T, V).sign() * 1e4,
        "peaked": torch.randn(T, V) * 60,
        "flat": torch.zeros(T, V),
    }[kind]
    target = torch.tensor([3, 3, 3, 0, 1, 2])
    q = (torch.randn(T, V) * 2, fp.Head(torch.eye(V)))
    return Problem(logits, fp.Head(torch.eye(V)), target, reference=q).to(torch.float32)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("kind", ["+1e4", "-1e4", "both", "peaked", "flat"])
def test_extreme_logits(kind, dtype):
    p = extreme(kind).to(dtype)
    truth, fp32, got = p.to(torch.float64), p.to(torch.float32), ours(p, EVERY)
    for name in EVERY:
        want, single = (stat(theirs(x), name) for x in (truth, fp32))
        assert_close_to_truth(stat(got, name), single, want, name)
        # Of one logit at a time, so in absolute terms: most of these gradients are zero but for rounding.
        of = lambda value, x: gradients(value, torch.ones(6), x)["hidden"]  # noqa: E731
        assert_close_to_truth(of(stat(got, name), p), of(single, fp32), of(want, truth), f"d{name}/dlogit")


@pytest.mark.parametrize("softcap", [None, 20.0])
def test_banned_tokens_take_no_part(softcap):
    """A bias of -inf. With a cap it becomes a logit of -softcap, as in torch."""
    p = problem(bias=True, softcap=softcap)
    banned = torch.arange(200) % 3 == 0
    with torch.no_grad():
        p.head.bias[banned] = -torch.inf
    p = replace(p, target=torch.where(p.target % 3 == 0, p.target - 1, p.target).clamp(min=1))
    assert_exact(p.to(torch.bfloat16), ("logp", "lse", "log_sum_sq", "logp@1"))
    truth, got = p.to(torch.float64), ours(p, ("logp", "entropy"))
    logp = plain.logits(truth.hidden, truth.head).log_softmax(-1)
    entropy = -(logp.exp() * logp.masked_fill(logp == -torch.inf, 0)).sum(-1)
    assert_close_to_truth(got.entropy, entropy.float(), entropy)
    grads = gradients(got.entropy, torch.ones(13), p)
    assert all(g.isfinite().all() for g in grads.values())
    assert not grads["bias"][banned].any()


def test_a_banned_target_is_all_but_impossible_and_its_gradient_is_finite():
    p = problem(bias=True)
    with torch.no_grad():
        p.head.bias[p.target[0]] = -torch.inf
    logp = ours(p, ["logp"]).logp
    assert (logp[p.target == p.target[0]] < -1e20).all() and not logp.isnan().any()
    truth, _, same = comparisons(p)
    want, yardstick = (gradients(theirs(x).logp, torch.ones(13), x) for x in (truth, same))
    assert_gradients_exact(gradients(logp, torch.ones(13), p), p, yardstick, want, "logp")


@pytest.mark.parametrize("temperature", [1e-3, 0.5, 1.0, 2.0])
def test_where_every_token_is_banned_none_is_likelier_than_another(temperature):
    p = replace(problem(bias=True, scale=3.0), temperature=temperature)
    with torch.no_grad():
        p.head.bias.fill_(-torch.inf)
    got, V = ours(p, ["logp", "entropy", "logp@1"]), p.head.weight.shape[0]
    for value, want in ((got.logp, -math.log(V)), (got.entropy, math.log(V)), (got.logp_at_1, -math.log(V))):
        torch.testing.assert_close(value, torch.full_like(value, want))
    total = (got.logp + got.entropy).sum()
    assert all(g.isfinite().all() for g in torch.autograd.grad(total, [p.hidden, p.head.weight]))


def test_a_reference_that_bans_the_same_tokens_is_no_further_away():
    p = with_reference(problem(bias=True))
    banned = torch.arange(200) % 2 == 0
    with torch.no_grad():
        p.head.bias[banned] = -torch.inf
        p.reference[1].bias[banned] = -torch.inf
    left = replace(p.head, weight=p.head.weight[~banned], bias=p.head.bias[~banned])
    q = p.reference[1]
    left_q = p.reference[0], replace(q, weight=q.weight[~banned], bias=q.bias[~banned])
    among = Problem(p.hidden, left, p.target // 2, reference=left_q)
    for name in DIVERGENCES:
        torch.testing.assert_close(stat(ours(p, [name]), name), stat(ours(among, [name]), name), msg=name)


# ---- properties ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("std", [1e-3, 1.0, 30.0])
def test_signs_and_bounds(std, dtype):
    stats = ours(with_reference(problem(dtype, T=60, std=std)), EVERY)
    assert (stats.logp <= 0).all() and (stats.log_sum_sq <= 0).all() and (stats.logp_at_1 <= 0).all()
    assert (stats.entropy >= 0).all() and (stats.entropy <= math.log(200) + STATISTIC_SLACK).all()
    assert (stats.reverse_kl >= 0).all() and (stats.forward_kl >= 0).all()
    assert (stats.jsd >= 0).all() and (stats.jsd <= math.log(2) + STATISTIC_SLACK).all()
    assert (stats.mean_logp <= stats.logp.new_tensor(-math.log(200)) + STATISTIC_SLACK).all()


@pytest.mark.parametrize("shared", [True, False], ids=["the same tensors", "copies"])
def test_a_policy_is_no_distance_from_itself(shared):
    p = problem(bias=True, softcap=10.0, temperature=0.7)
    twin = p if shared else p.to(torch.float32)
    p = replace(p, reference=(twin.hidden, twin.head))
    stats = ours(p, (*DIVERGENCES, "entropy"))
    assert not stats.reverse_kl.any() and not stats.forward_kl.any()
    # log m is log p again, but rounded: an ulp of itself, of which the mean over p is an ulp of the entropy.
    assert (stats.jsd <= torch.finfo(torch.float32).eps * stats.entropy).all()
    assert_exact(p, DIVERGENCES)


def test_gradients_do_not_reach_the_reference():
    p = with_reference(problem())
    hidden, head = p.reference
    hidden.requires_grad_()
    head.weight.requires_grad_()
    stat(ours(p, ["reverse_kl"]), "reverse_kl").sum().backward()
    assert hidden.grad is None and head.weight.grad is None and p.hidden.grad is not None


def as_function(p: Problem, outputs: tuple[str, ...], token_stats) -> object:
    def function(hidden: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        stats = token_stats(hidden, replace(p.head, weight=weight, bias=bias), p.target, **p.options)
        return tuple(stat(stats, name) for name in outputs)

    return function


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_gradients_are_those_of_finite_differences(softcap):
    """Of the reference too: were its mathematics wrong, everything above would agree with it."""
    p = with_reference(problem(torch.float64, T=3, D=4, V=7, bias=True, softcap=softcap, temperature=0.8), D=3)
    fused = lambda *args, **rest: fp.token_stats(*args, outputs=EVERY, **rest)  # noqa: E731
    for token_stats in (plain.token_stats, fused):
        assert torch.autograd.gradcheck(as_function(p, EVERY, token_stats), tuple(p.leaves.values()))
