"""What each schedule promises to cost, counted: 2 T D V flop are one G, and a reference costs its own."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import fastpost as fp
from fastpost import losses
from fastpost.core.gemm import native_products
from flops import products
from loss_problems import distant, entropic
from problems import adapter, schedules_of, small_tiles, stat

ROWS, WIDTH, WORDS, WIDTH_Q = 32, 24, 300, 8
G, G_Q = 2 * ROWS * WIDTH * WORDS, 2 * ROWS * WIDTH_Q * WORDS
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)  # bf16 may be the extension's


def workload(
    *, hidden: bool = True, weight: bool = True, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, fp.Batch, dict]:
    draw = partial(torch.randn, dtype=dtype)
    h, w = draw(ROWS, WIDTH, requires_grad=hidden), draw(WORDS, WIDTH, requires_grad=weight)
    target, lengths = torch.randint(0, WORDS, (ROWS,)), torch.tensor([16, 16])
    batch = fp.Batch(target, lengths, advantage=torch.ones(2), ref_logp=torch.zeros(ROWS))
    return h, w, batch, {"reference": (draw(ROWS, WIDTH_Q), draw(WORDS, WIDTH_Q))}


TRAINED = [
    # loss, hidden trains, weight trains, rows a chunk, flop
    (losses.sft, True, True, 4096, 3 * G),
    (losses.sft, True, True, 5, 3 * G),
    (losses.sft, True, False, 4096, 2 * G),
    (losses.sft, False, True, 4096, 2 * G),
    (losses.sft, False, False, 4096, G),
    (losses.gspo, True, True, 16, 3 * G),
    (losses.gspo, True, True, 15, 4 * G),
    (losses.gspo, False, True, 15, 3 * G),
    (losses.gspo, True, False, 15, 2 * G),
    (losses.dpo, True, True, 32, 3 * G),
    (losses.dpo, True, True, 31, 4 * G),
    (entropic, True, False, 4096, 2 * G),
    (distant, True, True, 16, 3 * G + G_Q),
    (distant, True, True, 15, 4 * G + 2 * G_Q),
    (distant, True, False, 15, 3 * G + 2 * G_Q),
]


@DTYPES
@pytest.mark.parametrize(("loss", "hidden", "weight", "rows", "flop"), TRAINED)
def test_a_loss_costs_what_its_schedule_promises(loss, hidden, weight, rows, flop, dtype, monkeypatch):
    h, w, batch, reference = workload(hidden=hidden, weight=weight, dtype=dtype)
    small_tiles(monkeypatch, rows=rows)
    needs = reference if "reverse_kl" in loss.reads else {}
    assert products(lambda: fp.fused_loss(loss, h, w, batch, **needs)) == flop


STATISTICS = [
    # outputs, hidden trains, weight trains, flop
    (("logp", "entropy", "top1"), False, False, G),
    (("logp", "reverse_kl", "jsd"), False, False, G + G_Q),
    (("logp", "top1"), True, False, 2 * G),
    (("logp",), True, True, 4 * G),
    (("entropy",), True, False, 3 * G),
    (("entropy",), False, True, 3 * G),
]


@DTYPES
@pytest.mark.parametrize(("outputs", "hidden", "weight", "flop"), STATISTICS)
def test_statistics_cost_what_their_schedule_promises(outputs, hidden, weight, flop, dtype):
    h, w, batch, reference = workload(hidden=hidden, weight=weight, dtype=dtype)
    differentiable = [name for name in outputs if name != "top1"]

    def function() -> Tensor:
        stats = fp.token_stats(h, w, batch.target, outputs=outputs, **reference)
        return sum(stat(stats, name) for name in differentiable)

    assert products(function) == flop


@pytest.mark.parametrize("rows", [ROWS, WIDTH], ids=["kept apart", "kept where dW will be"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_the_products_of_the_extension_are_counted_where_torch_sees_none(dtype, rows):
    if native_products(dtype, torch.device("cpu")) is None:
        pytest.skip("the native extension is not here, or does not multiply on this CPU")
    h, w, batch, _ = workload(dtype=dtype)
    batch.target[rows:] = -100
    with FlopCounterMode(display=False) as torchs:
        found = products(lambda: fp.fused_loss(losses.sft, h, w, batch))
    assert (found, torchs.get_total_flops()) == (3 * G * rows // ROWS, 0)


@pytest.mark.parametrize(("weight", "flop"), [(True, 4 * G + G_Q), (False, 2 * G + G_Q)])
def test_statistics_that_are_only_looked_at_leave_the_schedule_alone(weight, flop):
    h, w, batch, reference = workload(weight=weight)
    asked = {"outputs": ("entropy", "logp", "top1", "jsd", "lse"), "differentiates": ("logp",), **reference}
    stats = fp.token_stats(h, w, batch.target, **asked)
    assert [stat(stats, name).requires_grad for name in asked["outputs"]] == [False, True, False, False, False]
    assert products(lambda: fp.token_stats(h, w, batch.target, **asked).logp) == flop
    (got,) = torch.autograd.grad(stats.logp.sum(), h)
    (want,) = torch.autograd.grad(fp.linear_logprobs(h, w, batch.target).sum(), h)
    torch.testing.assert_close(got, want)


def test_what_nothing_is_differentiated_through_costs_one_product():
    h, w, batch, _ = workload()
    assert products(lambda: fp.token_stats(h, w, batch.target, differentiates=()).logp) == G


def test_a_divergence_that_is_only_logged_is_not_computed_again():
    h, w, batch, reference = workload()
    outputs = ("logp", "reverse_kl")
    assert products(lambda: fp.token_stats(h, w, batch.target, outputs=outputs, **reference).logp) == 4 * G + G_Q


def test_grpo_that_logs_entropy_and_kl_stays_on_the_frozen_schedule():
    h, w, batch, reference = workload(weight=False)
    for outputs, flop in ((("entropy",), 2 * G), (("entropy", "reverse_kl"), 2 * G + G_Q)):
        call = lambda names=outputs: fp.fused_loss(  # noqa: E731
            losses.grpo, h, w, batch, outputs=names, return_stats=True, **reference
        )
        assert schedules_of(call()[0]) == {"FrozenLogp"}
        assert products(lambda call=call: call()[0]) == flop


def test_a_term_of_weight_zero_is_not_computed():
    h, w, batch, reference = workload()
    assert products(lambda: fp.fused_loss(losses.kd, h, w, batch, alpha=0.5, **reference)) == 3 * G + G_Q
    assert products(lambda: fp.fused_loss(losses.kd, h, w, batch, alpha=1.0)) == 3 * G
    _, stats = fp.fused_loss(losses.kd, h, w, batch, alpha=0.0, return_stats=True, **reference)
    assert stats.logp_at_1 is None and stats.forward_kl is not None


@pytest.mark.parametrize("kept", [0, 8])
@pytest.mark.parametrize("weight", [True, False], ids=["trained", "frozen"])
def test_ignored_rows_cost_nothing(weight, kept):
    h, w, batch, reference = workload(weight=weight)
    batch.target[kept:] = -100
    share = {True: 3, False: 2}[weight] * G * kept // ROWS
    assert products(lambda: fp.fused_loss(losses.sft, h, w, batch)) == share
    logged = {"outputs": ("jsd",), "return_stats": True, **reference}
    assert products(lambda: fp.fused_loss(losses.sft, h, w, batch, **logged)[0]) == share + G_Q * kept // ROWS


def in_four(unit: str, idle: int, *, weight: bool, by: str) -> tuple[Tensor, Tensor, fp.Batch, dict]:
    """Four sequences, of which the first `idle` have no advantage, or no weight."""
    h, w, batch, reference = workload(weight=weight)
    batch = replace(batch, lengths=torch.full((4,), ROWS // 4), advantage=torch.ones(ROWS))
    live = batch.spread(torch.arange(4) >= idle).float()
    if by == "advantage":
        return h, w, replace(batch, advantage=live), reference
    units = {"token": live, "sequence": live[:: ROWS // 4], "pair": live[:: ROWS // 2]}
    return h, w, replace(batch, weight=units[unit]), reference


IDLE = [
    # loss, what is zero, weight trains, rows a chunk, G a live row
    (losses.grpo, "advantage", True, 4096, 3),
    (losses.grpo, "advantage", False, 4096, 2),
    (losses.gspo, "advantage", True, 8, 3),
    (losses.gspo, "advantage", True, 7, 4),
    (losses.gspo, "advantage", False, 7, 2),
    (losses.sft, "weight", True, 4096, 3),
    (losses.gspo, "weight", True, 7, 4),
    (losses.dpo, "weight", True, 16, 3),
    (losses.dpo, "weight", False, 4096, 2),
]


@pytest.mark.parametrize("idle", [0, 2, 4])
@pytest.mark.parametrize(("loss", "by", "weight", "rows", "each"), IDLE)
def test_idle_units_cost_nothing(loss, by, weight, rows, each, idle, monkeypatch):
    h, w, batch, _ = in_four(loss.unit, idle, weight=weight, by=by)
    small_tiles(monkeypatch, rows=rows)
    assert products(lambda: fp.fused_loss(loss, h, w, batch)) == each * G * (4 - idle) // 4


@pytest.mark.parametrize("idle", [0, 1, 4])
@pytest.mark.parametrize(("weight", "each"), [(True, 3), (False, 2)], ids=["trained", "frozen"])
def test_idle_units_that_are_looked_at_cost_one_product(weight, each, idle):
    h, w, batch, reference = in_four("token", idle, weight=weight, by="advantage")
    call = lambda: fp.fused_loss(  # noqa: E731
        losses.grpo, h, w, batch, outputs=("entropy", "reverse_kl"), return_stats=True, **reference
    )
    assert products(lambda: call()[0]) == (each * G * (4 - idle) + G * idle) // 4 + G_Q


@pytest.mark.parametrize("head", ["adapter", "top-k"])
def test_idle_rows_cost_what_ignored_ones_do_under_any_head(head):
    h, w, batch, _ = in_four("token", 3, weight=False, by="advantage")
    ids = torch.stack([torch.randperm(WORDS)[:4] for _ in range(ROWS)])
    stored = fp.TopK(ids, torch.randn(ROWS, WORDS).log_softmax(1).gather(1, ids))
    lora = fp.Head(w, lora=(adapter(3, w),))
    loss, of, more = (losses.grpo, lora, {}) if head == "adapter" else (losses.forward_kl, w, {"reference": stored})
    batch = replace(batch, weight=batch.advantage)
    ignored = replace(batch, target=torch.where(batch.weight == 0, -100, batch.target))
    idle, want = (products(lambda b=b: fp.fused_loss(loss, h, of, b, **more)) for b in (batch, ignored))
    assert idle == want > 0
