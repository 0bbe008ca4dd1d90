"""One task and all who do it: each is held against float64 before it is timed, and one that is wrong is left out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from contest import PRODUCT
from counted import Cost
from harness import interleaved
from measurement import Measurement, Setup
from torch import Tensor

import fastpost as fp


@dataclass(frozen=True)
class Trial:
    case: str
    setup: Setup
    products: int  # the fewest that do it
    counted: Cost | None
    runs: Mapping[str, Callable[[], object]]  # what is timed, by who does it
    results: Mapping[str, Callable[[], Tensor]]  # what it makes
    error: Callable[[Tensor], float]  # of a result
    allowed: float
    product: Callable[[], object]  # the floor's unit
    before: Callable[[], object] | None = None  # done before each run, and not timed


def reason(trial: Trial, name: str, errors: dict[str, float]) -> str:
    """Why one is not timed, if it is not. Its error is written down."""
    try:
        errors[name] = error = trial.error(trial.results[name]())
    except Exception as raised:  # a launch that this GPU has no room for
        return f"{type(raised).__name__}: {raised}".splitlines()[0]
    return "" if error <= trial.allowed else f"error {error:.1e}, allowed {trial.allowed:.1e}"


def measure(trial: Trial, device: torch.device, bytes_per_second: float) -> list[Measurement]:
    errors: dict[str, float] = {}
    reasons = {name: reason(trial, name, errors) for name in trial.runs}
    right = {name: run for name, run in trial.runs.items() if not reasons[name]}
    seconds = interleaved(right | {PRODUCT: trial.product}, trial.setup.repeats, device, trial.before)
    return [
        Measurement(
            setup=trial.setup,
            case=trial.case,
            products=trial.products,
            provider=name,
            package="fastpost",
            version=fp.__version__,
            settings="",
            status="ok" if name in right else "WRONG" if name in errors else "failed",
            reason=reasons[name],
            errors={"logp" if trial.products else "result": errors[name]} if name in errors else {},
            seconds=seconds.get(name),
            product_seconds=seconds[PRODUCT],
            counted=trial.counted,
            bytes_per_second=bytes_per_second,
        )
        for name in trial.runs
    ]


def verdict(case: str, challengers: Mapping[str, float], holders: Mapping[str, float], lacking: str) -> str:
    """Whether the fastest challenger beats the fastest of those who hold the place: their seconds, by name."""
    if not challengers or not holders:
        return f"{case}: no verdict, for want of {lacking}"
    best, other = (min(seconds, key=seconds.__getitem__) for seconds in (challengers, holders))
    ratio = challengers[best] / holders[other]
    return f"{case}: {best} {'wins' if ratio < 1 else 'loses'}, {ratio:.2f} x the time of {other}"
