"""The row kernels and the tile-fused forward, measured: `python benchmarks/rows.py`.

  rows        one tile in fp32 (R rows, B columns), from memory and behind the product that wrote it: tiles.py. x bound:
              time over that of a copy of as many bytes, which a tile that is still in the cache may beat; with
              a verdict on the CUDA twin (cuda_rows.py) where nvcc is
  statistics  those of all T rows: forwards.py, with a verdict on each variant of the tile-fused forward. x floor: time
              over one plain product

Each is held against float64 before it is timed, by the rule of truth.py. What is wrong is said and has no speed, the
rest goes on, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import datetime
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import forwards
import tiles
import torch
import trial
from cases import make_inputs
from contest import RESULTS, file_name
from harness import bandwidth, machine, plain_product
from measurement import Measurement, Setup, append
from report import show

SHAPES = {"cpu": (256, 512, 32768), "cuda": (8192, 4096, 131072)}
TILES = {"cpu": (256, 1024), "cuda": (2048, 8192)}
REPEATS = {"cpu": 5, "cuda": 50}


def measure(setup: Setup, device: torch.device, tile: tuple[int, int]) -> Iterator[Measurement]:
    dtype = getattr(torch, setup.dtype)
    x = make_inputs(setup.tokens, setup.hidden, setup.vocab, dtype, device)
    copied = bandwidth(setup.repeats, device)
    with torch.no_grad():
        for each in tiles.trials(setup, tiles.Tile.of(*tile, dtype, device), plain_product(x.hidden, x.weight)):
            yield from trial.measure(each, device, copied)
        for each in forwards.trials(setup, x):
            yield from trial.measure(each, device, copied)


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
    output, measurements = options.output or RESULTS / file_name(setup, now), []
    for measured in measure(setup, device, tuple(options.tile or TILES[options.device])):
        append(output, [measured])
        measurements.append(measured)
    show(measurements)
    print(*tiles.verdicts(measurements, device), *forwards.verdicts(measurements), f"written to {output}", sep="\n")
    return int(any(m.status != "ok" for m in measurements))


if __name__ == "__main__":
    sys.exit(main())
