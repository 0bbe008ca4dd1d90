"""The row kernels and the tile-fused forward, measured: `python benchmarks/rows.py`.

  rows        one tile in fp32 (R rows, B columns), by each implementation that runs here and, for Triton, by launches
              beside those of its table. x bound: time over that of a copy of as many bytes
  statistics  logp and the entropy of all T rows without a gradient: products and folds, as `token_stats` does them, and
              the tile-fused forward, which the library does not call before it wins here. x floor: time over one
              plain product

Each is held against float64 before any is timed, by the rule of truth.py: nothing is timed that is wrong.
"""

from __future__ import annotations

import argparse
import datetime
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from cases import Inputs, make_inputs
from contest import PRODUCT, RESULTS, file_name
from counted import Cost
from harness import bandwidth, interleaved, machine, plain_product
from measurement import Measurement, Setup, append
from report import show
from torch import Tensor
from truth import BLOCK_ELEMENTS

import fastpost as fp
from fastpost import rows as row_math
from fastpost.rows import Shape, TorchRows
from fastpost.sweep import row_kernels

SHAPES = {"cpu": (256, 512, 32768), "cuda": (8192, 4096, 131072)}
TILES = {"cpu": (256, 1024), "cuda": (2048, 8192)}
REPEATS = {"cpu": 5, "cuda": 50}
WANTS = frozenset({"entropy"})
DIVERGENCES = frozenset({"entropy", "reverse_kl"})
# (columns, warps) beside those of the launch table.
CANDIDATES = {
    "fold": ((8192, 8), (8192, 32), (4096, 8), (2048, 8)),
    "grads": ((1024, 4), (2048, 4), (4096, 8), (8192, 16)),
}
# Rows, columns, depth, warps and stages, likewise; each compiles without a spill.
PRODUCTS = {
    "sm_80": ((128, 128, 32, 8, 4),),
    "sm_90": ((128, 128, 64, 8, 4), (128, 256, 64, 8, 3)),
    "sm_100": ((128, 128, 64, 8, 3),),
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


def row_runs(task: Task, x: Tile) -> tuple[dict[str, Callable[[], object]], dict[str, float]]:
    """What is to be timed, and its errors. Raises ArithmeticError if one is past its bound."""
    wide, found = x.widened(), implementations(task, x.raw.device)
    truth, errors = result(task, TorchRows(), wide), {}
    for name, kernels in found.items():
        difference = result(task, kernels, x) - truth
        errors[name] = float(difference.norm() / truth.norm() if task.writes else difference.abs().max())
    slack = torch.finfo(torch.float32).eps if task.writes else 1e-5
    _bounded(task.name, errors, 2 * errors["torch"] + slack)
    state = fresh(x)
    return {name: partial(task.run, kernels, x, state) for name, kernels in found.items()}, errors


def candidates(forward, device: torch.device) -> dict[str, object]:
    """The forward at sizes beside the one of its table."""
    from fastpost.kernels.launch import Product, architecture

    found = {}
    for size in PRODUCTS.get(architecture(device), ()):
        entries = {**forward.entries, "plain": Product(*size)}
        found[f"tile-fused {' x '.join(map(str, size))}"] = replace(forward, entries=entries)
    return found


def fused_logp(forward, p, target: Tensor) -> Tensor:
    return row_math.finish(forward.state(p, target, None, WANTS), WANTS, len(p.weight), None)["logp"]


def forward_runs(x: Inputs) -> tuple[dict[str, Callable[[], object]], dict[str, float]]:
    """The same for the statistics of all rows; as many of them are held against float64 as fit a block."""
    hidden, weight, target = x.hidden.detach(), x.weight.detach(), x.batch.target
    T, some = len(hidden), slice(0, max(1, BLOCK_ELEMENTS // len(weight)))
    runs: dict[str, Callable[[], Tensor]] = {
        "products and folds": lambda: fp.token_stats(hidden, weight, target, outputs=("logp", "entropy")).logp
    }
    if hidden.is_cuda:
        from fastpost.kernels.forward import Logits, forward_on

        forward, p = forward_on(hidden.device), Logits(hidden, weight, None, 1.0, None)
        for name, each in {"tile-fused": forward, **candidates(forward, hidden.device)}.items():
            runs[name] = partial(fused_logp, each, p, target)
    rows = torch.arange(T, device=hidden.device)[some]
    logits = hidden[some].double() @ weight.double().T
    truth = logits.log_softmax(1)[rows, target[some]]
    product = torch.mm(hidden[some], weight.T, out_dtype=torch.float32) if hidden.is_cuda else logits.float()
    plain = product.log_softmax(1)[rows, target[some]].double()
    errors = {name: float((run()[some].double() - truth).abs().max()) for name, run in runs.items()}
    _bounded("statistics", errors, 2 * float((plain - truth).abs().max()) + 1e-5)
    return runs, errors


def _bounded(task: str, errors: Mapping[str, float], allowed: float) -> None:
    wrong = [f"{name}, {task}: {e:.1e} > {allowed:.1e}" for name, e in errors.items() if not e <= allowed]
    if wrong:
        raise ArithmeticError("\n".join(wrong))


def measure(setup: Setup, device: torch.device, tile: tuple[int, int]) -> list[Measurement]:
    x = make_inputs(setup.tokens, setup.hidden, setup.vocab, getattr(torch, setup.dtype), device)
    copied, (R, B) = bandwidth(setup.repeats, device), tile
    rows, found = Tile.of(R, B, getattr(torch, setup.dtype), device), []
    with torch.no_grad():
        # All are checked before any is timed.
        jobs = [(f"{t.name}, {R} x {B}", 0, Cost(fetched=t.bytes(rows)), *row_runs(t, rows)) for t in TASKS]
        jobs.append(("statistics", 1, None, *forward_runs(x)))
        for case, products, counted, runs, errors in jobs:
            seconds = interleaved(runs | {PRODUCT: plain_product(x.hidden, x.weight)}, setup.repeats, device)
            found += [
                Measurement(
                    setup=setup,
                    case=case,
                    products=products,
                    provider=name,
                    package="fastpost",
                    version=fp.__version__,
                    settings="",
                    status="ok",
                    errors={"logp" if products else "result": errors[name]},
                    seconds=seconds[name],
                    product_seconds=seconds[PRODUCT],
                    counted=counted,
                    bytes_per_second=copied,
                )
                for name in runs
            ]
    return found


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Time and error of the row kernels and of the tile-fused forward.")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    for name in ("tokens", "hidden", "vocab", "repeats"):
        parser.add_argument(f"--{name}", type=int)
    parser.add_argument("--tile", type=int, nargs=2, metavar=("R", "B"))
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--output", type=Path, help="JSON lines; benchmarks/results/<device>-<date>-rows.jsonl")
    options = parser.parse_args(argv)
    given = (options.tokens, options.hidden, options.vocab)
    shape = [n or default for n, default in zip(given, SHAPES[options.device], strict=True)]
    device, now = torch.device(options.device), datetime.datetime.now().astimezone()
    repeats = options.repeats or REPEATS[options.device]
    setup = Setup(machine(device), now.isoformat(timespec="seconds"), options.dtype, *shape, repeats, "rows")
    try:
        measurements = measure(setup, device, tuple(options.tile or TILES[options.device]))
    except ArithmeticError as error:
        print(f"wrong, so nothing was timed\n{error}", file=sys.stderr)
        return 1
    output = options.output or RESULTS / file_name(setup, now)
    append(output, measurements)
    show(measurements)
    print(f"written to {output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
