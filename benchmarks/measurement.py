"""One measurement, as a line of JSON."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from harness import Machine


@dataclass(frozen=True)
class Setup:
    """What all measurements of one run of the program share."""

    machine: Machine
    run: str  # when it was started, ISO
    dtype: str
    tokens: int  # T
    hidden: int  # D
    vocab: int  # V
    repeats: int
    bench: str = "head"  # the program of this folder

    @property
    def title(self) -> str:
        m = self.machine
        where = m.name if m.device != "cpu" else f"{m.name}, {m.threads} threads"
        return f"{where}; T {self.tokens}, D {self.hidden}, V {self.vocab}, {self.dtype}; {self.run[:10]}"


@dataclass(frozen=True)
class Measurement:
    setup: Setup
    case: str
    products: int  # the fewest that compute the case, each 2 T D V flop
    provider: str
    package: str
    version: str | None  # None: not installed
    settings: str
    status: Literal["ok", "WRONG", "failed", "absent"]  # only what is ok has a speed
    reason: str = ""
    errors: dict[str, float] = field(
        default_factory=dict
    )  # worst absolute of statistics, relative Frobenius of gradients
    seconds: float | None = None
    product_seconds: float | None = None  # of one plain product, in the same rounds
    naive_seconds: float | None = None  # of plain torch, in the same rounds
    peak_bytes: int | None = None  # above inputs and returned gradients

    @property
    def over_floor(self) -> float | None:
        return self.seconds / (self.products * self.product_seconds) if self.seconds and self.product_seconds else None

    @property
    def over_naive(self) -> float | None:
        return self.seconds / self.naive_seconds if self.seconds and self.naive_seconds else None

    @property
    def tflops(self) -> float | None:
        flop = 2 * self.products * self.setup.tokens * self.setup.hidden * self.setup.vocab
        return flop / self.seconds / 1e12 if self.seconds else None


def append(file: Path, measurements: Iterable[Measurement]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a") as lines:
        lines.writelines(json.dumps(asdict(m)) + "\n" for m in measurements)


def last_run(file: Path) -> list[Measurement]:
    """Those of the newest run in a file."""
    found = [json.loads(line) for line in file.read_text().splitlines()]
    if not found:
        raise ValueError(f"{file} has no measurement in it")
    newest = [line for line in found if line["setup"]["run"] == found[-1]["setup"]["run"]]
    setup = Setup(**(newest[0]["setup"] | {"machine": Machine(**newest[0]["setup"]["machine"])}))
    return [Measurement(**(line | {"setup": setup})) for line in newest]
