"""A LoRA on the head in each schedule: the loss and its gradients against float64, their bits, and what they cost."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

import fastpost as fp
from fastpost import losses
from fastpost.types import LowRank
from flops import products
from loss_problems import distant
from problems import Problem, assert_loss_exact, gradients, ours, schedules_of, small_tiles, theirs
from rules import assert_close_to_truth, assert_gradient_close_to_truth
from test_lora_head import HALF, ONE, lora_problem, with_reference
from test_workspace import MB, WORKSPACE, bytes_of, peak

LOSSES = {
    "sft": (losses.sft, {}),
    "grpo": (losses.grpo, {"beta": 0.04}),
    "gspo": (losses.gspo, {}),
    "dpo": (losses.dpo, {}),
    "distant": (distant, {}),
}
LENGTHS = torch.tensor([9, 20, 3, 16])


def setting(
    loss: fp.Loss, dtype: torch.dtype = torch.float32, lora: torch.dtype | None = None, **traits: object
) -> tuple[Problem, fp.Batch]:
    T = int(LENGTHS.sum())
    p = with_reference(lora_problem(dtype, lora=lora, **({"T": T, "bias": True, "temperature": 0.75} | traits)))
    with torch.no_grad():
        logp = ours(p, ["logp"]).logp.float()
    target = p.target.index_fill(0, torch.tensor([0, 8, 9, 30]), -100)
    batch = fp.Batch(
        target,
        LENGTHS,
        old_logp=logp + 0.2 * torch.randn(T),
        ref_logp=logp + 0.2 * torch.randn(T),
        advantage=torch.randn(4),
    )
    units = batch.units(loss.unit)
    return p, replace(batch, weight=(torch.rand(units) + 0.5) / units)


def fused(loss: fp.Loss, p: Problem, batch: fp.Batch, **knobs: object) -> Tensor:
    needs = {"reference": p.reference} if "reverse_kl" in loss.reads else {}
    return fp.fused_loss(loss, p.hidden, p.head, batch, temperature=p.temperature, **needs, **knobs)


@pytest.mark.parametrize(
    ("dtype", "lora"),
    [(torch.float32, None), (torch.bfloat16, None), (torch.bfloat16, torch.float32), (torch.float16, torch.float32)],
    ids=str,
)
@pytest.mark.parametrize("schedule", ["EagerLoss", "LazyStats", "FrozenLogp"])
@pytest.mark.parametrize("case", LOSSES)
def test_every_schedule_is_exact(case, schedule, dtype, lora, monkeypatch):
    loss, knobs = LOSSES[case]
    if (schedule, case) in {("FrozenLogp", "distant"), ("LazyStats", "sft"), ("LazyStats", "grpo")}:
        pytest.skip("this loss never takes that schedule")
    if (schedule, dtype) == ("EagerLoss", torch.float16):
        pytest.skip("fp16 never takes that schedule: its loss scale comes with the gradient from above")
    p, batch = setting(loss, dtype, lora)
    p.head.lora[0].b.requires_grad_(schedule != "FrozenLogp")
    small_tiles(monkeypatch, rows=5 if schedule == "LazyStats" else 40)
    total = fused(loss, p, batch, **knobs)
    assert schedules_of(total) == {schedule}
    assert_loss_exact(total, loss, p, batch, case, **knobs)


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("schedule", ["EagerLoss", "LazyStats", "FrozenLogp"])
def test_under_autocast_operands_are_those_of_linear_and_gradients_have_the_leafs_dtype(schedule, dtype, monkeypatch):
    p, batch = setting(losses.gspo, bias=False)
    p.head.lora[0].b.requires_grad_(schedule != "FrozenLogp")
    small_tiles(monkeypatch, rows=5 if schedule == "LazyStats" else 40)
    rounded, same = p.to(dtype), p.to(torch.float32, train_head=False)
    truth = rounded.to(torch.float64, train_head=False)
    with torch.autocast("cpu", dtype):
        total, yardstick = fused(losses.gspo, p, batch), plain_gspo(same, batch)
    lazy = schedule == "EagerLoss" and dtype == torch.float16  # whose loss scale comes with the gradient from above
    assert schedules_of(total) == {"LazyStats" if lazy else schedule}
    want = plain_gspo(truth, batch)
    assert_close_to_truth(total, plain_gspo(rounded.to(torch.float32), batch), want)
    got, truths, yardsticks = gradients(total, ONE, p), gradients(want, ONE, truth), gradients(yardstick, ONE, same)
    for leaf, gradient in got.items():
        assert gradient.dtype == torch.float32
        assert_gradient_close_to_truth(gradient, yardsticks[leaf], truths[leaf], leaf)


def plain_gspo(p: Problem, batch: fp.Batch) -> Tensor:
    stats = theirs(replace(p, target=batch.target.clamp(min=0)))
    return (losses.gspo(stats, batch) * batch.weight.to(stats.logp.dtype)).sum()


@pytest.mark.parametrize("schedule", ["EagerLoss", "LazyStats", "FrozenLogp"])
def test_it_is_fp32_whatever_the_process_has_set_and_the_same_bits_each_time(schedule, monkeypatch):
    p, batch = setting(losses.gspo)
    p.head.lora[0].b.requires_grad_(schedule != "FrozenLogp")
    small_tiles(monkeypatch, rows=5 if schedule == "LazyStats" else 40)

    def everything() -> list[Tensor]:
        total = fused(losses.gspo, p, batch)
        return [total, *gradients(total, ONE, p).values(), *gradients(total, ONE, p).values()]

    want, before = everything(), torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        got = everything()
    finally:
        torch.set_float32_matmul_precision(before)
    assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))
    n = len(p.leaves)
    assert all(torch.equal(x, y) for x, y in zip(want[1 : 1 + n], want[1 + n :], strict=True))


@pytest.mark.parametrize("schedule", ["EagerLoss", "LazyStats", "FrozenLogp"])
def test_double_backward_is_refused(schedule, monkeypatch):
    """Through the low-rank product too, where A alone trains and hidden does not."""
    p, batch = setting(losses.gspo)
    p.head.lora[0].b.requires_grad_(schedule != "FrozenLogp")
    p.hidden.requires_grad_(False)
    small_tiles(monkeypatch, rows=5 if schedule == "LazyStats" else 40)
    (gradient,) = torch.autograd.grad(fused(losses.gspo, p, batch), p.head.lora[0].a, create_graph=True)
    with pytest.raises(RuntimeError, match="the head is differentiable once"):
        gradient.square().sum().backward()


# ---- cost ----

ROWS, WIDTH, WORDS, RANK = 32, 24, 300, 3
G, LOW, HIGH = 2 * ROWS * WIDTH * WORDS, 2 * ROWS * RANK * WIDTH, 2 * ROWS * RANK * WORDS

COSTS = [
    # loss, rows a chunk, what trains, flop
    (losses.sft, 4096, "hidden a b", 2 * G + 3 * HIGH + 3 * LOW),
    (losses.sft, 4096, "hidden b", 2 * G + 2 * HIGH + LOW + HIGH + LOW),
    (losses.sft, 4096, "a b", G + 3 * HIGH + 2 * LOW),
    (losses.sft, 4096, "b", G + 2 * HIGH + LOW),
    (losses.sft, 4096, "", G + HIGH + LOW),
    (losses.sft, 4096, "hidden a", 2 * G + 2 * HIGH + 3 * LOW),  # frozen
    (losses.gspo, 16, "hidden a b", 2 * G + 3 * HIGH + 3 * LOW),
    (losses.gspo, 15, "hidden a b", 3 * G + 4 * HIGH + 3 * LOW),
    (losses.gspo, 16, "hidden a b weight", 3 * G + 3 * HIGH + 3 * LOW),
    (losses.gspo, 15, "hidden a b weight", 4 * G + 4 * HIGH + 3 * LOW),
]


@pytest.mark.parametrize(("loss", "rows", "trained", "flop"), COSTS)
def test_the_adapter_costs_only_its_own_products(loss, rows, trained, flop, monkeypatch):
    small_tiles(monkeypatch, rows=rows)
    make = lambda name, *shape: torch.randn(*shape, requires_grad=name in trained.split())  # noqa: E731
    lora = LowRank(make("a", RANK, WIDTH), make("b", WORDS, RANK), 2.0)
    head, hidden = fp.Head(make("weight", WORDS, WIDTH), lora=(lora,)), make("hidden", ROWS, WIDTH)
    batch = fp.Batch(torch.randint(0, WORDS, (ROWS,)), torch.tensor([16, 16]), advantage=torch.ones(2))
    assert products(lambda: fp.fused_loss(loss, hidden, head, batch)) == flop


@pytest.mark.parametrize(("T", "V"), [(256, 16_384), (4096, 16_384), (256, 65_536)])
@pytest.mark.parametrize("schedule", ["eager", "lazy", "frozen", "statistics"])
def test_no_gradient_of_the_weight_is_allocated_and_the_workspace_is_64_mb(schedule, T, V):
    """A dW, a merged weight or a [W, B] would be 16, 16 and 64 MB more."""
    D, r = 256, 8
    hidden = torch.randn(T, D, dtype=torch.bfloat16).requires_grad_(schedule != "statistics")
    weight = torch.randn(V, D, dtype=torch.bfloat16)
    head = fp.Head(weight, lora=(LowRank(torch.randn(r, D), torch.randn(V, r)),))
    for x in (head.lora[0].a, head.lora[0].b):
        x.requires_grad_(schedule in ("eager", "lazy"))
    batch = fp.Batch(torch.randint(0, V, (T,)), torch.tensor([T]), advantage=torch.ones(T))

    def function() -> object:
        if schedule == "statistics":
            return fp.token_stats(hidden, head, batch.target, outputs=("logp", "entropy"))
        if schedule == "lazy":
            stats = fp.token_stats(hidden, head, batch.target, outputs=("logp", "entropy"))
            return (stats.logp + stats.entropy).sum().backward()
        return fp.fused_loss(losses.grpo, hidden, head, batch).backward()

    low = 4 * T * r * 4  # low, low times the scaling, and a gradient of each
    adapters = 2 * bytes_of(head.lora[0].a, head.lora[0].b)  # accumulated, then scaled or cast
    allowed = {"statistics": low, "frozen": low + 3 * bytes_of(hidden), "eager": low + adapters + 3 * bytes_of(hidden)}
    most = peak(function)
    limit = WORKSPACE + allowed.get(schedule, allowed["eager"])
    assert most <= limit, f"{most / MB:.1f} MB of {limit / MB:.1f}"
