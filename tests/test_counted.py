"""benchmarks/counted.py against what runs: flop as torch counts them, bytes as a double of products and kernels."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import cases
import counted
import families
import peers
import pytest
import torch
from counted import Pass, Work, backward_work
from expected import expected
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import fastpost as fp
from fastpost.core import rows, sweep
from fastpost.core.gemm import Gemm
from fastpost.core.rows import TorchRows
from fastpost.types import LowRank
from problems import schedules_of, small_tiles

T, D, V, D_Q, RANK = 37, 24, 301, 10, 3
R, B = 8, 64  # neither divides T or V: the last chunk and the last block are smaller
BLOCKS = (B, V % B)


# ---- a double ----


@dataclass
class Seen:
    """Bytes that went through widenings, products and row kernels, and the buffers of each sweep."""

    fetched: int = 0
    touched: int = 0
    buffers: list[dict[str, int]] = field(default_factory=list)

    def moves(self, *tensors: Tensor | None, times: int = 1) -> None:
        self.touched += times * sum(x.numel() * x.itemsize for x in tensors if x is not None)

    def holds(self, role: str, x: Tensor) -> None:
        found = self.buffers[-1]
        found[role] = max(found.get(role, 0), x.untyped_storage().nbytes())

    @property
    def workspace(self) -> int:
        return max(sum(each.values()) for each in self.buffers)


class SeenGemm(Gemm):
    def __init__(self, seen: Seen, dtype: torch.dtype, device: torch.device):
        super().__init__(dtype, device)
        self.seen = seen
        seen.buffers.append({})

    def operand(self, x: Tensor, buffer: str) -> Tensor:
        found = super().operand(x, buffer)
        self.seen.fetched += x.numel() * x.itemsize
        if found.data_ptr() != x.data_ptr():
            self.seen.moves(x, found)
            self.seen.holds(buffer, found)
        return found

    def product(self, a: Tensor, b: Tensor, out: Tensor) -> Tensor:
        self.seen.moves(a, b, out)
        self.seen.holds(f"tile, {a.shape[1]} wide", out)
        return super().product(a, b, out)

    def add_product(self, total: Tensor, a: Tensor, b: Tensor, *, fresh: bool = False) -> None:
        times = 1 if fresh else 2
        self.seen.moves(a, b)
        self.seen.moves(total, times=times)
        if total.shape[1] == D:
            self.seen.holds("columns" if total.shape[0] in BLOCKS else "rows", total)
        if total.shape[0] in BLOCKS:
            self.seen.fetched += times * total.numel() * total.itemsize
        super().add_product(total, a, b, fresh=fresh)


class SeenRows(TorchRows):
    def __init__(self, seen: Seen):
        super().__init__()
        self.seen = seen

    def _writes(self, tile: Tensor, out: Tensor | None) -> None:
        self.seen.moves(out)
        if out is not None and out.untyped_storage().data_ptr() != tile.untyped_storage().data_ptr():
            self.seen.holds("left operand", out)

    def fold(self, state, tile, target, start, shape, inverse_temperature, wants, tile_q=None, shape_q=None, out=None):
        self.seen.moves(tile, tile_q)
        self._writes(tile, out)
        super().fold(state, tile, target, start, shape, inverse_temperature, wants, tile_q, shape_q, out)

    def mixture(self, state, tile, shape, inverse_temperature, tile_q, shape_q, beta):
        self.seen.moves(tile, tile_q)
        super().mixture(state, tile, shape, inverse_temperature, tile_q, shape_q, beta)

    def grads(
        self, tile, target, start, shape, inverse_temperature, c, wants, out, tile_q=None, shape_q=None, beta=0.5
    ):
        self.seen.moves(tile, tile_q)
        self._writes(tile, out)
        super().grads(tile, target, start, shape, inverse_temperature, c, wants, out, tile_q, shape_q, beta)


def watch_rescaling(seen: Seen, monkeypatch: pytest.MonkeyPatch) -> None:
    rescale = rows.rescale

    def watched(tile: Tensor, *rest) -> None:
        seen.moves(tile, times=2)
        rescale(tile, *rest)

    monkeypatch.setattr("fastpost.core.rows.rescale", watched)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Seen:
    """Small tiles, by torch alone, and watched."""
    watched = Seen()
    small_tiles(monkeypatch, columns=B, rows=R)
    watch_rescaling(watched, monkeypatch)
    monkeypatch.setattr("fastpost.core.gemm.native_products", lambda dtype, device: None)
    monkeypatch.setattr(sweep, "Gemm", lambda dtype, device: SeenGemm(watched, dtype, device))
    monkeypatch.setattr(sweep, "row_kernels", lambda device, dtype: SeenRows(watched))
    return watched


# ---- the calls ----


@fp.loss(unit="token", reads=("logp", "entropy"))
def own(stats: fp.Stats, batch: fp.Batch) -> Tensor:
    return -stats.logp - stats.entropy


@fp.loss(unit="token", reads=("logp", "reverse_kl"))
def distant(stats: fp.Stats, batch: fp.Batch) -> Tensor:
    return stats.reverse_kl - stats.logp


@fp.loss(unit="token", reads=("jsd",))
def mixed(stats: fp.Stats, batch: fp.Batch) -> Tensor:
    return stats.jsd


@fp.loss(unit="token", reads=("logp", "entropy", "reverse_kl"), differentiates=("logp", "entropy"))
def watched(stats: fp.Stats, batch: fp.Batch) -> Tensor:
    return -stats.logp - stats.entropy + stats.reverse_kl


@fp.loss(unit="token", reads=("logp", "jsd"), differentiates=("logp",))
def logged(stats: fp.Stats, batch: fp.Batch) -> Tensor:
    return -stats.logp + stats.jsd


@fp.loss(unit="token", reads=("logp", "reverse_kl"), differentiates=("logp",))
def distant_from(stats: fp.Stats, batch: fp.Batch) -> Tensor:
    return -stats.logp + stats.reverse_kl


FROZEN = Work(T, D, V, trains=frozenset({"hidden"}))
TRAINED = Work(T, D, V)
COMPARED = {"D_q": D_Q, "compares": True}
ADAPTED = {"r": RANK, "trains": frozenset({"hidden", "a", "b"})}

CALLS = [
    ("statistics", own, Work(T, D, V, trains=frozenset())),
    ("statistics", distant, Work(T, D, V, D_q=D_Q, trains=frozenset())),
    ("statistics", mixed, Work(T, D, V, D_q=D_Q, jsd=True, r=RANK, trains=frozenset())),
    ("frozen", fp.losses.reinforce, FROZEN),
    ("frozen", logged, replace(FROZEN, D_q=D_Q, jsd=True)),
    ("frozen", fp.losses.reinforce, replace(FROZEN, r=RANK)),
    ("frozen", fp.losses.reinforce, replace(FROZEN, r=RANK, trains=frozenset({"hidden", "a"}))),
    ("kept", fp.losses.reinforce, TRAINED),
    ("kept", fp.losses.reinforce, replace(TRAINED, trains=frozenset({"weight"}))),
    ("kept", distant_from, replace(TRAINED, D_q=D_Q)),
    ("kept", fp.losses.reinforce, replace(TRAINED, **ADAPTED)),
    ("kept", fp.losses.reinforce, replace(TRAINED, r=RANK, trains=frozenset({"hidden", "weight", "b"}))),
    ("eager", own, TRAINED),
    ("eager", own, FROZEN),
    ("eager", own, replace(TRAINED, trains=frozenset({"weight"}))),
    ("eager", distant, replace(TRAINED, **COMPARED)),
    ("eager", watched, replace(TRAINED, D_q=D_Q)),
    ("eager", mixed, replace(TRAINED, jsd=True, **COMPARED)),
    ("eager", own, replace(TRAINED, **ADAPTED)),
    ("eager", own, replace(TRAINED, r=RANK, trains=frozenset({"hidden", "weight", "b"}))),
    ("lazy", own, TRAINED),
    ("lazy", own, FROZEN),
    ("lazy", own, replace(TRAINED, trains=frozenset({"weight"}))),
    ("lazy", distant, replace(TRAINED, **COMPARED)),
    ("lazy", watched, replace(TRAINED, D_q=D_Q)),
    ("lazy", mixed, replace(TRAINED, jsd=True, **COMPARED)),
    ("lazy", own, replace(TRAINED, **ADAPTED)),
]


def call(schedule: str, loss: fp.Loss, x: Work, dtype: torch.dtype) -> Tensor:
    """The loss, by `fused_loss` or from statistics."""
    leaf = lambda name, *shape, as_=dtype: torch.randn(shape).to(as_).requires_grad_(name in x.trains)  # noqa: E731
    a, b = (leaf(name, *shape, as_=torch.float32) for name, shape in (("a", (x.r, D)), ("b", (V, x.r))))
    head = fp.Head(leaf("weight", V, D), lora=(LowRank(a, b),) if x.r else ())
    hidden, target = leaf("hidden", T, D), torch.randint(V, (T,))
    reference = (leaf("", T, D_Q), leaf("", V, D_Q)) if x.D_q else None
    batch = fp.Batch(target, torch.tensor([T]), advantage=torch.ones(T))
    if schedule == "lazy":
        asked = {"outputs": loss.reads, "differentiates": loss.differentiates, "reference": reference}
        return loss(fp.token_stats(hidden, head, target, **asked), batch).sum()
    return fp.fused_loss(loss, hidden, head, batch, reference=reference)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("schedule", "loss", "work"), CALLS)
def test_what_is_counted_is_what_runs(seen, schedule, loss, work, dtype):
    work = replace(work, stored=dtype.itemsize, multiplied=Gemm(dtype, torch.device("cpu")).tile_dtype.itemsize)
    with FlopCounterMode(display=False) as counter:
        value = call(schedule, loss, work, dtype)
        if value.requires_grad:
            value.backward()
    name = {"frozen": "FrozenLogp", "kept": "EagerLoss", "eager": "EagerLoss", "lazy": "LazyStats"}
    assert schedules_of(value) == ({name[schedule]} if schedule in name else set())
    there = Pass(work, R, B, held=work.jsd or schedule == "eager")
    back = Pass(backward_work(work), R, B, held=False)
    want = counted.cost(schedule, there, back)
    assert counted.Cost(counter.get_total_flops(), seen.fetched, seen.touched, seen.workspace) == want


SCHEDULES = ("statistics", "frozen", "eager", "lazy")


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_at_the_leading_order_it_is_what_the_design_promises(schedule):
    """2, 3 and 4 G, a weight read once a chunk and pass; and flop over bytes grows with the rows of a chunk."""
    x = Work(
        65_536, 1024, 131_072, trains=frozenset({"hidden", "weight"} if schedule in ("eager", "lazy") else {"hidden"})
    )
    found = [counted.cost(schedule, Pass(x, R, 1024, schedule == "eager"), Pass(x, R, 1024, False)) for R in (256, 512)]
    G = {"statistics": 1, "frozen": 2, "eager": 3, "lazy": 4}[schedule]
    assert all(cost.flop == G * 2 * x.T * x.D * x.V for cost in found)
    intensity = [cost.flop / cost.fetched for cost in found]
    assert intensity[1] == pytest.approx(2 * intensity[0], rel=0.02)


def test_the_bound_is_the_slower_of_the_two():
    cost = counted.Cost(flop=600, fetched=100)
    assert cost.bound(flop_rate=200, bandwidth=100) == 3
    assert cost.bound(flop_rate=200, bandwidth=10) == 10


@pytest.mark.parametrize("rows", [4, 16], ids=["units do not fit", "units fit"])
@pytest.mark.parametrize("name", ["logp", "sft", "logp + reverse_kl", "grpo", "dpo", "gspo", "gkd"])
def test_the_benchmarks_expect_of_a_case_what_it_does(seen, monkeypatch, name, rows):
    """Which schedule the head takes, how it cuts the inputs, and what the reference costs beside it."""
    small_tiles(monkeypatch, columns=B, rows=rows)
    found = next(case for case in (*cases.CASES, *families.CASES) if case.name == name)
    for trained, fused in ((False, False), (False, True), (True, False), (True, True)):
        case = replace(found, trained=trained)
        x = cases.make_inputs(40, D, V, torch.bfloat16, torch.device("cpu")).trained(trained)
        if case.scores_reference and not fused:
            continue
        want = expected(case, x, fused)
        seen.fetched = seen.touched = 0
        with FlopCounterMode(display=False) as counter:
            peers.run(case, peers.fastpost_loss if fused else peers.fastpost_stats, x)
        assert (counter.get_total_flops(), seen.fetched, seen.touched) == (want.flop, want.fetched, want.touched)
