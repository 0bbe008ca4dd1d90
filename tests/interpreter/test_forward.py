"""The tile-fused forward, run by Triton's interpreter: its state against float64, judged by what torch's rows make of
it.

fp32 operands: the interpreter's tl.dot of bf16 is wrong. Tiles are small, so that a problem of a few rows has several
of everything.
"""

import os

import pytest
import torch

from fastpost.core import rows as row_math
from fastpost.core.rows import Shape, TorchRows
from rules import assert_close_to_truth

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1 before triton is imported", allow_module_level=True)

from fastpost.kernels.forward import Logits, TritonForward, share
from fastpost.kernels.launch import Product
from forwards import VARIANTS, Given, by_forward, by_plain

WANTS = frozenset({"entropy", "log_sum_sq", "mean_logp", "logp@1", "reverse_kl", "forward_kl", "top1"})
ALONE = frozenset({"logp", "entropy"})


def fused(tma: bool, processors: int = 3) -> TritonForward:
    entry = Product(BM=16, BN=32, BK=16, num_warps=4, num_stages=2, GROUP=2)
    return TritonForward({"fp32": entry, "two": entry}, tma, processors)


def logits_of(T, D, V, seed, softcap, biased=True):
    g = torch.Generator().manual_seed(seed)
    bias = torch.randn(V, generator=g)
    bias[V // 2] = -torch.inf if V > 2 else 0.0
    weight = torch.randn(V, D, generator=g) * 0.5
    return Logits(torch.randn(T, D, generator=g), weight, bias if biased else None, 1.3, softcap)


def by_torch(p, q, target, inverse, wants, dtype):
    """The state that torch's row kernels leave, from whole rows of logits in `dtype`."""
    state = row_math.new_state(len(target), target.device, dtype)
    raw = [x.hidden.to(dtype) @ x.weight.to(dtype).T for x in (p, q)]
    shape, shape_q = (Shape(x.bias, x.scale, x.softcap) for x in (p, q))
    inverse = None if inverse is None else inverse.to(dtype)
    TorchRows().fold(state, raw[0], target, 0, shape, inverse, wants, raw[1], shape_q)
    return row_math.finish(state, wants, len(p.weight), inverse)


def check(forward, p, q, target, inverse, wants):
    state = forward.state(p, target, inverse, wants, q)
    ours = row_math.finish(state, wants, len(p.weight), inverse)
    yardstick, truth = (by_torch(p, q or p, target, inverse, wants, dtype) for dtype in (torch.float32, torch.float64))
    for name, value in ours.items():
        if name == "top1":
            assert torch.equal(value, truth[name])
        elif name in wants | {"logp", "lse"}:
            assert_close_to_truth(value, yardstick[name], truth[name], name)
    assert (ours["logp"] <= 0).all()


@pytest.mark.parametrize("tma", [True, False], ids=["copied", "pointers"])
@pytest.mark.parametrize("softcap", [None, 4.0], ids=["", "capped"])
@pytest.mark.parametrize(("T", "D", "V"), [(1, 4, 1), (37, 20, 131), (5, 32, 509)], ids=["one", "odd", "prime"])
def test_every_statistic_is_close_to_truth(T, D, V, softcap, tma):
    g = torch.Generator().manual_seed(3)
    p, q = logits_of(T, D, V, 0, softcap), logits_of(T, 2 * D + 4, V, 1, softcap)
    target = torch.randint(V, (T,), generator=g)
    target = torch.where(target == V // 2, 0, target)
    inverse = 0.5 + torch.randn(T, generator=g).square()
    check(fused(tma), p, q, target, inverse, WANTS)
    check(fused(tma), p, None, target, None, ALONE)


def test_a_hidden_size_that_no_copy_engine_takes():
    p = logits_of(9, 7, 61, 0, None)
    check(fused(tma=True), p, None, torch.arange(9), None, ALONE)


@pytest.mark.parametrize("size", [1e4, -1e4])
def test_logits_of_any_size(size):
    p = logits_of(6, 8, 67, 0, None, biased=False)
    p = p._replace(weight=p.weight * abs(size) ** 0.5, hidden=p.hidden * size / abs(size) ** 0.5)
    check(fused(tma=True), p, None, torch.arange(6), None, ALONE)


def test_parts_of_the_vocabulary_change_rounding_alone_and_runs_nothing():
    p, target = logits_of(20, 16, 300, 0, None), torch.arange(20)
    for processors in (1, 64):
        check(fused(True, processors), p, None, target, None, ALONE)
    one, many = (fused(True, processors).state(p, target, None, ALONE) for processors in (1, 64))
    again = fused(True, 64).state(p, target, None, ALONE)
    assert torch.equal(many.nan_to_num(), again.nan_to_num())
    assert not torch.equal(one.nan_to_num(), many.nan_to_num()), "there was one part only"


def test_a_target_outside_the_vocabulary_is_nan():
    p = logits_of(3, 4, 40, 0, None)
    state = fused(tma=False).state(p, torch.tensor([0, 40, -1]), None, frozenset({"logp"}))
    assert state[row_math.TARGET].isnan().tolist() == [False, True, True]


def test_no_row():
    assert fused(tma=True).state(logits_of(0, 4, 8, 0, None), torch.empty(0).long(), None, ALONE).shape == (14, 0)


@pytest.mark.parametrize(("blocks", "tiles", "processors"), [(64, 512, 132), (1, 512, 132), (3, 7, 132), (1000, 9, 80)])
def test_a_share_is_never_worse_than_whole_rows(blocks, tiles, processors):
    def rounds(each):
        return -(-blocks * -(-tiles // each) // processors) * each

    each = share(blocks, tiles, processors)
    assert 1 <= each <= tiles
    assert rounds(each) <= rounds(tiles)
    assert rounds(each) <= 1.1 * max(blocks * tiles / processors, -(-tiles // 64)) or blocks * tiles < 2 * processors


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)
def test_what_is_timed_is_the_statistics(variant):
    """benchmarks/forwards.py, which runs on a GPU alone."""
    (p, q), target = (logits_of(9, 8, 131, seed, None, biased=False) for seed in (0, 1)), torch.arange(9)
    x = Given(p.hidden, p.weight, q.hidden, q.weight, target)
    single, truth = (by_plain(variant, x.cut(9, dtype)) for dtype in (torch.float32, torch.float64))
    assert_close_to_truth(by_forward(variant, x, fused(tma=False)), single, truth)
