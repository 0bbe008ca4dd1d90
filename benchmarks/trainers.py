"""Whole runs of SFT, DPO, KTO, GRPO and RLOO, fastpost beside TRL: `python benchmarks/trainers.py`.

Both are told the same: model, rows and their order, fields (`trainers_task.py`). Each run is a process of its own, and
they take turns. TRL 1.16 has no PPO.

seconds    of a step, from the end of one to the end of the next, median of all but the first; its parts are rollout,
           reward, reference (passes without gradient), and update, all the rest. Samples differ, so time is also given
           for 1000 tokens that were generated
cpu        the same, of the process: what a machine that does other things as well does not move
peak       of live tensors in two steps: weights, reference, moments, gradients, activations; by torch's allocator, in a
           run of its own (live.py). RSS: of the process, with the interpreter and libraries
score      share of 400 held-out sums that are right, before and after

A time counts only where the runs did the same: of SFT, DPO and KTO, which sample nothing, the losses of the first steps
must be one up to the rounding of fp32; and on the sums the score must rise by more than three standard errors.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
import trainers_ours
import trainers_task
import trainers_trl
from harness import Machine, machine
from learn import rises
from learn_task import HELD_OUT, right_answers
from report import table
from trainers_task import COLUMNS, SAMPLED, Job
from trainers_trace import PARTS, Ready, peak, traced
from turns import Contestant

RESULTS = Path(__file__).resolve().parent / "results" / "trainers"
Answer = TypeVar("Answer")
Make = Callable[[Job, int], Ready]
CONTESTANTS: dict[str, Make] = {"fastpost": trainers_ours.ready, "TRL": trainers_trl.ready}
SETTINGS = ("sums", "head")
UNLEARNED = "did not learn"
COMPARED = 3  # losses; AdamW makes ever more of their rounding
WATCHED = 2  # steps whose memory is watched: in the second there are moments
TOGETHER = 1024 * torch.finfo(torch.float32).eps  # relative: of pairs, hundreds of log-probabilities cancel in a loss


@dataclass(frozen=True)
class Line:
    """A run."""

    machine: Machine
    run: str
    setting: str  # sums or head
    method: str
    provider: str
    seed: int
    fields: dict[str, Any]
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    parts: dict[str, float] | None = None
    tokens: float = 0.0  # generated in a step
    peak_bytes: int = 0
    rss_bytes: int = 0
    losses: Sequence[float] = ()  # of the first steps
    before: float | None = None
    after: float | None = None
    status: str = "ok"  # or what is wrong; only what is ok has a speed


# ---- a method ----


def done(make: Make, order: Callable[[Ready], Answer], job: Job, threads: int, _: object) -> Answer:
    """What comes of a job, whose model goes into a directory that is new. Nothing of it is left in the process."""
    shutil.rmtree(job.out, ignore_errors=True)
    return order(make(job, threads))


def measured(job: Job, line: Line, threads: int) -> Line:
    """A run, and then the memory of a short one, in a process that does nothing else."""
    make, short = CONTESTANTS[line.provider], job.shortened(WATCHED, f"{job.out}.short")
    contestant = Contestant(object)
    try:
        trace = contestant.told(partial(done, make, traced, job, threads))
        most = contestant.told(partial(done, make, peak, short, threads))
    except RuntimeError as error:
        return replace(line, status=f"failed: {str(error).splitlines()[0]}")
    finally:
        contestant.dismissed()
    parts = {name: trace.median(lambda step, name=name: step.parts.get(name, 0.0)) for name in PARTS}
    seconds = trace.median(lambda step: step.seconds)
    return replace(
        line,
        seconds=seconds,
        cpu_seconds=trace.median(lambda step: step.cpu_seconds),
        parts=parts | {"update": seconds - sum(parts.values())},
        tokens=trace.median(lambda step: step.tokens),
        peak_bytes=most,
        rss_bytes=trace.rss_bytes,
        losses=[step.loss for step in trace.steps[:COMPARED]],
    )


def scored(line: Line, job: Job, folder: Path) -> Line:
    """With its scores; one that did not rise has no speed."""
    if line.status != "ok":
        return line
    before, after = (right_answers(Path(model), folder) for model in (job.model, job.out))
    status = "ok" if rises(before, after, HELD_OUT) else UNLEARNED
    return replace(line, before=before, after=after, status=status)


def checked(lines: Sequence[Line]) -> list[Line]:
    """Those of one method and seed. Where the losses are not the same, no run has a speed."""
    if lines[0].method in SAMPLED or any(line.status.startswith("failed") for line in lines):
        return list(lines)
    first = lines[0].losses
    apart = [max(abs(a - b) / abs(a) for a, b in zip(first, line.losses, strict=True)) for line in lines]
    if max(apart) <= TOGETHER:
        return list(lines)
    return [replace(line, status=f"WRONG: losses are {max(apart):.0e} apart") for line in lines]


def runs(setting: str, method: str, seed: int, root: Path, blank: Line, threads: int) -> list[Line]:
    """Ours, then theirs, of a seed."""
    found = []
    for name in CONTESTANTS:
        out = root / setting / str(seed) / f"{method}-{name}"
        folder = root / setting / str(seed) / "task"
        job = getattr(trainers_task, setting)(method, folder, seed, out)
        line = measured(job, replace(blank, provider=name, fields=dict(job.fields)), threads)
        found.append(scored(line, job, folder) if setting == "sums" else line)
    return checked(found)


# ---- what is shown ----

HEADS = ("run", "", "s/step", "cpu", *PARTS, "update", "tokens", "s/1000", "peak MB", "RSS MB", "score", "status")


def show(lines: Sequence[Line]) -> None:
    table("trainers", HEADS, [row(line) for line in lines])


def row(line: Line) -> list[str]:
    name = f"{line.setting} {line.method} {line.seed}"
    if line.status != "ok":
        return [name, line.provider, *["-"] * (len(HEADS) - 3), line.status]
    each = [f"{seconds:.3f}" for seconds in (line.seconds, line.cpu_seconds, *(line.parts or {}).values())]
    generated = [f"{line.tokens:.0f}", f"{1000 * line.seconds / line.tokens:.3f}"] if line.tokens else ["-", "-"]
    score = "-" if line.after is None else f"{line.before:.0%} -> {line.after:.0%}"
    memory = [f"{line.peak_bytes / 1e6:.0f}", f"{line.rss_bytes / 1e6:.0f}"]
    return [name, line.provider, *each, *generated, *memory, score, line.status]


# ---- the program ----


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Whole runs on a CPU: fastpost's trainers beside TRL's.")
    parser.add_argument("--methods", nargs="+", choices=list(COLUMNS), default=list(COLUMNS))
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=SETTINGS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1], help="of the sums, a turn each")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--folder", type=Path, default=Path("runs/trainers"), help="of models and logs")
    parser.add_argument("--output", type=Path, help="JSON lines; benchmarks/results/trainers/cpu-<date>.jsonl")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    options, now = parse(argv), datetime.now(UTC)
    torch.set_num_threads(options.threads)
    output = options.output or RESULTS / f"cpu-{now:%Y-%m-%d}.jsonl"
    output.parent.mkdir(parents=True, exist_ok=True)
    here, lines = machine(torch.device("cpu")), []
    seeds = {"sums": options.seeds, "head": options.seeds[:1]}
    for setting, seed in [(name, seed) for name in options.settings for seed in seeds[name]]:
        getattr(trainers_task, f"write_{setting}")(options.folder / setting / str(seed) / "task", seed)
        for method in options.methods:
            blank = Line(here, now.isoformat(timespec="seconds"), setting, method, "", seed, {})
            found = runs(setting, method, seed, options.folder, blank, options.threads)
            with output.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(asdict(line)) + "\n" for line in found)
            lines += found
    show(lines)
    return int(any(line.status != "ok" for line in lines if line.provider == "fastpost"))


if __name__ == "__main__":
    sys.exit(main())
