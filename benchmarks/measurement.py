"""One measurement, as a line of JSON."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from counted import Cost
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
    # Worst absolute of statistics, relative Frobenius of gradients.
    errors: dict[str, float] = field(default_factory=dict)
    seconds: float | None = None
    product_seconds: float | None = None  # of one plain product, in the same rounds
    naive_seconds: float | None = None  # of plain torch, in the same rounds
    peak_bytes: int | None = None  # above inputs and returned gradients
    counted: Cost | None = None  # what it should cost, where counted.py has formulas
    bytes_per_second: float | None = None  # of a copy, in the same run

    @property
    def _floor_seconds(self) -> float | None:
        return self.products * self.product_seconds if self.product_seconds else None

    @property
    def over_floor(self) -> float | None:
        return _ratio(self.seconds, self._floor_seconds)

    @property
    def over_naive(self) -> float | None:
        return _ratio(self.seconds, self.naive_seconds)

    @property
    def tflops(self) -> float | None:
        flop = 2 * self.products * self.setup.tokens * self.setup.hidden * self.setup.vocab
        return flop / self.seconds / 1e12 if self.seconds else None

    @property
    def intensity(self) -> float | None:
        """Counted flop for each byte that comes from memory."""
        return self.counted.flop / self.counted.fetched if self.counted else None

    @property
    def bound_seconds(self) -> float | None:
        """The fewest for what was counted, at this run's rates of a plain product and of a copy."""
        if not (self.counted and self.product_seconds and self.bytes_per_second):
            return None
        product = 2 * self.setup.tokens * self.setup.hidden * self.setup.vocab
        return self.counted.bound(product / self.product_seconds, self.bytes_per_second)

    @property
    def bound_over_floor(self) -> float | None:
        return _ratio(self.bound_seconds, self._floor_seconds)

    @property
    def over_bound(self) -> float | None:
        return _ratio(self.seconds, self.bound_seconds)


def _ratio(value: float | None, unit: float | None) -> float | None:
    return value / unit if value and unit else None


def append(file: Path, measurements: Iterable[Measurement]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a") as lines:
        lines.writelines(json.dumps(asdict(m)) + "\n" for m in measurements)


def last_run(file: Path) -> list[Measurement]:
    """Those of the newest run in a file."""
    found = [json.loads(line) for line in file.read_text().splitlines()]
    if not found:
        raise ValueError(f"{file} has no measurement in it")
    return [_read(line) for line in found if line["setup"]["run"] == found[-1]["setup"]["run"]]


def _read(line: dict[str, Any]) -> Measurement:
    setup = Setup(**(line["setup"] | {"machine": Machine(**line["setup"]["machine"])}))
    counted = Cost(**line["counted"]) if line.get("counted") else None
    return Measurement(**(line | {"setup": setup, "counted": counted}))
