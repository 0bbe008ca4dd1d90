"""csrc/rows.cpp against core/rows.py in float64, with rows.py in fp32 as the yardstick; and where it hands over."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch

from fastpost.core import rows
from fastpost.core.rows import Shape, TorchRows
from fastpost.types import NEEDS_REFERENCE
from row_problems import ALL, BOTH, JSD, OWN, PLAIN, SHAPES, WANTS, V, held_against_truth, walk

# (the reason says which: it was not built, or for other sources)
pytest.importorskip("fastpost.core.native", exc_type=ImportError)

from fastpost.core.native import NativeRows

START = 64  # of a tile within its vocabulary
compare = partial(held_against_truth, NativeRows())


@pytest.mark.parametrize("wants", WANTS.values(), ids=WANTS.keys())
@pytest.mark.parametrize("tempered", [False, True], ids=["temperature 1", "tempered"])
def test_statistics_and_gradients(wants, tempered):
    z, zq = 3 * torch.randn(37, V), 3 * torch.randn(37, V)
    inverse = 0.5 + torch.rand(37) if tempered else None
    compare(z, torch.randint(V, (37,)), wants, inverse, zq if wants & NEEDS_REFERENCE else None)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("tempered", [False, True], ids=["temperature 1", "tempered"])
def test_bias_scale_and_softcap(shape, tempered):
    z, zq, inverse = 3 * torch.randn(37, V), 3 * torch.randn(37, V), 0.5 + torch.rand(37) if tempered else None
    compare(z, torch.randint(8, V, (37,)), ALL - {"mean_logp"}, inverse, zq, shape=shape, beta=0.3)


@pytest.mark.parametrize("beta", [1e-9, 0.1, 0.9, 1 - 1e-9], ids=str)
@pytest.mark.parametrize("spread", [1e-3, 3.0, 1e4], ids=str)
def test_the_jsd_from_one_kl_to_the_other(beta, spread):
    z, zq = spread * torch.randn(16, V), spread * torch.randn(16, V)
    z[:, 5], zq[:, 6], z[:, 7], zq[:, 7] = (rows.LOWEST,) * 4  # banned in one, in the other, in both
    compare(z, torch.randint(8, V, (16,)), JSD, None, zq, beta=beta)


@pytest.mark.parametrize("beta", [0.1, 1 / 3, 0.5, 0.9, 0.999], ids=str)
def test_a_distribution_is_at_no_distance_from_its_mixture_with_itself(beta):
    z, state = 10 * torch.randn(9, V), rows.new_state(9, torch.device("cpu"), torch.float32)
    NativeRows().fold(state, z, torch.zeros(9, dtype=torch.int64), 0, PLAIN, None, JSD, z, PLAIN)
    NativeRows().mixture(state, z, PLAIN, None, z, PLAIN, beta)
    c, out = torch.zeros(rows.COEFFICIENT_ROWS, 9), torch.empty_like(z)
    c[[rows.C_MAX, rows.C_MAX_Q]], c[[rows.C_LOG_SUM, rows.C_LOG_SUM_Q]] = state[rows.MAX], state[rows.SUM].log()
    c[rows.C_APART_M] = 1.0
    NativeRows().grads(z, torch.full((9,), -1), 0, PLAIN, None, c, JSD, out, z, PLAIN, beta)
    assert not state[[rows.P_M, rows.Q_M]].any() and not out.any()


def test_the_logarithm_is_within_two_ulp():
    """KL(q || m) = -log b where p has no mass of q's."""
    z, zq = torch.full((1, 1), -200.0), torch.zeros(1, 1)
    for beta in torch.cat([torch.linspace(0.001, 1, 1000)[:-1], torch.logspace(-37, -3, 100)]).tolist():
        state = torch.zeros(rows.STATE_ROWS, 1)
        state[[rows.SUM, rows.SUM_Q]] = 1.0
        NativeRows().mixture(state, z, PLAIN, None, zq, PLAIN, beta)
        assert float(state[rows.Q_M]) == pytest.approx(-math.log(beta), rel=2 * torch.finfo(torch.float32).eps, abs=0)


def test_near_zero_a_softcap_is_as_exact_as_torchs():
    compare(torch.linspace(-3.2, 3.2, 64 * V).view(64, V), torch.randint(V, (64,)), shape=Shape(None, 1.0, 30.0))


@pytest.mark.parametrize("shape", [PLAIN, SHAPES["all"]], ids=["plain", "all"])
def test_the_left_operand_may_be_bf16(shape):
    """What `fold` and `grads` write is rounded once."""
    z, target, c = torch.randn(5, V), torch.randint(V, (5,)), torch.randn(rows.COEFFICIENT_ROWS, 5)
    found = {dtype: torch.empty(2, 5, V, dtype=dtype) for dtype in (torch.float32, torch.bfloat16)}
    for out in found.values():
        state = rows.new_state(5, z.device, z.dtype)
        NativeRows().fold(state, z, target, 0, shape, None, OWN, out=out[0])
        NativeRows().grads(z, target, 0, shape, None, c, OWN, out[1])
    assert torch.equal(found[torch.float32].bfloat16(), found[torch.bfloat16])
    assert not found[torch.float32][0].gather(1, target[:, None]).any()


@pytest.mark.parametrize(("R", "columns", "width"), [(1, 1, 1), (1, 2, 1), (3, 7, 3), (2, 131, 131), (9, 1025, 1024)])
def test_odd_shapes(R, columns, width):
    z, zq, target = torch.randn(R, columns), torch.randn(R, columns), torch.randint(columns, (R,))
    compare(z, target, ALL, None, zq, width)


