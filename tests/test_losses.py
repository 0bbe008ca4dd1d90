"""The losses themselves: equations by hand, and declarations. `test_parity*.py` has what others say of them."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastpost as fp
from fastpost import losses
from fastpost.losses import kl

LENGTHS = torch.tensor([4, 2, 5, 5])  # two pairs; the last position of each predicts nothing
SECOND = 6  # where the second pair begins
T = 16
KEPT = torch.ones(T, dtype=torch.bool).index_fill(0, LENGTHS.cumsum(0) - 1, False)


def setting() -> tuple[fp.Stats, fp.Batch]:
    logp = (-3 * torch.rand(T, dtype=torch.float64)).requires_grad_()
    near = lambda: logp.detach() + 0.3 * torch.randn(T, dtype=torch.float64)  # noqa: E731
    target = torch.where(KEPT, 1, -100)
    advantage = torch.tensor([1.0, -0.5, 0.25, -2.0], dtype=torch.float64)
    return fp.Stats(logp=logp), fp.Batch(target, LENGTHS, old_logp=near(), ref_logp=near(), advantage=advantage)


def padded(x: Tensor) -> Tensor:  # (T,) -> (4, 4), zero where nothing is kept
    """As the padded libraries hold it: a row for each sequence, its kept tokens only."""
    return torch.stack([F.pad(part[:-1], (0, 5 - len(part))) for part in x.split(LENGTHS.tolist())])


# ---- by hand ----


def test_sft():
    stats, batch = setting()
    torch.testing.assert_close(losses.sft(stats, batch), torch.where(KEPT, -stats.logp, 0.0))


def test_sft_with_label_smoothing_is_torchs():
    logits, target = torch.randn(5, 9, dtype=torch.float64), torch.randint(0, 9, (5,))
    logp = logits.log_softmax(1)
    stats = fp.Stats(logp=logp.gather(1, target[:, None])[:, 0], mean_logp=logp.mean(1))
    got = losses.sft(stats, fp.Batch(target, torch.tensor([5])), label_smoothing=0.2)
    torch.testing.assert_close(got, F.cross_entropy(logits, target, reduction="none", label_smoothing=0.2))


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "slope"),
    [  # clipped where the ratio has gone far enough in the direction that the advantage asks for, and only there
        (1.1, 1.0, -1.1, -1.1),
        (1.5, 1.0, -1.3, 0.0),
        (1.5, -1.0, 1.5, 1.5),
        (0.5, 1.0, -0.5, -0.5),
        (0.5, -1.0, 0.8, 0.0),
        (0.9, -2.0, 1.8, 1.8),
    ],
)
def test_grpo_clips_on_one_side_and_higher_above(ratio, advantage, loss, slope):
    logp = torch.tensor([math.log(ratio) - 5.0], dtype=torch.float64, requires_grad=True)
    one = lambda x: torch.tensor([x], dtype=torch.float64)  # noqa: E731
    batch = fp.Batch(torch.tensor([1]), torch.tensor([1]), old_logp=one(-5.0), advantage=one(advantage))
    got = losses.grpo(fp.Stats(logp=logp), batch, epsilon=0.2, epsilon_high=0.3)
    torch.testing.assert_close(got, one(loss))
    torch.testing.assert_close(torch.autograd.grad(got.sum(), logp)[0], one(slope))


@pytest.mark.parametrize("loss", [losses.grpo, losses.gspo])
def test_without_old_logp_the_policy_is_its_own_behaviour(loss):
    """The ratio is one, its gradient is not: policy gradient."""
    stats, batch = setting()
    got = loss(stats, replace(batch, old_logp=None))
    kept = {"token": KEPT, "sequence": torch.ones(4, dtype=torch.bool)}[loss.unit]
    advantage = batch.advantage if loss.unit == "token" else batch.per_sequence(batch.advantage) / LENGTHS
    torch.testing.assert_close(got, torch.where(kept, -advantage, 0.0))
    (gradient,) = torch.autograd.grad(got.sum(), stats.logp)
    share = 1 if loss.unit == "token" else 1 / batch.spread(LENGTHS - 1.0)
    torch.testing.assert_close(gradient, torch.where(KEPT, -batch.advantage * share, 0.0))


def test_gspo_is_the_sequences_mean_ratio():
    stats, batch = setting()
    mean = (padded(stats.logp - batch.old_logp).sum(1) / (LENGTHS - 1)).exp()
    advantage = torch.tensor([1.0, -0.5, 0.25, -2.0], dtype=torch.float64)
    want = -torch.minimum(mean * advantage, mean.clamp(0.95, 1.05) * advantage)
    torch.testing.assert_close(losses.gspo(stats, batch, epsilon=0.05), want)


def test_dpo():
    stats, batch = setting()
    gain = padded(stats.logp - batch.ref_logp).sum(1)
    margin = 0.3 * (gain[0::2] - gain[1::2])
    want = -0.9 * F.logsigmoid(margin) - 0.1 * F.logsigmoid(-margin)
    torch.testing.assert_close(losses.dpo(stats, batch, beta=0.3, label_smoothing=0.1), want)


def test_dpo_of_labels_that_are_not_all_as_sure():
    stats, batch = setting()
    p = torch.tensor([0.9, 0.5], dtype=torch.float64)
    each = [losses.dpo(stats, batch, beta=0.3, label_smoothing=e)[i] for i, e in enumerate((0.1, 0.5 - 1e-12))]
    found = losses.dpo(stats, replace(batch, probability=p), beta=0.3)
    torch.testing.assert_close(found, torch.stack(each))
    still = replace(batch, probability=p, ref_logp=stats.logp.detach())
    (gradient,) = torch.autograd.grad(losses.dpo(stats, still).sum(), stats.logp)
    unsure = batch.spread(torch.tensor([0, 0, 1, 1])) == 1
    assert not gradient[unsure].any() and gradient[~unsure & KEPT].all()


def test_dpo_of_a_policy_that_has_not_moved_is_log_2():
    stats, batch = setting()
    still = replace(batch, ref_logp=stats.logp.detach())
    assert torch.equal(losses.dpo(stats, still), torch.full((2,), math.log(2), dtype=torch.float64))


def test_dpo_of_a_pair_of_twins_is_log_2_through_the_head_too():
    hidden, weight = torch.randn(10, 8), torch.randn(50, 8)
    target = torch.randint(0, 50, (10,))
    batch = fp.Batch(target.repeat(2), torch.tensor([10, 10]), ref_logp=torch.full((20,), -1.5))
    got = fp.fused_loss(losses.dpo, hidden.repeat(2, 1).requires_grad_(), weight, batch, beta=5.0)
    torch.testing.assert_close(got, torch.tensor(math.log(2)))


def test_estimators_of_kl():
    p, q = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64), torch.tensor([0.4, 0.4, 0.2], dtype=torch.float64)
    logp, logq, exact = p.log(), q.log(), (p * (p / q).log()).sum()
    torch.testing.assert_close((p * kl.k1(logp, logq)).sum(), exact)
    torch.testing.assert_close((p * kl.k3(logp, logq)).sum(), exact)
    torch.testing.assert_close(kl.k2(logp, logq), (p / q).log().square() / 2)
    assert (kl.k3(logp, logq) >= 0).all() and (kl.k1(logp, logq) < 0).any()


def test_the_gradient_of_k2_is_that_of_kl():
    logits = torch.randn(5, dtype=torch.float64, requires_grad=True)
    logq = torch.randn(5, dtype=torch.float64).log_softmax(0)
    logp = logits.log_softmax(0)
    (want,) = torch.autograd.grad((logp.exp() * (logp - logq)).sum(), logits, retain_graph=True)
    (got,) = torch.autograd.grad((logp.exp().detach() * kl.k2(logp, logq)).sum(), logits)
    torch.testing.assert_close(got, want)


def test_k3_keeps_its_digits_where_policy_and_reference_nearly_agree():
    """exp(r) - r - 1 in fp32 is all rounding at r = 1e-4, and negative as often as not."""
    logp = torch.full((7,), -2.0)
    log_ratio = torch.tensor([1e-4, -1e-4, 3e-4, 1e-3, -1e-3, 0.0, 1e-2])
    moved = logp + log_ratio
    exact = (moved.double() - logp.double()).expm1() - (moved.double() - logp.double())
    # expm1(r) is rounded to an ulp of itself, which is about r; what is subtracted then is exact.
    allowed = torch.finfo(torch.float32).eps * log_ratio.abs()
    assert ((kl.k3(logp, moved).double() - exact).abs() <= allowed).all()


# ---- declarations ----

NAMED = {"sft": losses.sft, "grpo": losses.grpo, "gspo": losses.gspo, "dpo": losses.dpo}
UNITS = {"sft": "token", "grpo": "token", "gspo": "sequence", "dpo": "pair"}


@pytest.mark.parametrize("name", NAMED)
def test_each_says_what_it_reads_and_is_documented(name):
    loss = NAMED[name]
    assert (loss.name, loss.unit, loss.reads, loss.differentiates) == (name, UNITS[name], ("logp",), ("logp",))


@pytest.mark.parametrize("name", NAMED)
def test_a_unit_whose_tokens_are_all_ignored_is_zero_whatever_its_fields_hold(name):
    stats, batch = setting()
    target = batch.target.clone()
    target[SECOND:] = -100
    for field in ("old_logp", "ref_logp", "advantage"):
        getattr(batch, field)[SECOND:] = torch.nan
    knobs = {"epsilon": 0.9} if name == "gspo" else {}
    got = NAMED[name](stats, replace(batch, target=target), **knobs)
    gone = {"token": slice(SECOND, None), "sequence": slice(2, None), "pair": slice(1, None)}[NAMED[name].unit]
    assert not got[gone].any() and got.isfinite().all()
    (gradient,) = torch.autograd.grad(got.sum(), stats.logp)
    assert not gradient[SECOND:].any() and gradient[:SECOND].any() and gradient.isfinite().all()


def test_a_loss_of_ones_own_is_declared_in_two_lines():
    @fp.loss(unit="token", reads=("logp", "entropy", "top1"))
    def mine(stats: fp.Stats, batch: fp.Batch, *, scale: float = 1.0) -> Tensor:
        """Surprise of the tokens that were not the likeliest."""
        return -scale * stats.logp * ~stats.top1 - 0.01 * stats.entropy

    assert mine.differentiates == ("logp", "entropy")  # top1 has no gradient
    hidden, weight = torch.randn(12, 8, requires_grad=True), torch.randn(30, 8, requires_grad=True)
    batch = fp.Batch(torch.randint(0, 30, (12,)), torch.tensor([12]))
    total, stats = fp.fused_loss(mine, hidden, weight, batch, scale=2.0, return_stats=True)
    torch.testing.assert_close(total, mine(stats, batch, scale=2.0).mean())


DECLARATIONS = [
    ({"unit": "word"}, "unit must be 'token', 'sequence', 'pair' or 'batch', got 'word'"),
    ({"unit": "token", "reads": ("logpp",)}, r"unknown statistic 'logpp' \(did you mean 'logp'\?\)"),
    ({"unit": "token", "reads": ("logp", "top1"), "differentiates": ("top1",)}, "top1"),
    ({"unit": "token", "reads": ("logp",), "differentiates": ("entropy",)}, "entropy"),
]


@pytest.mark.parametrize(("declaration", "message"), DECLARATIONS)
def test_a_wrong_declaration_is_refused(declaration, message):
    with pytest.raises(ValueError, match=message):
        fp.loss(**declaration)
