"""All that wants a GPU, stage after stage: `python tests/gpu.py`, or `python tests/gpu.py head sweep` for some of it.

A stage that fails, or is not done within its limit, is said and ends nothing: the next one runs, each has a line at the
end, and the exit code is 1 if one was not ok. First come the few tests that say whether the library is right on this
GPU; then what is measured, each program of which holds its own results against float64 before it times them; then all
other tests; and compute-sanitizer last.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
NINE_MINUTES = 9 * 60
GRACE = 10  # seconds between being asked to end and being made to
OUT_OF_TIME = (124, -9)  # of coreutils' `timeout`, where it ended a command; by force, itself too
GATE = ("tests/test_gpu.py", "tests/test_device.py")
SHORT = "--tokens 4096 --hidden 2048 --vocab 65536 --cases logp grpo --repeats 5"  # a grid a quarter as large


@dataclass(frozen=True)
class Stage:
    name: str
    command: str  # of Python, from the root of the repository
    expected: int  # seconds on an H100 with an empty cache of compiled kernels: an estimate, none was timed yet
    limit: int  # seconds


STAGES = (
    Stage("gate", " ".join(("-m pytest -m gpu", *GATE)), expected=90, limit=180),
    Stage("rows", "benchmarks/rows.py", expected=65, limit=130),
    Stage("head", "benchmarks/head.py --repeats 10", expected=110, limit=240),
    Stage("sweep", f"benchmarks/sweep.py {SHORT}", expected=40, limit=100),
    Stage("ppo", "benchmarks/ppo_step.py", expected=40, limit=90),
    Stage("tests", " --ignore ".join(("-m pytest -m gpu", *GATE)), expected=120, limit=240),
    Stage("sanitize", "tests/sanitize.py", expected=70, limit=140),
)


@dataclass(frozen=True)
class Verdict:
    stage: Stage
    code: int  # of its exit
    seconds: float

    @property
    def line(self) -> str:
        found = "OUT OF TIME" if self.code in OUT_OF_TIME else f"FAILED with exit code {self.code}"
        took = f"{self.seconds:.0f} s, about {self.stage.expected} expected, {self.stage.limit} allowed"
        return f"{self.stage.name}: {found if self.code else 'ok'}, {took}"


def run(stage: Stage) -> Verdict:
    """Everything that the stage started ends with it."""
    limit = ["timeout", "--kill-after", str(GRACE), str(stage.limit)]
    start = time.perf_counter()
    code = subprocess.run([*limit, sys.executable, *stage.command.split()], cwd=ROOT).returncode
    return Verdict(stage, code, time.perf_counter() - start)


def chosen(stages: Sequence[Stage], names: Sequence[str]) -> list[Stage]:
    known = {stage.name: stage for stage in stages}
    if unknown := [name for name in names if name not in known]:
        raise SystemExit(f"no stage of the name {', '.join(unknown)}; there are {', '.join(known)}")
    return [known[name] for name in names] or list(stages)


def main(argv: Sequence[str] | None = None, stages: Sequence[Stage] = STAGES) -> int:
    verdicts = []
    for stage in chosen(stages, sys.argv[1:] if argv is None else argv):
        print(f"{stage.name}: python {stage.command}", flush=True)
        verdicts.append(run(stage))
        print(verdicts[-1].line, flush=True)
    print("", *(verdict.line for verdict in verdicts), sep="\n", flush=True)
    return int(any(verdict.code for verdict in verdicts))


if __name__ == "__main__":
    # (every stage would skip its tests, or measure the CPU, and be well)
    sys.exit(main() if torch.cuda.is_available() else "no GPU here: nothing was run")
