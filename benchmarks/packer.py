"""The packer, measured: `python benchmarks/packer.py`. One JSON document a day in benchmarks/results.

  plans    seconds and fill of `packing.plan` on log-normal lengths cut at `longest`, as truncation leaves them; of its
           best fit alone, in C++ and in Python, and of TRL's bfd, which copies the tokens too, on fewer rows
  ranks    the busiest rank's work over the mean rank's, `packing.cost` of a model of width 4096: of whole steps (ranks
           wait at their end), and pack by pack (they wait in each); and of packs dealt in the order they come
  streams  fill by window, with what is not full carried on and with every window on its own; seconds a million rows;
           and how many windows the row that waited longest was read before it went out

fill: tokens over packs x max_tokens. seconds: of one core, not of the clock, which others on the machine slow down; the
median of several, in turns. Every plan is checked, and is the twin's pack for pack, before it has a speed.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from contest import RESULTS
from harness import machine, version
from report import table

from fastpost.packing import Pack, cost, deal, plan, steps, stream
from fastpost.packing.fit import best_fit_twin, native

WIDTH = 4096


@dataclass(frozen=True)
class Texts:
    """Lengths of rows: log-normal, cut at `longest`."""

    name: str
    median: float  # tokens
    spread: float  # standard deviation of the logarithm
    longest: int
    max_tokens: int  # of a pack
    unit: int = 1

    def lengths(self, rows: int) -> list[int]:
        drawn = torch.empty(rows).log_normal_(0, self.spread, generator=torch.Generator().manual_seed(0))
        return (self.median * drawn).round().long().clamp(1, self.longest).tolist()


TEXTS = (
    Texts("chat", 300, 0.9, 2048, 2048),
    Texts("chat, twice as much a pack", 300, 0.9, 2048, 4096),
    Texts("documents", 700, 1.0, 8192, 8192),
    Texts("reasoning", 3000, 1.0, 16384, 16384),
    Texts("long documents", 5000, 1.2, 131072, 131072),
    Texts("pairs", 300, 0.9, 2048, 8192, unit=2),
    Texts("groups of 8", 700, 1.0, 4096, 32768, unit=8),
)
RANKS = ((8, 8), (8, 16), (8, 32), (8, 64), (64, 512))  # (ranks, packs a step)
WINDOWS = (16, 64, 256, 1024)  # packs


def cpu_seconds(runs: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    rounds = [{name: _cpu_clock(run) for name, run in runs.items()} for _ in range(repeats)]
    return {name: statistics.median(each[name] for each in rounds) for name in runs}


def _cpu_clock(run: Callable[[], object]) -> float:
    began = time.process_time()
    run()
    return time.process_time() - began


# ---- plans ----


def check(packs: Sequence[Pack], lengths: Sequence[int], texts: Texts) -> None:
    """ValueError unless every row is in one pack, units are whole, and no pack is too full."""
    rows = sorted(row for pack in packs for row in pack)
    whole = all(
        pack[i] + texts.unit - 1 == pack[i + texts.unit - 1] for pack in packs for i in range(0, len(pack), texts.unit)
    )
    fullest = max(sum(lengths[row] for row in pack) for pack in packs)
    if rows != list(range(len(lengths))) or not whole or fullest > texts.max_tokens:
        raise ValueError(f"the plan of {texts.name} is wrong, so it has no speed")


def measure_plan(texts: Texts, rows: int, repeats: int) -> dict[str, Any]:
    lengths, unit, room = texts.lengths(rows), texts.unit, texts.max_tokens
    sizes = [sum(lengths[i : i + unit]) for i in range(0, rows, unit)]
    packs, fast = plan(lengths, room, unit), native()
    check(packs, lengths, texts)
    runs: dict[str, Callable[[], object]] = {"plan": lambda: plan(lengths, room, unit)}
    runs["best fit, Python"] = lambda: best_fit_twin(sizes, room)
    if fast:
        if fast(sizes, room) != best_fit_twin(sizes, room):
            raise ValueError(f"of {texts.name} C++ and Python make different packs")
        runs["best fit, C++"] = lambda: fast(sizes, room)
    seconds = cpu_seconds(runs, repeats)
    fill = sum(lengths) / (len(packs) * room)
    return asdict(texts) | {"rows": rows, "packs": len(packs), "fill": fill, "seconds": seconds}


def measure_trl(texts: Texts, rows: int, repeats: int) -> dict[str, Any] | None:
    """TRL's bfd beside `plan`, on tokens of one byte each."""
    try:
        import pyarrow as pa
        from trl.data_utils import _pack_bfd
    except ImportError:
        return None
    lengths, room = texts.lengths(rows), texts.max_tokens
    ends = torch.tensor([0, *lengths]).cumsum(0)
    tokens = pa.array(torch.zeros(int(ends[-1]), dtype=torch.int8).numpy())
    given = pa.table({"input_ids": pa.ListArray.from_arrays(pa.array(ends.int().numpy()), tokens)})
    packed: list[int] = []

    def trl() -> None:
        packed[:] = [len(_pack_bfd(given, room))]

    seconds = cpu_seconds({"plan": lambda: plan(lengths, room), f"TRL {version('trl')}": trl}, repeats)
    packs = len(plan(lengths, room))
    return asdict(texts) | {"rows": rows, "packs": packs, "TRL's packs": packed[0], "seconds": seconds}


