"""linear_cross_entropy is torch's: names, order, results, and a word where it does not do what torch's does."""

from __future__ import annotations

import inspect

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastpost as fp
from problems import DTYPES
from rules import assert_close_to_truth, assert_gradient_close_to_truth

N, D, V = 24, 16, 100


def inputs(dtype: torch.dtype = torch.float32, *, bias: bool = False) -> tuple[list[Tensor], Tensor]:
    """input, linear_weight and perhaps linear_bias, as leaves; target, some of it ignored."""
    tensors = [torch.randn(N, D), torch.randn(V, D), *([torch.randn(V)] if bias else [])]
    target = torch.randint(0, V, (N,)).index_fill(0, torch.tensor([3, 4, 20]), -100)
    return [x.to(dtype).requires_grad_() for x in tensors], target


def call(function, tensors: list[Tensor], target: Tensor, **options) -> tuple[Tensor, ...]:
    """The loss and the gradients of its sum weighted by position."""
    bias = {"linear_bias": tensors[2]} if len(tensors) == 3 else {}
    loss = function(*tensors[:2], target, **bias, **options)
    upstream = torch.linspace(0.5, 2, loss.numel()).view(loss.shape).to(loss.dtype)
    return loss, *torch.autograd.grad((loss * upstream).sum(), tensors)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
def test_it_is_torchs(bias, reduction, label_smoothing, dtype):
    tensors, target = inputs(dtype, bias=bias)
    options = {"reduction": reduction, "label_smoothing": label_smoothing}
    got = call(fp.linear_cross_entropy, tensors, target, **options)
    in_dtype = lambda to: [x.detach().to(to).requires_grad_() for x in tensors]  # noqa: E731
    truth = call(F.linear_cross_entropy, in_dtype(torch.float64), target, **options)
    same = call(F.linear_cross_entropy, in_dtype(dtype), target, **options)
    assert [x.dtype for x in got] == [dtype] * len(got)
    assert_close_to_truth(got[0], same[0], truth[0])
    for ours, theirs, want in zip(got[1:], same[1:], truth[1:], strict=True):
        assert_gradient_close_to_truth(ours, theirs, want)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_float64_is_float64_to_the_end(reduction):
    tensors, target = inputs(torch.float64, bias=True)
    got = call(fp.linear_cross_entropy, tensors, target, reduction=reduction)
    want = call(F.linear_cross_entropy, tensors, target, reduction=reduction)
    rounded = 200 * torch.finfo(torch.float64).eps  # once for each token of the vocabulary, of which there are fewer
    torch.testing.assert_close(got, want, rtol=rounded, atol=rounded)


@pytest.mark.parametrize("ignore_index", [-100, None, 5, -1])
def test_ignore_index(ignore_index):
    tensors, target = inputs()
    target = torch.where(target == -100, -100 if ignore_index is None else ignore_index, target)
    got = call(fp.linear_cross_entropy, tensors, target, ignore_index=ignore_index)
    torch.testing.assert_close(got, call(F.linear_cross_entropy, tensors, target, ignore_index=ignore_index))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_one_input_without_a_batch(reduction):
    tensors = [torch.randn(D, requires_grad=True), torch.randn(V, D, requires_grad=True)]
    got = call(fp.linear_cross_entropy, tensors, torch.tensor(7), reduction=reduction)
    torch.testing.assert_close(got, call(F.linear_cross_entropy, tensors, torch.tensor(7), reduction=reduction))


def test_leading_dimensions_are_taken_where_torch_wants_them_flat():
    tensors, target = inputs()
    flat = fp.linear_cross_entropy(*tensors, target, reduction="none")
    got = fp.linear_cross_entropy(tensors[0].view(3, 8, D), tensors[1], target.view(3, 8), reduction="none")
    assert torch.equal(got, flat.view(3, 8))
    mean = fp.linear_cross_entropy(tensors[0].view(3, 8, D), tensors[1], target.view(3, 8))
    torch.testing.assert_close(mean, fp.linear_cross_entropy(*tensors, target))


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_all_ignored(reduction, label_smoothing):
    tensors, target = inputs()
    options = {"reduction": reduction, "label_smoothing": label_smoothing}
    loss = fp.linear_cross_entropy(*tensors, torch.full_like(target, -100), **options)
    want = F.linear_cross_entropy(*tensors, torch.full_like(target, -100), **options)
    torch.testing.assert_close(loss, want, equal_nan=True)
    assert loss.requires_grad and bool(loss.isnan().all()) == (reduction == "mean")


def test_names_and_order_are_torchs():
    ours, theirs = (inspect.signature(f).parameters for f in (fp.linear_cross_entropy, F.linear_cross_entropy))
    common = [name for name in theirs if name in ours]
    assert list(ours)[:3] == list(theirs)[:3] == ["input", "linear_weight", "target"]
    assert {"linear_bias", "reduction", "ignore_index", "label_smoothing"} <= set(common)
    assert all(ours[name].kind == theirs[name].kind for name in common)


TORCH = r"torch\.nn\.functional\.linear_cross_entropy"
REFUSED = {
    "class weights": ({"weight": torch.ones(V)}, rf"weight .*{TORCH}"),
    "probabilities": ({"target": torch.rand(N, V)}, rf"target must hold class indices .*float32.*{TORCH}"),
    "K dimensions": ({"linear_weight": torch.randn(V, 2, D)}, rf"linear_weight .*\(100, 2, 16\).*{TORCH}"),
    "reduction": ({"reduction": "avg"}, "reduction must be 'mean', 'sum' or 'none', got 'avg'"),
    "smoothing": ({"label_smoothing": 1.5}, r"label_smoothing must be in \[0, 1\], got 1.5"),
    "shapes": ({"target": torch.zeros(N - 1, dtype=torch.int64)}, r"input .*\(24, 16\).*target.*\(23,\)"),
    "widths": ({"linear_weight": torch.randn(V, D + 1)}, r"input .*\(24, 16\).*linear_weight.*\(100, 17\)"),
    "dtype": ({"target": torch.zeros(N, dtype=torch.int32)}, r"^target must be int64, got torch.int32"),
    "range": ({"target": torch.full((N,), V)}, r"target must be in \[0, 100\).*got 100"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_it_does_not_do_it_says(what):
    options, message = REFUSED[what]
    (input, weight), target = inputs()
    arguments = {"input": input, "linear_weight": weight, "target": target} | options
    with pytest.raises(ValueError, match=message):
        fp.linear_cross_entropy(**arguments)
