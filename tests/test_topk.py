"""A stored teacher against the policy, over its tokens and the one outcome that is all the others."""

from __future__ import annotations

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
    stat,
    theirs,
)
from rules import assert_close_to_truth, assert_gradient_close_to_truth

pytestmark = pytest.mark.usefixtures("tiles")
FINITE = {"bucket": DIVERGENCES, "renormalize": ("forward_kl", "jsd")}  # divergences that the teacher's rest allows


def with_teacher(p: Problem, rest: str = "bucket", K: int = 7, *, share: float = 0.9, jsd_beta: float = 0.5) -> Problem:
    """A teacher that gives `share` of the probability to K tokens: half the policy's best, half its worst."""
    T, V = len(p.target), p.head.weight.shape[0]
    likely = (p.hidden @ p.head.weight.T).argsort(1, descending=True)
    ids = torch.cat([likely[:, : K // 2], likely[:, V - (K - K // 2) :]], 1)
    logp = torch.randn(T, K, device=ids.device).log_softmax(1) + torch.tensor(share).log()
    return replace(p, reference=fp.TopK(ids, logp.to(p.hidden.dtype), rest), jsd_beta=jsd_beta)


HEADS = {
    "plain": {},
    "all of it": {"bias": True, "scale": 0.5, "temperature": 0.75},
    "capped": {"softcap": 5.0, "temperature": torch.tensor([0.5, 0.75, 1.0, 2.0]).repeat(16)},
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rest", FINITE)
@pytest.mark.parametrize("traits", HEADS.values(), ids=HEADS)
def test_against_the_truth(traits, rest, dtype, device):
    assert_exact(with_teacher(problem(dtype, device, T=64, std=1.0, **traits), rest), FINITE[rest])


@pytest.mark.parametrize("K", [1, 199])
@pytest.mark.parametrize("rest", FINITE)
def test_one_token_and_all_but_one(rest, K):
    assert_exact(with_teacher(problem(torch.float64), rest, K), FINITE[rest])


@pytest.mark.parametrize(("beta", "kl"), [(0.0, "forward_kl"), (1.0, "reverse_kl")])
def test_the_jsd_family_ends_in_the_two_kls(beta, kl):
    p = with_teacher(problem(), jsd_beta=beta)
    assert torch.equal(ours(p, ["jsd"]).jsd, stat(ours(p, [kl]), kl))


@pytest.mark.parametrize("beta", [0.3, 0.7])
def test_the_jsd_between(beta):
    assert_exact(with_teacher(problem(torch.float64), jsd_beta=beta), ["jsd"])


@pytest.mark.parametrize("rest", FINITE)
def test_a_teacher_of_the_whole_vocabulary_is_a_dense_reference(rest):
    p = problem(torch.float64, bias=True)
    hidden, head = torch.randn(13, 9, dtype=torch.float64), fp.Head(torch.randn(200, 9, dtype=torch.float64))
    logq = (hidden @ head.weight.T).log_softmax(1)
    ids = torch.stack([torch.randperm(200) for _ in range(13)])
    stored, dense = (replace(p, reference=q) for q in (fp.TopK(ids, logq.gather(1, ids), rest), (hidden, head)))
    names = FINITE[rest]
    for name in names:
        got, want = stat(ours(stored, names), name), stat(ours(dense, names), name)
        torch.testing.assert_close(got, want, msg=name)
        upstream = torch.randn(13)
        torch.testing.assert_close(gradients(got, upstream, stored), gradients(want, upstream, dense))


def test_a_teacher_that_is_the_policy_is_no_distance_away():
    p = problem(torch.float64)
    logp, ids = theirs_logp(p).topk(20)
    stats = ours(replace(p, reference=fp.TopK(ids, logp)), DIVERGENCES)
    rounded = 200 * torch.finfo(torch.float64).eps  # once for each token of the vocabulary
    largest = max(leaf.detach().abs().max() for leaf in p.leaves.values())
    for name in DIVERGENCES:
        assert (stat(stats, name) <= rounded).all(), name
        grads = gradients(stat(stats, name), torch.ones(13), p)
        assert all((g.abs() <= rounded * largest).all() for g in grads.values()), name


def theirs_logp(p: Problem) -> torch.Tensor:  # (T, V)
    return (p.hidden.detach() @ p.head.weight.detach().T).log_softmax(1)


def test_a_bucket_can_only_bring_distributions_nearer():
    """Data processing: merging outcomes loses what told them apart."""
    p = problem(torch.float64)
    q = problem(torch.float64)
    logq, ids = theirs_logp(q).topk(10)
    merged = ours(replace(p, reference=fp.TopK(ids, logq)), DIVERGENCES)
    whole = ours(replace(p, reference=(q.hidden, q.head)), DIVERGENCES)
    for name in DIVERGENCES:
        assert (stat(merged, name) > 0).all() and (stat(merged, name) < stat(whole, name)).all(), name


def test_statistics_of_the_policy_do_not_feel_the_teacher():
    """The named columns are taken out of each tile and put back."""
    p = problem(bias=True)
    alone, beside = ours(p, OWN), ours(with_teacher(p), (*OWN, *DIVERGENCES))
    for name in OWN:
        assert torch.equal(stat(alone, name), stat(beside, name)), name


def test_its_gradient_adds_to_those_of_other_statistics():
    p = with_teacher(problem(torch.float64, bias=True))
    g = torch.randn(13)
    together = ours(p, ("entropy", "forward_kl"))
    got = gradients(together.entropy + 2 * together.forward_kl, g, p)
    parts = [gradients(stat(ours(p, [n]), n), c * g, p) for n, c in (("entropy", 1), ("forward_kl", 2))]
    for leaf, gradient in got.items():
        torch.testing.assert_close(gradient, parts[0][leaf] + parts[1][leaf])


def test_ignored_rows_take_their_part_of_the_teacher_along():
    p = with_teacher(problem())
    mask = torch.arange(13) % 3 == 0
    teacher = fp.TopK(p.reference.ids[mask], p.reference.logp[mask])
    p.reference.logp[~mask] = torch.nan
    got = ours(replace(p, target=torch.where(mask, p.target, -100)), DIVERGENCES)
    want = ours(replace(p, hidden=p.hidden[mask], target=p.target[mask], reference=teacher), DIVERGENCES)
    for name in DIVERGENCES:
        assert torch.equal(stat(got, name)[mask], stat(want, name)) and not stat(got, name)[~mask].any()


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("std", [3.0, 8.0, 30.0])
def test_a_policy_that_is_sure_of_the_teachers_tokens(std, name):
    """Its own rest is then 1e-6, 1e-20 or nothing, and gradients must not be differences of far larger numbers."""
    p = problem(T=64, std=std)
    ids = theirs_logp(p).topk(10)[1]
    p = replace(p, reference=fp.TopK(ids, torch.randn(64, 10).log_softmax(1) - 0.5))
    truth, fp32 = p.to(torch.float64), p.to(torch.float32)
    values = [stat(x, name) for x in (ours(p, [name]), theirs(fp32), theirs(truth))]
    assert_close_to_truth(*values, name)
    grads = [gradients(v, torch.ones(64), x) for v, x in zip(values, (p, fp32, truth), strict=True)]
    for leaf in p.leaves:
        assert_gradient_close_to_truth(*(g[leaf] for g in grads), f"d{name}/d{leaf}")


@pytest.mark.parametrize("name", DIVERGENCES)
def test_a_policy_that_has_all_but_reached_its_teacher(name):
    """The divergence is then below rounding, and may come out as zero; its gradient is not, and may not."""
    p = problem(T=64, std=1.0)
    logp, ids = theirs_logp(p.to(torch.float64)).topk(20)
    p = replace(p, reference=fp.TopK(ids, (logp + 1e-4 * torch.randn_like(logp)).float()))
    truth, fp32 = p.to(torch.float64), p.to(torch.float32)
    grads = [
        gradients(stat(x, name), torch.ones(64), y)["hidden"]
        for x, y in ((ours(p, [name]), p), (theirs(fp32), fp32), (theirs(truth), truth))
    ]
    assert_gradient_close_to_truth(*grads)
