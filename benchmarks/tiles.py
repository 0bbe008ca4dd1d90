"""The row kernels on one tile in fp32: as they find it in memory, and behind the product that writes it, as the library
calls them, while it is still in the cache. By each implementation that runs here, for Triton by launches beside those
of its table, and by the CUDA twin, with a verdict on it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import cuda_rows
import torch
from counted import Cost
from cuda_rows import TWIN
from measurement import Measurement, Setup
from torch import Tensor
from trial import Trial, verdict

from fastpost.core import rows as row_math
from fastpost.core.gemm import Gemm, exact_products
from fastpost.core.rows import Shape, TorchRows
from fastpost.core.sweep import row_kernels

WANTS = frozenset({"entropy"})
DIVERGENCES = frozenset({"entropy", "reverse_kl"})
# (columns, warps) beside those of the launch table.
CANDIDATES = {
    "fold": ((8192, 8), (8192, 32), (4096, 8), (2048, 8)),
    "grads": ((1024, 4), (2048, 4), (4096, 8), (8192, 16)),
}


@dataclass(frozen=True)
class Tile:
    """What a row kernel is given."""

    raw: Tensor  # (R, B)
    raw_q: Tensor  # (R, B)
    target: Tensor  # (R,)
    c: Tensor  # (16, R)
    left: Tensor  # (R, B) in the operands' dtype

    @staticmethod
    def of(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tile:
        draw = partial(torch.randn, rows, columns, device=device)
        raw, target = 3 * draw(), torch.randint(columns, (rows,), device=device)
        state = row_math.new_state(rows, device, raw.dtype)
        TorchRows().fold(state, raw, target, 0, Shape(None, 1.0, None), None, WANTS)
        stats = row_math.finish(state, WANTS, columns, None)
        c = row_math.coefficients(stats, {"logp": torch.randn(rows, device=device)}, columns, 0.5)
        return Tile(raw, raw + 0.3 * draw(), target, c, torch.empty_like(raw, dtype=dtype))

    def widened(self) -> Tile:
        return Tile(*(x.double() if x.is_floating_point() else x for x in vars(self).values()))


@dataclass(frozen=True)
class Task:
    """One call of a row kernel, and the bytes of a logit that it cannot but move."""

    name: str
    kernel: str  # its launch's name
    read: int
    writes: bool
    run: Callable[[TorchRows, Tile, Tensor], None]  # into a state, or into the tile's left operand

    def bytes(self, x: Tile) -> int:
        return x.raw.numel() * (self.read + (x.left.element_size() if self.writes else 0))


def fold(kernels: TorchRows, x: Tile, state: Tensor, *, wants=frozenset(), dense=False, writes=False) -> None:
    plain, (q, out) = Shape(None, 1.0, None), (x.raw_q if dense else None, x.left if writes else None)
    kernels.fold(state, x.raw, x.target, 0, plain, None, wants, q, plain if dense else None, out)


def grads(kernels: TorchRows, x: Tile, state: Tensor) -> None:
    kernels.grads(x.raw, x.target, 0, Shape(None, 1.0, None), None, x.c, frozenset({"logp"}), x.left)


TASKS = (
    Task("fold", "fold", 4, False, fold),
    Task("fold, entropy and KL", "fold", 8, False, partial(fold, wants=DIVERGENCES, dense=True)),
    Task("fold, left operand", "fold", 4, True, partial(fold, writes=True)),
    Task("grads", "grads", 4, True, grads),
)


def implementations(task: Task, device: torch.device) -> dict[str, TorchRows]:
    found = {"torch": TorchRows(), "fastpost": row_kernels(device, torch.float32)}
    if device.type == "cuda" and type(found["fastpost"]) is not TorchRows:
        from fastpost.kernels.launch import ROWS, Row
        from fastpost.kernels.rows import TritonRows

        for size in CANDIDATES[task.kernel]:
            found[f"triton {size[0]} x {size[1]}"] = TritonRows({**ROWS, task.kernel: Row(*size)})
        found |= cuda_rows.candidates(device, found["fastpost"])
    return found


def fresh(x: Tile) -> Tensor:
    return row_math.new_state(len(x.raw), x.raw.device, x.raw.dtype)


def result(task: Task, kernels: TorchRows, x: Tile) -> Tensor:
    """What a run leaves, in float64."""
    state = fresh(x)
    task.run(kernels, x, state)
    if task.writes:
        return x.left.double()
    wants = DIVERGENCES if task.read == 8 else frozenset()
    stats = row_math.finish(state, wants, x.raw.shape[1], None)
    return torch.stack([stats[name].double() for name in sorted(wants | {"logp"})])


def written(x: Tile, task: Task, hidden: int) -> Callable[[], None]:
    """The library's own products, which leave what the task reads."""
    (R, B), dtype, device = x.raw.shape, x.left.dtype, x.raw.device
    gemm, draw = Gemm(dtype, device), partial(torch.randn, device=device)
    a, b = draw(R, hidden).to(dtype), draw(B, hidden).mul(3 / hidden**0.5).to(dtype)
    left, right = gemm.operand(a, "left"), gemm.operand(b, "right")

    def products() -> None:
        with exact_products(device):
            for tile in (x.raw, x.raw_q)[: task.read // 4]:
                gemm.product(left, right, tile)

    return products


def trials(setup: Setup, x: Tile, product: Callable[[], object]) -> Iterator[Trial]:
    """A trial's tile is what the last one left, so each is to be measured before the next is asked for."""
    for task in TASKS:
        found = implementations(task, x.raw.device)
        for behind in (False, True):
            before = written(x, task, setup.hidden) if behind else None
            if before is not None:
                before()
            truth, state = result(task, TorchRows(), x.widened()), fresh(x)
            error = partial(_relative if task.writes else _worst, truth)
            slack = torch.finfo(torch.float32).eps if task.writes else 1e-5
            yield Trial(
                case=f"{task.name}{' behind its product' if behind else ''}, {x.raw.shape[0]} x {x.raw.shape[1]}",
                setup=setup,
                products=0,
                counted=Cost(fetched=task.bytes(x)),
                runs={name: partial(task.run, kernels, x, state) for name, kernels in found.items()},
                results={name: partial(result, task, kernels, x) for name, kernels in found.items()},
                error=error,
                allowed=2 * error(result(task, found["torch"], x)) + slack,
                product=product,
                before=before,
            )


def verdicts(measurements: Sequence[Measurement], device: torch.device) -> list[str]:
    """Of each task on a GPU, whether the CUDA twin is the fastest, and by how much."""
    if lacking := cuda_rows.missing(device):
        return [f"the {TWIN} twin: no verdict, for want of {lacking}"]
    cases = dict.fromkeys(m.case for m in measurements if m.provider.startswith(TWIN))
    return [
        _verdict(case, {m.provider: m.seconds for m in measurements if m.case == case and m.seconds}) for case in cases
    ]


def _verdict(case: str, seconds: Mapping[str, float]) -> str:
    twin = {name: time for name, time in seconds.items() if name.startswith(TWIN)}
    triton = {name: time for name, time in seconds.items() if name.startswith(("fastpost", "triton"))}
    return verdict(case, twin, triton, "row kernels of Triton" if twin else f"a {TWIN} twin that is right")


def _relative(truth: Tensor, found: Tensor) -> float:
    return float((found - truth).norm() / truth.norm())


def _worst(truth: Tensor, found: Tensor) -> float:
    return float((found - truth).abs().max())
