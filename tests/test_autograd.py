"""The head among torch's own machinery: autocast, no_grad, retain_graph, checkpointing, torch.compile, loss scaling."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import fastpost as fp
from fastpost.losses import grpo, sft
from problems import Problem, assert_loss_exact, gradients, plain_loss, problem, schedules_of
from rules import assert_close_to_truth, assert_gradient_close_to_truth

ROWS = 40
ONE = torch.ones(())
each_schedule = pytest.mark.parametrize("schedule", ["FrozenLogp", "EagerLoss", "LazyStats"])


def setting(schedule: str, dtype: torch.dtype = torch.float32, *, bias: bool = True) -> tuple[Problem, fp.Batch]:
    p = problem(dtype, T=ROWS, bias=bias).to(dtype, train_head=schedule != "FrozenLogp")
    target = p.target.index_fill(0, torch.tensor([0, 7]), -100)
    weight = torch.rand(ROWS) / ROWS
    return p, fp.Batch(target, torch.tensor([ROWS]), advantage=torch.randn(ROWS), weight=weight)


def run(schedule: str, p: Problem, batch: fp.Batch, hidden: Tensor | None = None, loss: fp.Loss = grpo) -> Tensor:
    """The same loss by each of the three."""
    hidden = p.hidden if hidden is None else hidden
    if schedule != "LazyStats":
        total = fp.fused_loss(loss, hidden, p.head, batch)
        assert isinstance(total, Tensor)
        return total
    return (loss(fp.token_stats(hidden, p.head, batch.target), batch) * batch.weight).sum()


def grads(value: Tensor, p: Problem) -> list[Tensor]:
    return list(gradients(value, ONE, p).values())


def same_bits(got: list[Tensor], want: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


# ---- the backward pass ----


@each_schedule
def test_a_second_backward_gives_the_same_bits(schedule):
    p, batch = setting(schedule)
    total = run(schedule, p, batch)
    assert schedules_of(total) == {schedule}
    assert same_bits(grads(total, p), grads(total, p))


@each_schedule
def test_a_second_backward_without_retain_graph_is_torchs_error(schedule):
    p, batch = setting(schedule)
    total = run(schedule, p, batch)
    total.backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        total.backward()


@each_schedule
@pytest.mark.parametrize("of", ["the loss", "its square"])
def test_double_backward_is_refused(of, schedule):
    """A gradient penalty without its second-order term would be wrong in silence."""
    p, batch = setting(schedule)
    total = run(schedule, p, batch, loss=sft)
    (gradient,) = torch.autograd.grad(total if of == "the loss" else total.square(), p.hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="the head is differentiable once"):
        (total + gradient.square().sum()).backward()


@each_schedule
def test_gradients_follow_the_upstream_gradient_and_accumulate(schedule):
    p, batch = setting(schedule)
    want = grads(run(schedule, p, batch), p)
    torch.testing.assert_close(grads(-3 * run(schedule, p, batch), p), [-3 * g for g in want])
    for _ in range(2):
        run(schedule, p, batch).backward()
    for leaf, gradient in zip(p.leaves.values(), want, strict=True):
        assert torch.equal(leaf.grad, 2 * gradient)


PARTS = [("hidden",), ("weight",), ("bias",), ("hidden", "bias"), ("weight", "bias")]


@pytest.mark.parametrize("trained", PARTS, ids="+".join)
@pytest.mark.parametrize("schedule", ["EagerLoss", "LazyStats"])
def test_any_part_may_be_frozen(schedule, trained):
    p, batch = setting(schedule)
    want = gradients(run(schedule, p, batch), ONE, p)
    for name, leaf in p.leaves.items():
        leaf.requires_grad_(name in trained)
    assert tuple(p.leaves) == trained
    total = run(schedule, p, batch)
    assert schedules_of(total) == {"FrozenLogp" if trained == ("hidden",) else schedule}
    torch.testing.assert_close(gradients(total, ONE, p), {name: want[name] for name in trained})


def test_a_statistic_that_is_not_used_gives_no_gradient():
    p, batch = setting("LazyStats")
    together = fp.token_stats(p.hidden, p.head, batch.target, outputs=("logp", "entropy", "top1"))
    assert together.logp.requires_grad and not together.top1.requires_grad
    alone = fp.token_stats(p.hidden, p.head, batch.target, outputs=("entropy",))
    assert same_bits(grads(together.entropy.sum(), p), grads(alone.entropy.sum(), p))


@each_schedule
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_the_value_is_the_same(mode, schedule):
    p, batch = setting(schedule)
    with mode():
        value = run(schedule, p, batch)
    assert not value.requires_grad
    torch.testing.assert_close(value.clone(), run(schedule, p, batch).detach())


# ---- precision ----


@each_schedule
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_under_autocast_operands_are_those_of_linear_and_gradients_have_the_leafs_dtype(dtype, schedule):
    """The truth is float64 on operands rounded as F.linear rounds them; the yardstick, torch under autocast."""
    p, batch = setting(schedule, bias=False)
    train_head = schedule != "FrozenLogp"
    truth = p.to(dtype).to(torch.float64, train_head=train_head)
    same = p.to(torch.float32, train_head=train_head)
    with torch.autocast("cpu", dtype):
        total, yardstick = run(schedule, p, batch), plain_loss(grpo, same, batch)
    want = plain_loss(grpo, truth, batch)
    assert total.dtype == torch.float32
    assert_close_to_truth(total, plain_loss(grpo, p.to(dtype).to(torch.float32), batch), want)
    got, truths, yardsticks = gradients(total, ONE, p), gradients(want, ONE, truth), gradients(yardstick, ONE, same)
    for leaf, gradient in got.items():
        assert gradient.dtype == torch.float32
        assert_gradient_close_to_truth(gradient, yardsticks[leaf], truths[leaf], leaf)


def test_autocast_brings_mixed_dtypes_together():
    p, batch = setting("LazyStats")
    with torch.autocast("cpu", torch.bfloat16):
        mixed = fp.linear_logprobs(p.hidden.bfloat16(), p.head, batch.target)
        alike = fp.linear_logprobs(p.hidden, p.head, batch.target)
    assert torch.equal(mixed, alike)


@contextmanager
def matmul_precision(precision: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@each_schedule
@pytest.mark.parametrize("precision", ["high", "medium"])
def test_fp32_is_fp32_whatever_the_process_has_set(precision, schedule):
    p, batch = setting(schedule)
    total = run(schedule, p, batch)
    want = [total, *grads(total, p)]
    with matmul_precision(precision):
        total = run(schedule, p, batch)
        got = [total, *grads(total, p)]
        assert torch.get_float32_matmul_precision() == precision
    assert same_bits(got, want)


def test_the_process_may_have_set_it_by_torchs_newer_name():
    p, batch = setting("EagerLoss")
    want = run("EagerLoss", p, batch)
    before = torch.backends.mkldnn.matmul.fp32_precision
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    try:
        assert torch.equal(run("EagerLoss", p, batch), want)
        assert torch.backends.mkldnn.matmul.fp32_precision == "bf16"
    finally:
        torch.backends.mkldnn.matmul.fp32_precision = before


def test_an_error_puts_the_precision_back():
    p, batch = setting("EagerLoss")

    @fp.loss(unit="token")
    def broken(stats: fp.Stats, batch: fp.Batch) -> Tensor:
        raise ArithmeticError("in the middle of the sweep")

    with matmul_precision("medium"):
        with pytest.raises(ArithmeticError, match="in the middle"):
            fp.fused_loss(broken, p.hidden, p.head, batch)
        assert torch.get_float32_matmul_precision() == "medium"


@each_schedule
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_a_loss_scale_brings_small_gradients_through(dtype, schedule):
    """As GradScaler does for fp16: what was too small for the dtype before scaling must not have been lost."""
    p, batch = setting(schedule, dtype)
    tiny = replace(batch, weight=batch.weight / 65536)
    scaled = gradients(65536 * run(schedule, p, tiny), ONE, p)
    train_head = schedule != "FrozenLogp"
    truth, same = p.to(torch.float64, train_head=train_head), p.to(dtype, train_head=train_head)
    want, yardstick = (gradients(plain_loss(grpo, x, batch), ONE, x) for x in (truth, same))
    for leaf, gradient in scaled.items():
        assert_gradient_close_to_truth(gradient, yardstick[leaf], want[leaf], leaf)


# ---- callers ----


@each_schedule
@pytest.mark.parametrize("reentrant", [True, False])
def test_a_caller_may_be_checkpointed(reentrant, schedule):
    p, batch = setting(schedule)
    want = gradients(run(schedule, p, batch, torch.tanh(p.hidden)), ONE, p)
    total = checkpoint(lambda h: run(schedule, p, batch, torch.tanh(h)), p.hidden, use_reentrant=reentrant)
    total.backward()
    for name, leaf in p.leaves.items():
        assert torch.equal(leaf.grad, want[name]), name


@each_schedule
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_caller_may_be_compiled(backend, schedule):
    """The head breaks the graph in two, and says nothing about it."""
    p, batch = setting(schedule)

    def step(hidden: Tensor) -> Tensor:
        return 2 * run(schedule, p, batch, torch.tanh(hidden)) + hidden.square().sum()

    want = step(p.hidden)
    torch._dynamo.reset()
    total = torch.compile(step, backend=backend)(p.hidden)
    torch.testing.assert_close(total, want)
    torch.testing.assert_close(gradients(total, ONE, p), gradients(want, ONE, p))


def test_saved_tensors_may_be_offloaded():
    p, batch = setting("LazyStats")
    want = grads(run("LazyStats", p, batch), p)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x.clone(), lambda x: x):
        total = run("LazyStats", p, batch)
    assert same_bits(grads(total, p), want)


def test_a_tied_weight_gets_the_gradient_of_both_uses():
    """The embedding that is also the head: one leaf, two paths."""
    table = torch.randn(200, 16, requires_grad=True)
    ids, target = torch.randint(0, 200, (ROWS,)), torch.randint(0, 200, (ROWS,))
    total = fp.fused_loss(fp.losses.sft, table[ids].tanh(), table, fp.Batch(target, torch.tensor([ROWS])))
    (got,) = torch.autograd.grad(total, table)
    plain = torch.nn.functional.cross_entropy(table[ids].tanh() @ table.T, target)
    torch.testing.assert_close(got, torch.autograd.grad(plain, table)[0])


@each_schedule
def test_it_is_exact_after_all(schedule):
    p, batch = setting(schedule)
    assert_loss_exact(run(schedule, p, batch), grpo, p, batch)
