"""One optimizer step of SFT, DPO and GRPO on a CPU, fastpost beside TRL: `python benchmarks/end_to_end.py`.

A step is from lists of token ids to updated weights: collating or packing, forward and backward over all microbatches,
clipping, AdamW. Of DPO it includes the reference's pass; of GRPO the completions, their rewards and advantages are
given. Model, rows, optimizer and clipping are the same for all, and each is a process of its own, timed in turns.

Before any is timed, its loss and the gradient of every tensor are held against float64 by the rule of truth.py, plain
torch of the same dtype being the yardstick. If one of fastpost's is past its bound nothing is timed; one of TRL's gets
no speed.

  tokens     of the rows: no padding, and a prompt counts in every row that has it, whoever computes it once
  positions  that the trunk sees of them, padding included
  tokens/s   tokens over the median seconds of a step
  peak       of live tensors, weights and AdamW's moments included; by torch's allocator, not RSS (live.py)

On a CPU, TRL 1.16 scores every position of a microbatch (on a GPU only those with a label), by torch's products.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from pathlib import Path

import step
import step_packed
import step_plain
import step_trl
import torch
from contest import RESULTS
from harness import Machine, machine
from live import live_bytes, most_allocated
from report import table
from step import METHODS, Shape, Trainee
from step_check import Rule, judged, write_gradients
from turns import Contestant

Make = Callable[[str, Shape], Trainee]


@dataclass(frozen=True)
class Entry:
    name: str
    make: Make
    methods: Sequence[str] = METHODS

    @property
    def ours(self) -> bool:
        return self.name.startswith("fastpost")


ENTRIES = (
    Entry("fastpost", step_packed.made),
    Entry("fastpost, shared prompts", partial(step_packed.made, shared=True), ("grpo",)),
    Entry("TRL, padded", step_trl.made),
    Entry("TRL, packed", partial(step_trl.made, packing=True), ("sft",)),
    Entry("TRL, a row at a time", partial(step_trl.made, batch=1), ("sft",)),
    Entry("TRL, a pair at a time", partial(step_trl.made, batch=2), ("dpo",)),
    Entry("TRL on fastpost's head, padded", partial(step_trl.made, fused=True)),
)


@dataclass(frozen=True)
class Line:
    """One contestant on one method."""

    machine: Machine
    run: str  # when it was started, ISO
    bench: str
    shape: Shape
    method: str
    tokens: int
    provider: str
    status: str  # ok, WRONG or failed; only what is ok has a speed
    reason: str = ""
    positions: int | None = None
    errors: Mapping[str, float] = field(default_factory=dict)  # of the loss, absolute; of all gradients, relative
    seconds: Sequence[float] = ()  # of each round
    peak_bytes: int | None = None

    @property
    def tokens_per_second(self) -> float | None:
        return self.tokens / statistics.median(self.seconds) if self.seconds else None


# ---- what a contestant is told to do ----


def peak(trainee: Trainee) -> int:
    return live_bytes() + most_allocated(trainee.step)


def seconds(trainee: Trainee) -> float:
    began = time.perf_counter()
    trainee.step()
    return time.perf_counter() - began


def positions(trainee: Trainee) -> int:
    return trainee.positions


# ---- a method ----


class Wrong(ArithmeticError):
    """A result of fastpost's is past its bound."""


def written(make: Callable[[], Trainee], file: Path) -> list[float]:
    """The gradients of a process that ends with them; returns the parts of its loss."""
    contestant = Contestant(make)
    try:
        return contestant.told(partial(write_gradients, str(file)))
    finally:
        contestant.dismissed()


def checked(contestants: Mapping[Entry, Contestant[Trainee]], blank: Line) -> dict[Entry, Line]:
    """A line for each, without its speed."""
    shape, found = blank.shape, {}
    with tempfile.TemporaryDirectory() as folder:
        its, plain, truth = (Path(folder) / f"{name}.safetensors" for name in ("its", "plain", "truth"))
        wide = partial(step_plain.made, blank.method, replace(shape, dtype="float32"), dtype=torch.float64)
        parts = [written(partial(step_plain.made, blank.method, shape), plain), written(wide, truth)]
        for entry, contestant in contestants.items():
            line = replace(blank, provider=entry.name)
            try:
                mine = contestant.told(partial(write_gradients, str(its)))
                errors, wrong = judged(Rule.of(entry.ours, shape.dtype), (its, plain, truth), (mine, *parts))
                at = contestant.told(positions)
                line = replace(line, status="WRONG" if wrong else "ok", reason=wrong, errors=errors, positions=at)
            except RuntimeError as error:
                line = replace(line, status="failed", reason=str(error).splitlines()[0])
            _say(f"{blank.method}, {entry.name}: {line.status} {line.reason}")
            found[entry] = line
    if wrong := [line for entry, line in found.items() if entry.ours and line.status != "ok"]:
        raise Wrong("\n".join(f"{line.provider}, {line.method}: {line.reason}" for line in wrong))
    return found


