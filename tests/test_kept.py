"""The eager schedule of a loss of logp alone: gradients from the exponentials that the statistics left."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

import fastpost as fp
from catalogue import CASES
from fastpost import losses
from fastpost.core import eager
from fastpost.core.rows import TorchRows
from problems import Problem, assert_loss_exact, problem, schedules_of, small_tiles
from test_workspace import MB, WORKSPACE, bytes_of, peak

T, D, V = 24, 72, 200


def setting(
    dtype: torch.dtype = torch.float32, loss: fp.Loss = losses.ppo, *, train_head: bool = True, **options
) -> tuple[Problem, fp.Batch]:
    """One chunk of it fits where dW will be: T numbers are no wider than D. Some targets are ignored."""
    p = problem(dtype, T=T, D=D, V=V, **options).to(dtype, train_head=train_head)
    with torch.no_grad():
        logp = fp.linear_logprobs(p.hidden, p.head, p.target, temperature=p.temperature).float()
    batch = fp.Batch(
        p.target.masked_fill(torch.arange(T) % 7 == 2, -100),
        torch.tensor([6, 3, 9, 6]),
        ref_logp=logp + 0.2 * torch.randn(T),
        old_logp=logp + 0.2 * torch.randn(T),
        advantage=torch.randn(4),
        label=torch.arange(4) % 2 == 0,
        kl=torch.tensor(0.1),
    )
    return p, replace(batch, weight=torch.rand(batch.units(loss.unit)) + 0.5)


@pytest.fixture(autouse=True)
def kept(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Grows by whether it was in place of dW, with each chunk of what is kept."""
    seen, keep_chunk = [], eager.keep_chunk

    def watched(s, chunk, kept, stats, dlogp, totals) -> None:
        seen.append(totals.weight is not None and kept.room.data_ptr() == totals.weight.data_ptr())
        keep_chunk(s, chunk, kept, stats, dlogp, totals)

    monkeypatch.setattr(eager, "keep_chunk", watched)
    return seen


def of(loss: fp.Loss, p: Problem, batch: fp.Batch) -> Tensor:
    return fp.fused_loss(loss, p.hidden, p.head, batch, temperature=p.temperature)


OPTIONS = {
    "plain": {},
    "bias": {"bias": True},
    "softcap": {"softcap": 3.0},
    "scale": {"scale": 0.3},
    "a temperature": {"temperature": 0.7},
    "all": {"bias": True, "softcap": 3.0, "scale": 0.3, "temperature": 0.7},
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [4096, 7], ids=["in place of dW", "in chunks"])
@pytest.mark.parametrize("in_torch", [False, True], ids=["native", "torch"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_it_is_exact(options, in_torch, rows, dtype, kept, monkeypatch):
    if in_torch:
        monkeypatch.setattr("fastpost.core.sweep.row_kernels", lambda device, dtype: TorchRows())
        monkeypatch.setattr("fastpost.core.gemm.native_products", lambda dtype, device: None)
    small_tiles(monkeypatch, columns=64, rows=rows)
    p, batch = setting(dtype, **options)
    total = of(losses.ppo, p, batch)
    assert kept == ([True] if rows > T else 3 * [False])
    assert_loss_exact(total, losses.ppo, p, batch)


@pytest.mark.parametrize("name", [name for name in CASES if CASES[name][0].unit != "token"])
def test_units_of_any_size_fit_one_chunk(name, kept):
    loss, knobs = CASES[name]
    if loss.bind(**knobs).differentiates != ("logp",):
        pytest.skip("more than logp carries a gradient")
    p, batch = setting(loss=loss)
    total = fp.fused_loss(loss, p.hidden, p.head, batch, temperature=p.temperature, **knobs)
    assert isinstance(total, Tensor) and kept == [True]
    assert_loss_exact(total, loss, p, batch, **knobs)


def test_it_is_for_logp_alone(kept):
    p, batch = setting()
    for loss in (losses.grpo.bind(entropy_coef=0.1), losses.sft.bind(label_smoothing=0.1)):
        assert schedules_of(of(loss, p, batch)) == {"EagerLoss"} and not kept
    of(losses.sft, p, batch)
    assert kept == [True]


def test_a_confident_target_keeps_the_digits_of_one_minus_p(kept):
    """p = 1 - 1e-4, which bf16 rounds to 1: its gradient is small, and not zero."""
    hidden = torch.zeros(4, 16, dtype=torch.bfloat16)
    hidden[:, 0] = 1
    weight = torch.zeros(300, 16, dtype=torch.bfloat16)
    weight[7, 0] = 15
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    target = torch.full((4,), 7)
    total = fp.fused_loss(losses.sft, *leaves, fp.Batch(target, torch.tensor([4])))
    assert kept == [True]
    found = torch.autograd.grad(total, leaves)
    wide = [x.detach().double().requires_grad_() for x in leaves]
    want = torch.autograd.grad(torch.nn.functional.cross_entropy(wide[0] @ wide[1].T, target), wide)
    for one, truth in zip(found, want, strict=True):
        assert (one - truth).norm() <= torch.finfo(torch.bfloat16).eps * truth.norm()


@pytest.mark.parametrize("rows", [4096, 7], ids=["in place of dW", "in chunks"])
@pytest.mark.parametrize("trained", [True, False], ids=["all", "adapters alone"])
def test_with_a_lora_on_the_head(trained, rows, kept, monkeypatch):
    small_tiles(monkeypatch, columns=64, rows=rows)
    p, batch = setting(train_head=trained, ranks=(3, 2), bias=True)
    total = of(losses.ppo, p, batch)
    assert kept == ([trained] if rows > T else 3 * [False])
    assert_loss_exact(total, losses.ppo, p, batch)


def test_backward_twice_gives_the_same_and_leaves_what_is_kept_alone():
    p, batch = setting(torch.bfloat16)
    total = of(losses.sft, p, batch)
    leaves = (p.hidden, p.head.weight)
    first = torch.autograd.grad(3 * total, leaves, retain_graph=True)
    first = [x.clone() for x in first]
    for x in torch.autograd.grad(3 * total, leaves, retain_graph=True):
        x.zero_()
    again = torch.autograd.grad(3 * total, leaves)
    assert all(torch.equal(*pair) for pair in zip(first, again, strict=True))


def test_nothing_kept_and_nothing_carried_are_zeros():
    p, batch = setting()
    nothing = replace(batch, target=torch.full((T,), -100))
    for total in (of(losses.sft, p, nothing), 0 * of(losses.sft, p, batch)):
        for x in torch.autograd.grad(total, (p.hidden, p.head.weight)):
            assert torch.equal(x, torch.zeros_like(x))


def test_in_one_chunk_no_gradient_of_the_weight_is_made_but_that_which_is_returned():
    T, D, V = 256, 256, 65_536
    hidden = torch.randn(T, D).bfloat16().requires_grad_()
    weight = torch.randn(V, D).bfloat16().requires_grad_()
    batch = fp.Batch(torch.randint(V, (T,)), torch.tensor([T]))
    most = peak(lambda: fp.fused_loss(losses.sft, hidden, weight, batch).backward())
    allowed = 2 * bytes_of(weight) + 2 * bytes_of(hidden)  # as kept, and as returned
    assert most <= WORKSPACE + allowed < WORKSPACE + bytes_of(weight) + bytes_of(weight, wide=True), (
        f"{most / MB:.1f} MB"
    )
