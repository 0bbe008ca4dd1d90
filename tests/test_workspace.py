"""What the head holds and how exact it is at the size of a real vocabulary: DESIGN 4.2, measured."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import fastpost as fp
from fastpost import losses

MB = 1 << 20
WORKSPACE = 64 * MB


def peak(function: Callable[[], object]) -> int:
    """The most bytes that the CPU allocator had handed out at one time during a call, beyond what there was before."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function()
    held = most = 0
    events = profile.profiler.kineto_results.events()
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def test_the_measure_sees_what_is_freed_again():
    def function() -> Tensor:
        x = torch.empty(8 * MB, dtype=torch.uint8)
        del x
        return torch.empty(4 * MB, dtype=torch.uint8)

    assert 8 * MB <= peak(function) < 8.1 * MB


def setting(T: int, V: int, D: int = 64, *, train_head: bool = True) -> tuple[Tensor, Tensor, fp.Batch]:
    hidden = torch.randn(T, D, dtype=torch.bfloat16).requires_grad_()
    weight = torch.randn(V, D, dtype=torch.bfloat16).requires_grad_(train_head)
    return hidden, weight, fp.Batch(torch.randint(0, V, (T,)), torch.tensor([T]), advantage=torch.ones(T))


# The (T, V) logits alone, in fp32, would be 16, 256 and 64 MB, and their gradients as much again.
SIZES = [(256, 16_384), (4096, 16_384), (256, 65_536)]


def bytes_of(*tensors: Tensor, wide: bool = False) -> int:
    return sum(x.numel() * (4 if wide else x.itemsize) for x in tensors)


def run(schedule: str, T: int, V: int, D: int = 64) -> tuple[int, int]:
    """(peak, what may be held besides the workspace)."""
    hidden, weight, batch = setting(T, V, D, train_head=schedule not in ("frozen", "statistics"))

    def function() -> object:
        if schedule == "statistics":
            with torch.no_grad():
                return fp.token_stats(hidden, weight, batch.target, outputs=("logp", "entropy", "top1"))
        if schedule == "lazy":
            stats = fp.token_stats(hidden, weight, batch.target, outputs=("logp", "entropy"))
            return (stats.logp + stats.entropy).sum().backward()
        return fp.fused_loss(losses.grpo, hidden, weight, batch).backward()

    returned = bytes_of(hidden, weight)
    allowed = {
        "statistics": 0,
        "frozen": bytes_of(hidden, hidden),  # U, and the gradient
        "eager": returned + bytes_of(hidden) + bytes_of(weight, wide=True),  # dX is kept until it is returned
        "lazy": returned + bytes_of(weight, wide=True),
    }
    return peak(function), allowed[schedule]


def assert_bounded(most: int, allowed: int) -> None:
    assert most <= WORKSPACE + allowed, f"{most / MB:.1f} MB, of which {allowed / MB:.1f} may be gradients"


@pytest.mark.parametrize(("T", "V"), SIZES)
@pytest.mark.parametrize("schedule", ["statistics", "frozen", "eager", "lazy"])
def test_the_workspace_is_64_mb_at_any_size(schedule, T, V):
    assert_bounded(*run(schedule, T, V))


@pytest.mark.parametrize("schedule", ["frozen", "eager", "lazy"])
def test_the_workspace_is_64_mb_where_rows_are_wide(schedule):
    """Hidden states of 32 MB, 64 in fp32, beside a small vocabulary: what is held a row shows."""
    assert_bounded(*run(schedule, 4096, 2000, 4096))


@pytest.mark.parametrize(("held", "limit"), [((), 64), (("jsd",), 200)], ids=["streamed", "held"])
def test_with_every_statistic_and_a_reference_it_is_bounded_too(held, limit):
    """The JSD alone holds whole rows."""
    hidden, weight, batch = setting(1024, 65_536)
    q = torch.randn(1024, 48, dtype=torch.bfloat16), torch.randn(65_536, 48, dtype=torch.bfloat16)
    names = ("logp", "entropy", "reverse_kl", "forward_kl", "log_sum_sq", "mean_logp", "top1", "logp@1", *held)
    with torch.no_grad():
        most = peak(lambda: fp.token_stats(hidden, weight, batch.target, outputs=names, reference=q, temperature=0.7))
    assert most <= limit * MB, f"{most / MB:.1f} MB"


def test_rows_that_are_held_for_a_loss_are_bounded_too():
    """Logits of 512 MB in fp32, which become gradients in their place."""
    hidden, weight, batch = setting(2048, 65_536, train_head=False)
    most = peak(lambda: fp.fused_loss(losses.grpo, hidden, weight, batch, entropy_coef=0.1).backward())
    assert most <= 200 * MB + bytes_of(hidden, hidden), f"{most / MB:.1f} MB"


def test_a_log_probability_is_right_to_1e_5():
    """bf16 operands, logits of standard deviation 3, a vocabulary of 131072; rounding the logits to bf16 costs 2e-2."""
    T, D, V = 1024, 1024, 131_072
    hidden = torch.randn(T, D).bfloat16()
    weight = torch.empty(V, D, dtype=torch.bfloat16).normal_(0, 3 / D**0.5)
    target = torch.randint(0, V, (T,))
    with torch.no_grad():
        logp = fp.linear_logprobs(hidden, weight, target)
    wide, total = hidden.double(), torch.zeros(T, dtype=torch.float64)
    for block in weight.split(8192):
        total += (wide @ block.double().T).exp_().sum(1)  # logits are below 20: nothing overflows
    truth = (wide * weight[target].double()).sum(1) - total.log()
    assert 2.9 < float(truth.std()) < 3.1
    worst = float((logp - truth).abs().max())
    assert worst <= 1e-5, f"{worst:.1e}"
