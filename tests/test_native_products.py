"""The products of csrc/, alone and within a head, with every instruction set of this CPU and both dtypes it takes."""

from __future__ import annotations

import pytest
import torch

import fastpost as fp
from problems import DIVERGENCES, OWN, assert_exact, assert_loss_exact, problem
from rules import assert_close_to_truth

# (the reason says which: it was not built, or for other sources)
pytest.importorskip("fastpost.core.native", exc_type=ImportError)

from fastpost.core import native

EPS = torch.finfo(torch.float32).eps
KINDS = [(isa, torch.bfloat16) for isa in native.ISAS]
KINDS += [(isa, torch.float32) for isa in native.ISAS if isa != native.PAIRS]


@pytest.fixture(params=KINDS, ids=lambda kind: f"{kind[0]} {kind[1]}")
def dtype(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.dtype:
    """Of operands that are multiplied with one instruction set alone."""
    isa, dtype = request.param
    monkeypatch.setattr(native, "ISAS", [isa])
    return dtype


def bound(terms: int, size: torch.Tensor) -> torch.Tensor:
    """On the error of any order of so many additions, of sizes that sum to `size`."""
    return terms * EPS * size


@pytest.mark.parametrize("logits", [True, False], ids=["short sums", "long sums"])
@pytest.mark.parametrize("accumulate", [False, True], ids=["written", "added"])
@pytest.mark.parametrize(
    ("M", "N", "K"), [(1, 1, 1), (12, 32, 32), (13, 33, 3), (96, 64, 1), (25, 200, 515), (11, 31, 1100)]
)
def test_a_product_is_exact_to_fp32(M, N, K, accumulate, logits, dtype):
    """Of any shape, and of operands that lie along either dimension."""
    for a in (torch.randn(M, K).to(dtype), torch.randn(K, M).to(dtype).T):
        for b in (torch.randn(K, N).to(dtype), torch.randn(N, K).to(dtype).T):
            before = torch.randn(M, N + 3)
            out = before.clone()
            native.product(a, b, out[:, :N], accumulate, logits)
            truth = a.double() @ b.double() + (before[:, :N] if accumulate else 0)
            plain = a.float() @ b.float() + (before[:, :N] if accumulate else 0)
            if logits:
                assert_close_to_truth(out[:, :N], plain, truth, "product")
            else:  # operands of gradients are off by the rounding of their dtype already
                size = a.double().abs() @ b.double().abs() + before[:, :N].abs()
                assert bool(((out[:, :N] - truth).abs() <= bound(K, size)).all())
            assert torch.equal(out[:, N:], before[:, N:])


@pytest.mark.parametrize(("R", "columns", "D"), [(1, 1, 1), (25, 200, 33), (96, 12, 96), (3, 700, 40), (1100, 31, 8)])
def test_the_gradient_of_a_block_of_the_weight(R, columns, D, dtype):
    """Written or added to in fp32; of bf16 rounded once to it, even where its operand lies in the way."""
    hidden, room = torch.randn(R, D).to(dtype), torch.empty(max(R, D) * columns).to(dtype)
    inside = room[: R * columns].view(R, columns).copy_(torch.randn(R, columns))
    apart, across = inside.clone(), native.pack_across(hidden)
    written, added = torch.full((columns, D), torch.nan), torch.randn(columns, D)
    before, summed = added.clone(), apart.double().T @ hidden.double()
    native.weight_block(apart, across, written, True)
    native.weight_block(apart, across, added, False)
    most = bound(R, apart.double().abs().T @ hidden.double().abs() + before.abs())
    assert bool(((written - summed).abs() <= most).all())
    assert bool(((added - before - summed).abs() <= most).all())
    for left, place in ((apart, torch.empty_like(room)), (inside, room)):
        rounded = place[: columns * D].view(columns, D)
        native.weight_block(left, across, rounded, True)
        assert torch.equal(rounded, written.to(dtype))


def test_statistics_and_their_gradients(dtype):
    p = problem(dtype, T=40, D=24, V=1500, bias=True, softcap=9.0, scale=0.8, temperature=0.7)
    assert_exact(p, OWN)


def test_divergences_and_their_gradients(dtype):
    q = problem(dtype, T=40, D=17, V=1500)
    assert_exact(problem(dtype, T=40, D=24, V=1500, reference=(q.hidden.detach(), q.head)), DIVERGENCES)


@pytest.mark.parametrize("train_head", [False, True], ids=["frozen", "trained"])
@pytest.mark.parametrize("loss", [fp.losses.sft, fp.losses.reinforce], ids=lambda loss: loss.name)
def test_a_loss_and_its_gradients(loss, train_head, dtype):
    p = problem(dtype, T=40, D=24, V=1500).to(dtype, train_head=train_head)
    batch = fp.Batch(p.target, torch.tensor([25, 15]), advantage=torch.randn(40), weight=torch.rand(40))
    total = fp.fused_loss(loss, p.hidden, p.head, batch)
    assert isinstance(total, torch.Tensor)
    assert_loss_exact(total, loss, p, batch)


def test_the_number_of_threads_changes_no_bit_of_a_call(dtype):
    hidden, weight = torch.randn(150, 40).to(dtype), torch.randn(2100, 40).to(dtype)
    target, threads, found = torch.randint(2100, (150,)), torch.get_num_threads(), []
    reference, batch = (hidden.flip(0), fp.Head(weight.flip(0))), fp.Batch(target, torch.tensor([150]))
    try:
        for n in (1, 2):
            torch.set_num_threads(n)
            leaves = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
            stats = fp.token_stats(*leaves, target, outputs=("logp", "entropy", "jsd"), reference=reference)
            total = (stats.logp - stats.entropy + stats.jsd).sum()
            found.append([stats.logp, stats.jsd, *torch.autograd.grad(total, leaves)])
            for loss, other in ((fp.losses.sft, None), (fp.losses.gkd, reference)):
                found[-1] += torch.autograd.grad(fp.fused_loss(loss, *leaves, batch, reference=other), leaves)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


def test_operands_that_it_cannot_read_are_refused(dtype):
    x = torch.randn(4, 8).to(dtype)
    with pytest.raises(RuntimeError, match=r"an operand must be a bf16 or fp32 matrix .* got Double \[8, 4\]"):
        native.product(x, x.double().T, torch.empty(4, 4), False, True)
    with pytest.raises(RuntimeError, match=r"with one stride of 1, got \w+ \[4, 4\] with strides \[8, 2\]"):
        native.product(x[:, ::2], x.T, torch.empty(4, 4), False, True)
    with pytest.raises(RuntimeError, match=r"left \[4, 8\] and right \[4, 4\] do not fit"):
        native.product(x, x[:, :4], torch.empty(4, 4), False, True)
    with pytest.raises(RuntimeError, match="a bf16 dweight must be fresh"):
        native.weight_block(x, native.pack_across(x), torch.empty(8, 8).bfloat16(), False)
    with pytest.raises(RuntimeError, match="hidden must be packed across, with 4 rows and 40 columns, got 4 and 8"):
        native.weight_block(x, native.pack_across(x), torch.empty(8, 40), True)


def test_pairs_are_made_of_bf16_alone():
    if native.PAIRS not in native.ISAS:
        pytest.skip("this CPU does not multiply pairs of bf16")
    x = torch.randn(4, 8).bfloat16()
    with pytest.raises(RuntimeError, match=f"an operand of {native.PAIRS} must be bf16, got fp32"):
        native.product(x, x.float().T, torch.empty(4, 4), False, True)