# ---- ranks ----


def measure_ranks(texts: Texts, rows: int, ranks: int, per_step: int) -> dict[str, Any]:
    lengths = texts.lengths(rows)
    ratios: dict[str, list[float]] = {"step": [], "pack by pack": [], "in order": []}
    taken = steps(plan(lengths, texts.max_tokens, texts.unit), per_step, 0)
    for step in taken[:-1] or taken:
        dealt = _work(deal(step, lengths, ranks, WIDTH, texts.unit), lengths)
        ratios["step"].append(_over_mean([sum(packs) for packs in dealt]))
        turns = list(zip(*dealt, strict=True))
        ratios["pack by pack"].append(ranks * sum(map(max, turns)) / sum(map(sum, turns)))
        in_order = _work([step[rank::ranks] for rank in range(ranks)], lengths)
        ratios["in order"].append(_over_mean([sum(packs) for packs in in_order]))
    shown = {name: {"mean": statistics.mean(each), "worst": max(each)} for name, each in ratios.items()}
    return {"texts": texts.name, "ranks": ranks, "packs_per_step": per_step, "steps": len(ratios["step"])} | shown


def _work(shares: Sequence[Sequence[Pack]], lengths: Sequence[int]) -> list[list[float]]:  # [rank][turn]
    return [[cost((lengths[row] for row in pack), WIDTH) for pack in share] for share in shares]


def _over_mean(loads: Sequence[float]) -> float:
    return max(loads) / statistics.mean(loads)


# ---- streams ----


def measure_stream(texts: Texts, rows: int, window: int) -> dict[str, Any]:
    lengths, room, packs, waited = texts.lengths(rows), texts.max_tokens, 0, 0
    began = time.process_time()
    for step in stream(range(rows), lengths.__getitem__, room, 8, texts.unit, window=window):
        packs += len(step.packs)
        waited = max(waited, *(step.then.row - row for row in step.rows))
    seconds = (time.process_time() - began) / rows * 1e6
    apart = sum(len(plan(part, room, texts.unit)) for part in _windows(lengths, window * room, texts.unit))
    fill = {"fill": sum(lengths) / (packs * room), "fill of windows apart": sum(lengths) / (apart * room)}
    rows_of_a_window = window * room / statistics.mean(lengths)
    shown = {"seconds a million rows": seconds, "windows waited": waited / rows_of_a_window}
    return {"texts": texts.name, "rows": rows, "window": window} | fill | shown


def _windows(lengths: Sequence[int], tokens: int, unit: int) -> Iterator[Sequence[int]]:
    begin = total = 0
    for stop in range(unit, len(lengths) + 1, unit):
        total += sum(lengths[stop - unit : stop])
        if total >= tokens or stop == len(lengths):
            yield lengths[begin:stop]
            begin, total = stop, 0


# ---- the program ----


def show(name: str, lines: Sequence[dict[str, Any]]) -> None:
    flat = [_flat(line) for line in lines]
    table(name, list(flat[0]), [list(map(_cell, line.values())) for line in flat])


def _flat(line: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in line.items():
        found |= {f"{name}, {part}": each for part, each in value.items()} if isinstance(value, dict) else {name: value}
    return found


def _cell(value: object) -> str:
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Speed, fill and balance of the packer.")
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, help="JSON; benchmarks/results/cpu-<date>-packer.json")
    options = parser.parse_args(argv)
    now = datetime.datetime.now().astimezone()
    rows, fewer = options.rows // 8 * 8, options.rows // 80 * 8  # whole groups
    found: dict[str, list[dict[str, Any]]] = {
        "plans": [measure_plan(texts, rows, options.repeats) for texts in TEXTS],
        "beside TRL": [line for texts in TEXTS[:3] if (line := measure_trl(texts, fewer, options.repeats))],
        "ranks": [measure_ranks(texts, fewer, *shape) for texts in TEXTS[2:5] for shape in RANKS],
        "streams": [measure_stream(texts, fewer, window) for texts in TEXTS[::2] for window in WINDOWS],
    }
    for name, lines in found.items():
        if lines:
            show(name, lines)
    output = options.output or RESULTS / f"cpu-{now:%Y-%m-%d}-packer.json"
    setup = {"machine": asdict(machine(torch.device("cpu"))), "run": now.isoformat(timespec="seconds"), "width": WIDTH}
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(setup | found, indent=1) + "\n")
    print(f"written to {output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
