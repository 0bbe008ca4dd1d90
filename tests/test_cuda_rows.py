"""csrc/fold.cu and csrc/grads.cu against core/rows.py in float64: on a CPU by emulation, on a GPU as they are."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import cuda_rows
import pytest
import torch
from cuda_rows import CudaRows
from torch import Tensor

import emulation
from fastpost.core import rows
from fastpost.core.rows import Shape, TorchRows
from fastpost.types import NEEDS_REFERENCE
from row_problems import ALL, BOTH, JSD, OWN, PLAIN, SHAPES, WANTS, V, held_against_truth, walk
from rules import assert_gradient_close_to_truth

OUTS = (torch.float32, torch.bfloat16)


@dataclass(frozen=True)
class Here:
    """The kernels on one device."""

    kernels: CudaRows
    device: torch.device

    def randn(self, *shape: int, std: float = 1.0) -> Tensor:
        return torch.randn(shape).mul(std).to(self.device)

    def target(self, *ids: int) -> Tensor:
        return torch.tensor(ids, device=self.device)

    def targets(self, n: int, least: int = 0, most: int = V) -> Tensor:
        return torch.randint(least, most, (n,)).to(self.device)

    def compare(self, *arguments, **options) -> None:
        held_against_truth(self.kernels, *arguments, **options)

    def walk(self, *arguments, **options) -> tuple[dict[str, Tensor], Tensor]:
        return walk(self.kernels, *arguments, **options)


@pytest.fixture
def here(device, request) -> Here:
    if device.type == "cpu":
        return Here(emulation.row_kernels(request.getfixturevalue("emulated")), device)
    if lacking := cuda_rows.missing(device):
        pytest.skip(f"needs {lacking}")
    return Here(CudaRows(partial(cuda_rows.build, cuda_rows.THREADS[0], device), emulation.Missing()), device)


# ---- numbers ----


@pytest.mark.parametrize("wants", WANTS.values(), ids=WANTS.keys())
@pytest.mark.parametrize("tempered", [False, True], ids=["temperature 1", "tempered"])
def test_statistics_and_gradients(here, wants, tempered):
    """Of several blocks, whose target is in one of them."""
    z, zq = here.randn(11, V, std=3.0), here.randn(11, V, std=3.0)
    inverse = here.randn(11).abs() + 0.5 if tempered else None
    here.compare(z, here.targets(11), wants, inverse, zq if wants & NEEDS_REFERENCE else None)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("tempered", [False, True], ids=["temperature 1", "tempered"])
def test_bias_scale_and_softcap(here, shape, tempered):
    z, zq, inverse = here.randn(11, V, std=3.0), here.randn(11, V, std=3.0), here.randn(11).abs() + 0.5
    wants = ALL - {"mean_logp"}
    here.compare(z, here.targets(11, 8), wants, inverse if tempered else None, zq, shape=shape, beta=0.3)


@pytest.mark.parametrize(
    ("R", "columns", "width"), [(1, 1, 1), (1, 2, 1), (3, 7, 3), (2, 131, 131), (3, 1535, 1535), (2, 3079, 1536)]
)
def test_odd_shapes(here, R, columns, width):
    """A row of one column, of a prime number of them, of all that a block holds."""
    z, zq, target = here.randn(R, columns), here.randn(R, columns), here.targets(R, most=columns)
    here.compare(z, target, ALL, None, zq, width)


@pytest.mark.parametrize("threads", cuda_rows.THREADS)
def test_blocks_as_large_as_are_launched(threads, tmp_path):
    """Above, those of the emulation are small."""
    if emulation.compiler() is None:
        pytest.skip("needs g++")
    columns = cuda_rows.COLUMNS
    library = emulation.build(tmp_path / "large.so", threads=threads, columns=columns)
    z, zq = 3 * torch.randn(2, columns + 1001), 3 * torch.randn(2, columns + 1001)
    target = torch.tensor([columns - 1, columns])
    held_against_truth(emulation.row_kernels(library, columns), z, target, ALL, None, zq, columns)


@pytest.mark.parametrize("first", [1, 2, 4])
def test_rows_that_start_anywhere(here, first):
    """Odd strides: no two rows lie alike."""
    z, zq = (here.randn(5, 307)[:, first : first + V] for _ in range(2))
    here.compare(z, here.targets(5), ALL, None, zq, 128, SHAPES["all"])


@pytest.mark.parametrize("spread", [1e-4, 30.0, 1e4], ids=str)
def test_flat_and_extreme_logits(here, spread):
    wants = OWN | JSD
    here.compare(here.randn(8, V, std=spread), here.targets(8), wants, None, here.randn(8, V, std=spread))


@pytest.mark.parametrize("beta", [1e-9, 0.1, 0.9, 1 - 1e-9], ids=str)
@pytest.mark.parametrize("spread", [1e-3, 3.0, 1e4], ids=str)
def test_the_jsd_from_one_kl_to_the_other(here, beta, spread):
    z, zq = here.randn(8, V, std=spread), here.randn(8, V, std=spread)
    z[:, 5], zq[:, 6], z[:, 7], zq[:, 7] = (rows.LOWEST,) * 4  # banned in one, in the other, in both
    here.compare(z, here.targets(8, 8), JSD, None, zq, beta=beta)


def test_near_zero_a_softcap_is_as_exact_as_torchs(here):
    z = torch.linspace(-3.2, 3.2, 16 * V).view(16, V).to(here.device)
    here.compare(z, here.targets(16), shape=Shape(None, 1.0, 30.0))


def test_a_distribution_is_at_no_distance_from_itself(here):
    z, upstream = here.randn(5, V, std=10.0), torch.linspace(-1, 2, 5).to(here.device)
    state = rows.new_state(5, here.device, z.dtype)
    for span in (slice(0, 128), slice(128, V)):
        here.kernels.fold(state, z[:, span], here.targets(5), span.start, PLAIN, None, BOTH, z[:, span], PLAIN)
    stats = rows.finish(state, BOTH, V, None) | {"kl_p_m": torch.zeros_like(upstream)}
    names = ("reverse_kl", "forward_kl", "jsd")
    assert not stats["reverse_kl"].any() and not stats["forward_kl"].any()
    for beta in (0.1, 1 / 3, 0.5, 0.999):
        c, out = rows.coefficients(stats, dict.fromkeys(names, upstream), V, beta), torch.empty_like(z)
        here.kernels.grads(z, here.targets(5), 0, PLAIN, None, c, frozenset(names), out, z, PLAIN, beta)
        assert not out.any()


def test_banned_tokens_have_no_mass_and_no_gradient(here):
    z = here.randn(4, V)
    z[:, 5::7] = rows.LOWEST
    z[:, 64:128] = rows.LOWEST  # a whole block
    stats, grad = here.walk(z, here.target(0, 0, 0, 0), OWN - {"mean_logp"}, None, None, 64)
    assert all(bool(x.isfinite().all()) for x in stats.values())
    assert bool((grad[:, 5::7] == 0).all()) and bool((grad[:, 64:128] == 0).all())
    here.compare(z, here.target(0, 0, 0, 0), OWN - {"mean_logp"})


def test_nan_and_infinity_are_not_hidden(here):
    for bad in (float("nan"), float("inf")):
        z = here.randn(2, V)
        z[1, 100] = bad
        stats, grad = here.walk(z, here.target(0, 0), OWN, None, None, 64)
        assert bool(stats["logp"][0].isfinite()) and bool(stats["logp"][1].isnan()) and bool(grad[1].isnan().any())
    outside, _ = here.walk(here.randn(1, V), here.target(V), OWN, None, None, 64)
    assert bool(outside["logp"].isnan())


# ---- what is written ----


def left_operands(kernels, tiles, target: Tensor, shape: Shape, inverse: Tensor | None, out: torch.dtype):
    """What `fold` leaves of two blocks, each at the maximum of what was seen by then."""
    state, written, start = rows.new_state(len(target), target.device, tiles[0].dtype), [], 0
    for tile in tiles:
        bias = None if shape.bias is None else shape.bias[start : start + tile.shape[1]].to(target.device)
        written.append(torch.empty_like(tile, dtype=out))
        part = shape._replace(bias=bias)
        kernels.fold(state, tile, target, start, part, inverse, frozenset(), None, None, written[-1])
        start += tile.shape[1]
    return torch.cat(written, 1)


@pytest.mark.parametrize("out", OUTS, ids=str)
@pytest.mark.parametrize("shape", [PLAIN, SHAPES["all"]], ids=["plain", "all"])
def test_the_left_operand_of_the_frozen_schedule(here, shape, out):
    z, target, inverse = here.randn(6, V, std=4.0), here.targets(6), here.randn(6).abs() + 0.5
    found = [
        left_operands(kernels, z.to(dtype).split(120, 1), target, shape, inverse.to(dtype), rounded)
        for kernels, dtype, rounded in (
            (here.kernels, torch.float32, out),
            (TorchRows(), torch.float32, out),
            (TorchRows(), torch.float64, torch.float64),
        )
    ]
    assert_gradient_close_to_truth(*found, name="left operand")
    assert not found[0].gather(1, target[:, None]).any()


@pytest.mark.parametrize("shape", [PLAIN, SHAPES["all"]], ids=["plain", "all"])
def test_what_is_written_in_bf16_is_rounded_once(here, shape):
    z, target, c = here.randn(5, V), here.targets(5), here.randn(rows.COEFFICIENT_ROWS, 5)
    found = {dtype: torch.empty(2, 5, V, dtype=dtype, device=here.device) for dtype in OUTS}
    shape = shape._replace(bias=None if shape.bias is None else shape.bias.to(here.device))
    for out in found.values():
        state = rows.new_state(5, z.device, z.dtype)
        here.kernels.fold(state, z, target, 0, shape, None, OWN, out=out[0])
        here.kernels.grads(z, target, 0, shape, None, c, OWN, out[1])
    assert torch.equal(found[torch.float32].bfloat16(), found[torch.bfloat16])


@pytest.mark.parametrize("out", OUTS, ids=str)
@pytest.mark.parametrize("columns", [1, 13, 203])
def test_nothing_else_is_written(here, columns, out):
    """The gradient of a block of an odd width amid others, and the slots of what was not asked for."""
    z, c = here.randn(3, columns), here.randn(rows.COEFFICIENT_ROWS, 3)
    around = torch.full((5, columns + 40), 7.0, dtype=out, device=here.device)
    expected = around.clone()
    inside, state = around[1:4, 17 : 17 + columns], rows.new_state(3, here.device, z.dtype)
    before = state.clone()
    here.kernels.fold(state, z, here.targets(3, most=columns), 0, PLAIN, None, frozenset(), out=inside)
    here.kernels.grads(z, here.targets(3, most=columns), 0, PLAIN, None, c, frozenset(), inside)
    assert bool((inside != 7).all())
    expected[1:4, 17 : 17 + columns] = inside
    assert torch.equal(around, expected)
    kept = torch.tensor([slot not in (rows.MAX, rows.SUM, rows.TARGET, rows.SUM_Z) for slot in range(rows.STATE_ROWS)])
    assert torch.equal(state[kept], before[kept])


@pytest.mark.parametrize("shape", [PLAIN, Shape(None, 0.7, 5.0)], ids=["plain", "shaped"])
def test_a_tile_may_be_overwritten(here, shape):
    z, zq, target, c = here.randn(5, V), here.randn(5, V), here.targets(5), here.randn(rows.COEFFICIENT_ROWS, 5)
    inverse, found = here.randn(5).abs() + 0.5, []
    for tile, again in ((z, z), (z.clone(), z.clone())):
        outs = (tile, again) if tile is not z else (torch.empty_like(z), torch.empty_like(z))
        state = rows.new_state(5, z.device, z.dtype)
        here.kernels.fold(state, tile, target, 0, shape, inverse, BOTH, zq, shape, outs[0])
        here.kernels.grads(again, target, 0, shape, inverse, c, ALL, outs[1], zq, shape, 0.3)
        found.append(torch.cat([state[: rows.P_M].flatten(), *map(torch.flatten, outs)]))
    assert torch.equal(*found)


def test_two_runs_give_the_same_bits(here):
    z, zq, target = here.randn(9, V), here.randn(9, V), here.targets(9)
    found = [here.walk(z, target, ALL, None, zq, 64) for _ in range(2)]
    (first, d_first), (second, d_second) = found
    assert all(torch.equal(first[name], second[name]) for name in first) and torch.equal(d_first, d_second)


def test_what_it_does_not_take_is_left_to_others(here):
    """Another dtype, a tile wider than a block holds, a statistic that is new."""
    wide, z, new = here.randn(2, 8200), here.randn(2, 40), OWN | {"variance"}
    single, double, half = torch.float32, torch.float64, torch.float16
    for tile, dtype, wants in ((wide, single, OWN), (z.double(), double, OWN), (z, half, OWN), (z, single, new)):
        state, c, target = rows.new_state(2, here.device, tile.dtype), here.randn(16, 2), here.target(0, 1)
        out = torch.empty_like(tile, dtype=dtype)
        with pytest.raises(AssertionError, match="left to others"):
            here.kernels.fold(state, tile, target, 0, PLAIN, None, wants, out=out)
        with pytest.raises(AssertionError, match="left to others"):
            here.kernels.grads(tile, target, 0, PLAIN, None, c, wants, out)
