"""The K likeliest tokens of a row, against the logits in memory."""

from __future__ import annotations

import pytest
import torch

import fastpost as fp
from fastpost import reference as plain
from fastpost.core.likeliest import likeliest
from problems import DTYPES, problem
from rules import assert_close_to_truth

pytestmark = pytest.mark.usefixtures("tiles")
HEADS = {
    "plain": {},
    "all of it": {"bias": True, "scale": 0.5, "temperature": 0.75},
    "capped": {"softcap": 5.0, "temperature": 2.0},
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("traits", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("k", [1, 7, 200])
def test_they_are_those_of_the_logits(k, traits, dtype, device):
    p = problem(dtype, device, **traits)
    ids, logp = likeliest(p.hidden, p.head, k, temperature=p.temperature)
    of = lambda d: plain.logits(p.hidden.to(d), p.to(d).head, p.temperature).log_softmax(-1)  # noqa: E731
    truth, same = of(torch.float64).detach(), of(dtype).detach()
    assert_close_to_truth(logp, same.gather(1, ids), truth.gather(1, ids))
    assert_close_to_truth(logp, same.topk(k).values, truth.topk(k).values)
    assert all(len(set(row)) == k for row in ids.tolist())


def test_as_a_stored_teacher_all_of_them_are_the_teacher_itself():
    p = problem(torch.float64, bias=True)
    other = problem(torch.float64)
    ids, logp = likeliest(other.hidden, other.head, 200)
    names = ("forward_kl", "reverse_kl", "jsd")
    stored, live = (
        fp.token_stats(p.hidden, p.head, p.target, outputs=names, reference=reference)
        for reference in (fp.TopK(ids, logp), (other.hidden, other.head))
    )
    for name in names:
        torch.testing.assert_close(getattr(stored, name), getattr(live, name))


def test_what_has_no_such_tokens_is_refused():
    p = problem()
    for k in (0, 201):
        with pytest.raises(ValueError, match=f"k must be from 1 to 200, the vocabulary, got {k}"):
            likeliest(p.hidden, p.head, k)