def measure(entries: Sequence[Entry], repeats: int, blank: Line) -> list[Line]:
    """All are checked before the first is timed. The step that is watched for its memory warms up, too."""
    method, shape = blank.method, blank.shape
    contestants = {
        entry: Contestant(partial(entry.make, method, shape)) for entry in entries if method in entry.methods
    }
    try:
        found = checked(contestants, blank)
        right = {entry: each for entry, each in contestants.items() if found[entry].status == "ok"}
        peaks = {entry: each.told(peak) for entry, each in right.items()}
        rounds = [{entry: each.told(seconds) for entry, each in right.items()} for _ in range(repeats)]
    finally:
        for contestant in contestants.values():
            contestant.dismissed()
    timed = {entry: {"peak_bytes": peaks[entry], "seconds": [each[entry] for each in rounds]} for entry in right}
    return [replace(line, **timed.get(entry, {})) for entry, line in found.items()]


# ---- what is shown ----


def show(lines: Sequence[Line]) -> None:
    columns = ("method", "contestant", "tokens/s", "x TRL", "s", "spread", "tokens", "positions", "peak MB", "dW err")
    table("end to end", columns, [_row(line, _padded(lines, line.method)) for line in lines])
    for line in lines:
        if line.reason:
            print(f"{line.status}: {line.provider}, {line.method}: {line.reason}")


def _padded(lines: Sequence[Line], method: str) -> Line | None:
    return next((line for line in lines if line.method == method and line.provider == "TRL, padded"), None)


def _row(line: Line, padded: Line | None) -> list[str]:
    speed, base = line.tokens_per_second, padded and padded.tokens_per_second
    taken = sorted(line.seconds)
    return [
        line.method,
        line.provider,
        f"{speed:.0f}" if speed else line.status,
        f"{speed / base:.2f}" if speed and base else "-",
        f"{statistics.median(taken):.2f}" if taken else "-",
        f"{taken[-1] / taken[0] - 1:.0%}" if taken else "-",
        f"{line.tokens}",
        f"{line.positions or '-'}",
        f"{line.peak_bytes / 1e6:.0f}" if line.peak_bytes else "-",
        f"{line.errors['gradient']:.0e}" if line.errors else "-",
    ]


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


# ---- the program ----


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="One optimizer step on a CPU: fastpost, packed, beside TRL.")
    for name, default in asdict(Shape()).items():
        choices = {"choices": ("bfloat16", "float32")} if name == "dtype" else {}
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default, **choices)
    parser.add_argument("--repeats", type=int, default=3, help="timed rounds")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--contestants", nargs="+", choices=[entry.name for entry in ENTRIES], help="only these")
    parser.add_argument("--output", type=Path, help="JSON lines; benchmarks/results/end_to_end/cpu-<date>.jsonl")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    options, now = parse(argv), datetime.datetime.now().astimezone()
    shape = Shape(**{each.name: getattr(options, each.name) for each in fields(Shape)})
    entries = [entry for entry in ENTRIES if not options.contestants or entry.name in options.contestants]
    output = options.output or RESULTS / "end_to_end" / f"cpu-{now:%Y-%m-%d}.jsonl"
    output.parent.mkdir(parents=True, exist_ok=True)
    shared = (machine(torch.device("cpu")), now.isoformat(timespec="seconds"), "end_to_end", shape)
    lines: list[Line] = []
    for method in options.methods:
        blank = Line(*shared, method, step.tokens(step.given(method, shape)), provider="", status="ok")
        try:
            found = measure(entries, options.repeats, blank)
        except Wrong as error:
            _say(f"fastpost is wrong, so {method} was not timed\n{error}")
            return 1
        with output.open("a") as file:
            file.writelines(json.dumps(asdict(line)) + "\n" for line in found)
        lines += found
    show(lines)
    print(f"written to {output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
