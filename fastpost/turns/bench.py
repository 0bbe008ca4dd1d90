"""Where calls are run: worker processes that have the user's functions, so many calls at a time.

A function that raises, hangs, exits, eats memory or prints without end is one `Outcome` among others. Functions are the
user's own code, which may read files and use the network; what a model writes for them to run belongs in
`fastpost.sandbox`.
"""

from __future__ import annotations

import json
import os
import queue
import select
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

WORKER = Path(__file__).with_name("worker.py")
START = 300.0  # seconds for a worker to import the user's files, and whatever these import
GRACE = 20.0  # seconds for it to answer beyond the limit of a call
Status = Literal["ok", "nothing", "error", "timeout", "died"]


@dataclass(frozen=True)
class Limits:
    """Of one call."""

    seconds: float = 10.0
    memory_mb: int = 4096  # of address space
    output_bytes: int = 4096


@dataclass(frozen=True)
class Outcome:
    """What became of a call; "nothing" is None, returned."""

    status: Status
    text: str  # at most output_bytes
    bytes: int = 0  # of the whole of it

    @property
    def truncated(self) -> bool:
        return self.bytes > len(self.text.encode())


def _started(functions: Mapping[str, tuple[str, str]], limits: Limits) -> subprocess.Popen[bytes]:
    """A worker that has said, by an empty line, that it is ready; a call's time begins then."""
    told = {"functions": dict(functions), **vars(limits)}
    command = [sys.executable, str(WORKER), json.dumps(told)]
    worker = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert worker.stdout is not None
    if select.select([worker.stdout], [], [], START)[0]:
        worker.stdout.readline()
    return worker


def _asked(worker: subprocess.Popen[bytes], name: str, arguments: Mapping[str, Any], seconds: float) -> Outcome | None:
    """None: the worker itself is no more, or has to go."""
    assert worker.stdin is not None and worker.stdout is not None
    try:
        worker.stdin.write(json.dumps({"name": name, "arguments": arguments}, default=str).encode() + b"\n")
        worker.stdin.flush()
    except OSError:
        return None
    if not select.select([worker.stdout], [], [], seconds + GRACE)[0]:
        return None
    line = worker.stdout.readline()
    return Outcome(**json.loads(line)) if line.endswith(b"\n") else None


@dataclass
class Bench:
    """Workers are started when they are needed, and end with this process."""

    functions: Mapping[str, tuple[str, str]]  # name -> file, and the function's name there
    limits: Limits = field(default_factory=Limits)
    width: int = field(default_factory=lambda: max(1, min(8, os.cpu_count() or 1)))
    idle: queue.SimpleQueue[subprocess.Popen[bytes]] = field(default_factory=queue.SimpleQueue)

    def one(self, call: tuple[str, Mapping[str, Any]]) -> Outcome:
        try:
            worker = self.idle.get_nowait()
        except queue.Empty:
            worker = _started(self.functions, self.limits)
        found = _asked(worker, *call, self.limits.seconds)
        if found is not None:
            self.idle.put(worker)
            return found
        worker.kill()
        worker.communicate()
        return Outcome("died", "")

    def run(self, calls: Sequence[tuple[str, Mapping[str, Any]]]) -> list[Outcome]:
        """In the order of the calls."""
        if not calls:
            return []
        with ThreadPoolExecutor(self.width) as threads:
            return list(threads.map(self.one, calls))

    def close(self) -> None:
        while not self.idle.empty():
            worker = self.idle.get_nowait()
            worker.kill()
            worker.communicate()
