"""A confined process, from outside: started with a payload, watched until it ends or a limit ends it.

What it prints is read as it comes and no further than the limit, so a gigabyte is never held. It can start nothing and
cannot leave its session (inside/), so what is killed is all there was.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastpost.sandbox.limits import Limits, Outcome, Status

INSIDE = Path(__file__).with_name("inside")
TICK = 0.05  # seconds between looks at the clock and at the files
BLOCK = 1 << 16
MOST_FILES = 1000
MOST_THREADS = 100
ENDED_BY: dict[int, Status] = {-signal.SIGXCPU: "cpu", -signal.SIGKILL: "cpu", 0: "ok"}


@dataclass
class Running:
    """A process, what it is still to be fed, and what it has printed."""

    process: subprocess.Popen[bytes]
    folder: str  # its working directory
    limits: Limits
    feed: memoryview
    printed: dict[str, bytearray] = field(default_factory=lambda: {"stdout": bytearray(), "stderr": bytearray()})

    def kill(self) -> None:
        """It, and whatever else should be in its session."""
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            return

    def over(self, since: float) -> Status | None:
        """The limit it has gone beyond."""
        if time.monotonic() - since > self.limits.seconds:
            return "timeout"
        if max(map(len, self.printed.values())) > self.limits.output_kb << 10:
            return "output"
        if _threads(self.process.pid) > MOST_THREADS:
            return "threads"
        return "files" if _written(self.folder, self.process.pid) > self.limits.files_mb << 20 else None


def _threads(pid: int) -> int:
    try:
        return os.stat(f"/proc/{pid}/task").st_nlink - 2  # a directory each
    except OSError:
        return 0


def _written(folder: str, pid: int) -> int:
    """Bytes of its files, those that it has removed and not closed included. It can make no directories."""
    with os.scandir(folder) as entries:
        seen = [entry.path for _, entry in zip(range(MOST_FILES + 1), entries, strict=False)]
    if len(seen) > MOST_FILES:
        return sys.maxsize
    sizes = {}
    for path in seen + _open_files(folder, pid):
        with contextlib.suppress(OSError):  # it has gone
            found = os.stat(path)
            sizes[found.st_ino] = found.st_blocks * 512
    return sum(sizes.values())


def _open_files(folder: str, pid: int) -> list[str]:
    """Those of a folder that a process has open, removed or not."""
    found = []
    with contextlib.suppress(OSError):
        for link in os.scandir(f"/proc/{pid}/fd"):
            if os.readlink(link.path).startswith(folder):
                found.append(link.path)
    return found


def start(
    role: str, payload: Any, limits: Limits, folder: str, *, stdin: bytes = b"", fds: Sequence[int] = ()
) -> Running:
    """A process of a role (inside/roles.py) in an empty directory, `stdin` what it can read."""
    body = json.dumps(payload).encode()
    told = {
        "role": role,
        "bytes": len(body),
        "parent": os.getpid(),
        "fds": list(fds),
        "limits": {
            "cpu_seconds": limits.cpu_seconds,
            "memory_bytes": limits.memory_mb << 20,
            "file_bytes": limits.files_mb << 20,
        },
    }
    process = subprocess.Popen(
        [os.path.realpath(sys.executable), "-I", "-S", "-X", "utf8", str(INSIDE), json.dumps(told)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=folder,
        env={},
        pass_fds=fds,
        start_new_session=True,
        bufsize=0,
    )
    return Running(process, folder, limits, memoryview(body + stdin))


def watch(running: Running) -> Outcome:
    """Until it ends. It has then ended, whatever it did."""
    since, process = time.monotonic(), running.process
    try:
        status = _pumped(running, since)
    finally:
        running.kill()
        process.wait()
        for stream in (process.stdin, process.stdout, process.stderr):
            stream.close()  # pyright: ignore[reportOptionalMemberAccess]
    stdout, stderr = (
        bytes(part[: running.limits.output_kb << 10]).decode(errors="replace") for part in running.printed.values()
    )
    if status is None:
        last = stderr.rstrip().rpartition("\n")[2]
        status = "memory" if last.startswith("MemoryError") else ENDED_BY.get(process.returncode, "error")
    return Outcome(status, stdout, stderr, time.monotonic() - since)


def _pumped(running: Running, since: float) -> Status | None:
    """Feeds and reads until the process has ended (None) or is over a limit."""
    process = running.process
    looked = since
    with selectors.DefaultSelector() as ready:
        for name in ("stdin", "stdout", "stderr"):
            stream = getattr(process, name)
            os.set_blocking(stream.fileno(), False)
            ready.register(stream, selectors.EVENT_WRITE if name == "stdin" else selectors.EVENT_READ, name)
        while ready.get_map() or process.poll() is None:
            for key, _ in ready.select(TICK) if ready.get_map() else ():
                if not (_fed(running) if key.data == "stdin" else _read(running, key.data)):
                    ready.unregister(key.fileobj)
            if not ready.get_map():
                _waited(process)
            full = max(map(len, running.printed.values())) > running.limits.output_kb << 10
            if full or time.monotonic() - looked > TICK:
                looked = time.monotonic()
                if (status := running.over(since)) is not None:
                    return status
    return None


def _waited(process: subprocess.Popen[bytes]) -> None:
    try:
        process.wait(TICK)
    except subprocess.TimeoutExpired:
        return


def _fed(running: Running) -> bool:
    """Whether there is more to feed."""
    stdin = running.process.stdin
    assert stdin is not None
    try:
        running.feed = running.feed[os.write(stdin.fileno(), running.feed[:BLOCK]) :] if running.feed else running.feed
    except BrokenPipeError:
        running.feed = running.feed[:0]
    if running.feed:
        return True
    stdin.close()
    return False


def _read(running: Running, name: str) -> bool:
    """Whether there may be more to read."""
    part = os.read(getattr(running.process, name).fileno(), BLOCK)
    running.printed[name] += part
    return bool(part)
