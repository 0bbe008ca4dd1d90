"""What a trainer did, step by step: seconds of the clock and of the process, the parts of a step, losses, tokens."""

from __future__ import annotations

import resource
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from live import live_bytes, most_allocated

PARTS = ("rollout", "reward", "reference")  # an update is all the rest


@dataclass(frozen=True)
class Step:
    seconds: float  # since the step before was over
    cpu_seconds: float  # that the process was running meanwhile, all its threads
    parts: dict[str, float]  # seconds
    loss: float
    tokens: float = 0.0  # that were generated


@dataclass(frozen=True)
class Trace:
    steps: list[Step]
    rss_bytes: int  # the most that was resident, the interpreter and libraries included

    def median(self, of: Callable[[Step], float]) -> float:
        """Over all steps but the first, in which caches fill and moments come into being."""
        return statistics.median(of(step) for step in self.steps[1:])


@dataclass(frozen=True)
class Ready:
    """A contestant whose model is loaded."""

    train: Callable[[], Sequence[Step]]


def traced(ready: Ready) -> Trace:
    steps = list(ready.train())
    return Trace(steps, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


def peak(ready: Ready) -> int:
    """Bytes of live tensors at the worst moment of training: model, reference, moments, gradients, activations."""
    return live_bytes() + most_allocated(ready.train)


class Watch:
    """Notes when steps end, and how long the parts of each took; a part within a part is of the outer one."""

    def __init__(self) -> None:
        self._within = False
        self.restart()

    def restart(self) -> None:
        self.ends = [now()]
        self.parts: list[dict[str, float]] = [{}]

    def end(self) -> None:
        self.ends.append(now())
        self.parts.append({})

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        if self._within:
            yield
            return
        self._within, began = True, time.perf_counter()
        yield
        self._within = False
        self.parts[-1][name] = self.parts[-1].get(name, 0.0) + time.perf_counter() - began

    def around(self, owner: Any, name: str, part: str, when: Callable[[], bool] = lambda: True) -> None:
        """From here on the owner's method is that part, where `when` says so."""
        inner = getattr(owner, name)

        def outer(*args: Any, **kwargs: Any) -> Any:
            if not when():
                return inner(*args, **kwargs)
            with self.part(part):
                return inner(*args, **kwargs)

        setattr(owner, name, outer)

    def between(self) -> list[tuple[float, float]]:
        """Seconds of each step: of the clock, and of the process."""
        return [(b[0] - a[0], b[1] - a[1]) for a, b in zip(self.ends, self.ends[1:], strict=False)]


def now() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()
