"""Whether every method learns: `python benchmarks/learn.py [METHOD ...] [--seeds 0 1 2]`, or `make learn`.

Each run is a verb's own function on a task made on the spot (`learn_task.py`), and most begin from what the SFT of
their seed left (`learn_methods.py`). Its checkpoints are scored on the same held-out problems. A run has learned where
it ends above its beginning by three standard errors of two such shares; where one has not, the exit code is 1. One line
a run is appended to --output, and `learn_report.py` makes a table and curves of them.

seconds      of training, saving included, scoring not; on a machine that does other things as well an upper bound
cpu_seconds  that the process itself was running meanwhile, on one thread
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch
from harness import Machine, machine
from learn_methods import METHODS, Method
from learn_task import HELD_OUT, write_task

RESULTS = Path(__file__).resolve().parent / "results" / "learn"
ERRORS = 3  # standard errors, by which a score must rise


@dataclass(frozen=True)
class Line:
    """A run."""

    machine: Machine
    run: str
    method: str
    seed: int
    begins: str
    dataset: str
    fields: dict[str, object]  # that the verb was told
    held_out: int  # problems that a score is a share of
    steps: int
    curve: list[tuple[int, float]]  # (optimizer step, score)
    seconds: float
    cpu_seconds: float
    status: str  # learned, control, or did not learn

    @property
    def before(self) -> float:
        return self.curve[0][1]

    @property
    def after(self) -> float:
        return self.curve[-1][1]


def rises(before: float, after: float, problems: int) -> bool:
    """Whether the difference of two shares of so many problems is beyond chance."""
    variance = (before * (1 - before) + after * (1 - after)) / problems
    return after - before > ERRORS * variance**0.5


def learned(name: str, seed: int, folder: Path, measured: Machine, run: str) -> Line:
    """Trains, and scores what was there before, on the way, and in the end."""
    method, out = METHODS[name], folder / name
    shutil.rmtree(out, ignore_errors=True)
    config = method.configured(folder, seed, out)
    with (folder / f"{name}.log").open("w") as log, contextlib.redirect_stderr(log):
        began, ran = time.perf_counter(), time.process_time()
        method.verb(config)
        seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - ran
        curve = scores(method, folder, out, config.max_steps)
    if not method.must_learn:
        status = "control"
    else:
        status = "learned" if rises(curve[0][1], curve[-1][1], HELD_OUT) else "did not learn"
    fields = {key: getattr(config, key) for key in method.fields}
    times = round(seconds, 1), round(cpu_seconds, 1)
    told = method.begins, method.dataset, fields
    return Line(measured, run, name, seed, *told, HELD_OUT, config.max_steps, curve, *times, status)


def scores(method: Method, folder: Path, out: Path, last: int) -> list[tuple[int, float]]:
    """Of the model it began from, of its checkpoints, and of what it left."""
    steps = sorted(int(path.name.removeprefix("checkpoint-")) for path in out.glob("checkpoint-*"))
    models = {0: folder / method.begins} | {step: out / f"checkpoint-{step}" for step in steps} | {last: out}
    return [(step, round(method.score(model, folder), 4)) for step, model in models.items()]


def needed(names: Sequence[str], folder: Path) -> list[str]:
    """These methods, behind those whose models they want and that are not there."""
    wanted = {other for name in names for other in METHODS[name].wants if not (folder / other / "config.json").exists()}
    return [name for name in METHODS if name in wanted.union(names)]


def show(line: Line) -> None:
    rise = f"{line.before:6.1%} -> {line.after:6.1%}"
    print(f"{line.method:10} seed {line.seed}  {rise}  {line.seconds:5.0f} s  {line.status}", flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Trains a tiny model by every method.")
    parser.add_argument("methods", nargs="*", metavar="METHOD", help=f"all, or some of {', '.join(METHODS)}")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--folder", type=Path, default=Path("runs/learn"), help="of models and logs, a folder a seed")
    parser.add_argument("--output", type=Path, help="a JSONL file; default: today's in benchmarks/results/learn")
    options = parser.parse_args(argv)
    if unknown := [name for name in options.methods if name not in METHODS]:
        parser.error(f"no method {', '.join(unknown)}: there are {', '.join(METHODS)}")
    torch.set_num_threads(1)  # matrices this small lose more to the threads' meeting than they gain
    now = datetime.now(UTC)
    output = options.output or RESULTS / f"cpu-{now:%Y-%m-%d}.jsonl"
    output.parent.mkdir(parents=True, exist_ok=True)
    measured, run, failed = machine(torch.device("cpu")), now.isoformat(timespec="seconds"), 0
    for seed in options.seeds:
        folder = options.folder / str(seed)
        if not options.methods:
            shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():
            write_task(folder, seed)
        for name in needed(options.methods or list(METHODS), folder):
            line = learned(name, seed, folder, measured, run)
            show(line)
            with output.open("a", encoding="utf-8") as file:
                file.write(json.dumps(asdict(line)) + "\n")
            failed += line.status == "did not learn"
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