@pytest.mark.parametrize("spread", [1e-4, 30.0, 1e4], ids=str)
def test_flat_and_extreme_logits(spread):
    compare(spread * torch.randn(16, V), torch.randint(V, (16,)), OWN | JSD, None, spread * torch.randn(16, V))


def test_banned_tokens_have_no_mass_and_no_gradient():
    z = torch.randn(4, V)
    z[:, 5::7] = rows.LOWEST
    stats, grad = walk(NativeRows(), z, torch.zeros(4, dtype=torch.int64), OWN - {"mean_logp"}, None, None, 64)
    assert all(bool(x.isfinite().all()) for x in stats.values())
    assert bool((grad[:, 5::7] == 0).all())
    compare(z, torch.zeros(4, dtype=torch.int64), OWN - {"mean_logp"})


def test_nan_and_infinity_are_not_hidden():
    for bad in (float("nan"), float("inf")):
        z = torch.randn(2, V)
        z[1, 100] = bad
        stats, _ = walk(NativeRows(), z, torch.zeros(2, dtype=torch.int64), OWN, None, None, 64)
        assert bool(stats["logp"][0].isfinite()) and bool(stats["logp"][1].isnan())
        for p, q in ((z, torch.randn(2, V)), (torch.randn(2, V), z)):
            stats, grad = walk(NativeRows(), p, torch.zeros(2, dtype=torch.int64), JSD, None, q, 64)
            assert bool(stats["jsd"][0].isfinite()) and bool(stats["jsd"][1].isnan()) and bool(grad[1].isnan().any())
    outside, _ = walk(NativeRows(), torch.randn(1, V), torch.tensor([V]), OWN, None, None, 64)
    assert bool(outside["logp"].isnan())


def test_the_exponential_is_within_an_ulp_or_so_and_never_subnormal():
    x = torch.cat([torch.zeros(1), torch.linspace(-87, 0, 200_001), torch.tensor([-87.5, -200.0, rows.LOWEST])])[None]
    out = torch.empty_like(x)
    state = rows.new_state(1, x.device, x.dtype)
    NativeRows().fold(state, x, torch.tensor([-1]), 0, PLAIN, None, frozenset(), out=out)
    truth = x.double().exp()
    assert ((out - truth).abs() / truth)[0, :-3].max() < 1.5 * torch.finfo(torch.float32).eps
    assert out[0, -3:].tolist() == [0.0, 0.0, 0.0]


def test_the_gradient_may_overwrite_its_tile_whose_rows_need_not_touch():
    z, target, c = torch.randn(8, V), torch.randint(V, (8,)), torch.randn(rows.COEFFICIENT_ROWS, 8)
    apart, tile = torch.empty(8, START), z.clone()[:, START : 2 * START]
    for out in (apart, tile):
        NativeRows().grads(
            tile, target, START, PLAIN, torch.full((8,), 0.7), c, JSD | {"logp@1"}, out, z[:, :START], PLAIN, 0.3
        )
    assert torch.equal(apart, tile)


def test_the_number_of_threads_changes_no_bit():
    z, zq, target = torch.randn(100, V), torch.randn(100, V), torch.randint(V, (100,))
    threads, found = torch.get_num_threads(), []
    try:
        for n in (1, 2):
            torch.set_num_threads(n)
            stats, grad = walk(NativeRows(), z, target, ALL, None, zq, 64)
            found.append(torch.cat([*(x.float() for x in stats.values()), grad.flatten()]))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*found)


def test_float64_is_torchs_to_the_bit():
    (z, zq), target = torch.randn(2, 5, V, dtype=torch.float64), torch.randint(V, (5,))
    (theirs, d_theirs), (ours, d_ours) = (
        walk(kernels, z, target, ALL, None, zq, 64) for kernels in (TorchRows(), NativeRows())
    )
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs) and torch.equal(d_ours, d_theirs)


def test_a_tile_that_it_cannot_read_is_refused():
    z = torch.randn(4, 8)
    state, target = rows.new_state(8, z.device, z.dtype), torch.zeros(8, dtype=torch.int64)
    with pytest.raises(RuntimeError, match=r"tile must be .* got Float \[8, 4\] with strides \[1, 8\]"):
        NativeRows().fold(state, z.T, target, 0, PLAIN, None, OWN)
    with pytest.raises(RuntimeError, match=r"state must be an fp32 tensor of shape \[14, 8\] .* got Float \[14, 4\]"):
        NativeRows().fold(state[:, :4].clone(), z, target, 0, PLAIN, None, OWN)
    with pytest.raises(RuntimeError, match=r"target must be a contiguous int64 tensor, got Int \[4\]"):
        NativeRows().fold(state[:, :4].clone(), z, target[:4].int(), 0, PLAIN, None, OWN)


@pytest.mark.parametrize("shape", [PLAIN, SHAPES["all"]], ids=["plain", "all"])
def test_what_a_fold_writes_may_overwrite_its_tile(shape):
    """As in the frozen schedule: the sums are those of the logits all the same."""
    z, zq, target = torch.randn(8, V), torch.randn(8, V), torch.randint(V, (8,))
    states, written = [], []
    for tile, out in ((z, torch.empty_like(z)), (again := z.clone(), again)):
        states.append(rows.new_state(8, z.device, z.dtype))
        NativeRows().fold(states[-1], tile, target, 0, shape, torch.full((8,), 0.7), BOTH, zq, shape, out)
        written.append(out)
    assert torch.equal(*states) and torch.equal(*written)
